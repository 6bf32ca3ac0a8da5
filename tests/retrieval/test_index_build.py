"""A run's index: its recall on held-out requests, its promise, and what stays when it fails."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pytest

from karma_ray.artifacts import RunFolder, join, read_manifest, write_json, write_table
from karma_ray.data.schema import EXAMPLES
from karma_ray.errors import InputError
from karma_ray.retrieval import index_build
from karma_ray.retrieval.encode import load_embeddings
from karma_ray.retrieval.export import load_bundle
from karma_ray.retrieval.index_build import held_out_interests, index_run
from karma_ray.retrieval.kinds import Graph, InvertedLists, ScalarQuantised
from karma_ray.retrieval.parts import served
from karma_ray.retrieval.requests import HistoryItem
from karma_ray.retrieval.retriever import Retriever
from tests import tiny_run

NOW = datetime(2024, 1, 1, tzinfo=UTC)


def prepare(data: str, count: int = 30) -> None:
    """Prepared data beside a tiny run, with `count` validation requests."""
    rows = [
        {
            "user_id": f"u{n}", "timestamp": NOW, "query": tiny_run.THINGS[n % 8],
            "history_item_ids": [f"i{n}", f"i{7 * n % 40}"], "history_queries": ["mug", None],
            "history_timestamps": [NOW, NOW], "positive_item_id": f"i{n}",
        }
        for n in range(count)
    ]  # fmt: skip
    write_table(pa.Table.from_pylist(rows, schema=EXAMPLES), join(data, "examples", "split=valid"))
    write_json({"prepare": {}}, join(data, "prepared.json"))


@pytest.fixture
def run(tmp_path: Path) -> str:
    data = tiny_run.write_data(tmp_path)
    prepare(data)
    return tiny_run.write_run(tmp_path)


def test_recall_is_measured_on_what_validation_requests_search_with(run: str) -> None:
    made = index_run(run, ScalarQuantised())
    assert made.recall_measured_on == "30 vectors of validation requests"
    facts = read_manifest(served(run).index)
    assert facts["recall_measured_on"] == made.recall_measured_on
    bundle = load_bundle(RunFolder(run).bundle)
    table = load_embeddings(RunFolder(run).item_embeddings)
    found = held_out_interests(bundle, table, read_manifest(run)["data"])
    loaded = Retriever.load(run)
    rows, _ = loaded.index.search(found[3:4], 5)
    history = [HistoryItem("i3", "mug", NOW), HistoryItem("i21", None, NOW)]
    answer = loaded.recall(tiny_run.THINGS[3], history, 5)
    assert [loaded.index.item_ids[row] for row in rows[0]] == [i.item_id for i in answer.items]


def test_without_the_data_item_vectors_measure_and_the_manifest_says_why(tmp_path: Path) -> None:
    run = tiny_run.write_run(tmp_path)
    made = index_run(run, ScalarQuantised())
    assert made.recall_measured_on.startswith("40 item vectors (--data: ")
    assert "does not exist" in made.recall_measured_on
    with pytest.raises(InputError, match="--data"):
        index_run(run, ScalarQuantised(), data=str(tmp_path / "nowhere"))


def test_a_build_under_its_promise_fails_and_the_old_index_stays(
    run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = read_manifest(served(run).index)
    poor = InvertedLists(num_lists=1, num_probes=1)
    with pytest.raises(InputError, match=r"--min-recall: 1\.5 must lie"):
        index_run(run, poor, min_recall=1.5)
    monkeypatch.setattr("karma_ray.retrieval.index.measured_recalls", lambda *_: {200: 0.4})
    monkeypatch.setattr("karma_ray.retrieval.index_recall.measured_recalls", lambda *_: {200: 0.4})
    with pytest.raises(InputError, match=r"recall@200 .* 0\.400 on 30 vectors.*num_probes=2"):
        index_run(run, poor)
    assert read_manifest(served(run).index) == before
    Retriever.load(run)
    # A choice that nobody typed gives way to exact search.
    monkeypatch.setattr(index_build, "chosen_kind", lambda *_: Graph())
    assert index_run(run).kind == "flat"


def test_the_size_decides_unless_told(run: str) -> None:
    assert index_run(run).kind == "flat"
    assert index_run(run, Graph()).kind == "hnsw"
    assert index_run(run, num_shards=3).num_shards == 3
    assert Retriever.load(run).index.num_shards == 3
    with pytest.raises(InputError, match="--shards: 41 must lie between 1 and 40"):
        index_run(run, num_shards=41)
