"""The endpoint gives test requests the scores and ranks that evaluation recorded for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from fastapi.testclient import TestClient

from karma_ray.artifacts import RunFolder, join, read_bytes, read_manifest, write_table
from karma_ray.config import Config
from karma_ray.data.prepared import PreparedData
from karma_ray.data.schema import EXAMPLES
from karma_ray.evaluation.outcomes import FILES, Outcomes
from karma_ray.retrieval.blend_fit import Gathered
from karma_ray.retrieval.blended import load_blended
from karma_ray.retrieval.parts import served
from karma_ray.retrieval.retriever import Retriever
from karma_ray.runs.evaluator import Evaluator
from karma_ray.serving.app import build_app
from karma_ray.serving.service import Service
from tests import tiny_run
from tests.retrieval import channel_run

LIMIT = tiny_run.COLLATE.max_history
IDS = [f"i{n}" for n in range(40)]


def clicks() -> pa.Table:
    """Eight clicks after each number of earlier ones that the endpoint reads whole."""
    rows, rng = channel_run.examples(3, 8 * (LIMIT + 1)).to_pylist(), np.random.default_rng(4)
    for number, row in enumerate(rows):
        past = [channel_run.click(rng, number % 5) for _ in range(number % (LIMIT + 1))]
        row["history_queries"] = [query for query, _ in past]
        row["history_item_ids"] = [item for _, item in past]
        row["history_timestamps"] = [None] * len(past)
    return pa.Table.from_pylist(rows, schema=EXAMPLES)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> str:
    root = tmp_path_factory.mktemp("skew")
    run = channel_run.write_run(root)
    write_table(clicks(), join(str(root / "data"), "examples", "split=test"))
    return run


@pytest.fixture(scope="module", params=["dense", "blend"])
def client(request, run: str) -> Iterator[tuple[str, TestClient]]:
    with TestClient(build_app(Service.load(run, channels=request.param))) as found:
        yield request.param, found


@pytest.fixture(scope="module")
def evaluator(run: str) -> Evaluator:
    return Evaluator(Config(), PreparedData.load(read_manifest(run)["data"]))


def bodies(evaluator: Evaluator) -> list[dict[str, Any]]:
    """The test requests as a caller sends them."""
    return [
        {
            "query": row["query"],
            "history": [
                {"item_id": item, "query": query}
                for item, query in zip(row["history_item_ids"], row["history_queries"], strict=True)
            ],
        }
        for row in evaluator.source.examples("test").to_pylist()
    ]


def test_scores_are_those_that_evaluation_ranks_by(client, evaluator, run: str) -> None:
    _, asked = client
    examples = evaluator.source.examples("test")
    offline = Retriever.load(run, evaluator.source.items_uri)
    folder = RunFolder(run).path("outcomes")
    evaluator.both_splits(offline, folder)
    recorded = Outcomes.unpacked(*(read_bytes(join(folder, name)) for name in FILES)).rank
    measured = offline.score(examples)
    assert {len(body["history"]) for body in bodies(evaluator)} == set(range(LIMIT + 1))
    for number, body in enumerate(bodies(evaluator)):
        answer = asked.post("/v1/score", json={**body, "item_ids": IDS}).json()["scores"]
        assert answer == pytest.approx(measured[number][evaluator.catalog.rows(IDS)], abs=1e-4)
        target = answer[IDS.index(examples.column("positive_item_id")[number].as_py())]
        assert sum(score >= target for score in answer) == recorded[number]


def test_recall_has_its_targets_where_evaluation_found_them(client, evaluator, run: str) -> None:
    lists, asked = client
    examples = evaluator.source.examples("test")
    offline = Retriever.load(run, evaluator.source.items_uri)
    search = load_blended(served(run), offline)
    recorded = Gathered.of(offline, search.channels, examples).ranks(search.blend)
    if lists == "dense":
        recorded = evaluator.detailed(offline, examples).details.ranks
    differ = 0
    for number, body in enumerate(bodies(evaluator)):
        found = asked.post("/v1/recall", json={**body, "k": 40}).json()["items"]
        ids = [item["item_id"] for item in found]
        target = examples.column("positive_item_id")[number].as_py()
        assert ids.index(target) + 1 == recorded[number]
        scores = asked.post("/v1/score", json={**body, "item_ids": ids}).json()["scores"]
        differ += scores != pytest.approx([item["score"] for item in found], abs=1e-4)
    assert (differ > 0) == (lists == "blend")  # recall sorts by the blend's scores there
