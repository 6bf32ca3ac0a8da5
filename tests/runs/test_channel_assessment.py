"""What a run records of its lists of recall, and what its report says of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from karma_ray.artifacts import RunFolder, read_json, read_manifest, write_json
from karma_ray.baselines.floors import build_floor
from karma_ray.config import Config
from karma_ray.data.prepared import PreparedData
from karma_ray.report.channel_table import list_rows, screen_lines, verdict_of_lists
from karma_ray.report.record import read_run
from karma_ray.retrieval.parts import channels_of, served
from karma_ray.retrieval.retriever import Retriever
from karma_ray.runs.assessment import Evaluator
from karma_ray.runs.channel_assessment import FILE, channel_metrics
from karma_ray.runs.floor_metrics import FloorFile, floor_metrics
from tests.retrieval import channel_run


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> tuple[str, Evaluator, dict[str, float]]:
    root = tmp_path_factory.mktemp("lists")
    run = channel_run.write_run(root)
    data = PreparedData.load(read_manifest(run)["data"])
    evaluator = Evaluator(Config(), data)
    retriever = Retriever.load(run, data.items_uri)
    found = channel_metrics(evaluator, retriever, run, RunFolder(run), str(root / "cache"))
    write_json(found, RunFolder(run).metrics)
    return run, evaluator, found


def test_every_list_has_its_rates_and_what_it_adds(measured) -> None:
    _, _, found = measured
    for name in ("dense", "bm25", "affinity", "popularity"):
        assert {f"channel/{name}/{part}@{k}" for part in ("HR", "increment") for k in (10, 50, 200)
                } <= set(found)  # fmt: skip
    assert found["blend/num_test"] == 60 and found["blend/HR@10"] > found["channel/dense/HR@10"]
    assert found["blend/HR@50"] == 100.0 == found["channel/popularity/HR@50"]  # of 40 items


def test_a_channel_has_the_rate_of_its_floor(measured) -> None:
    _, evaluator, found = measured
    floor = build_floor("query_filter_popular", evaluator.source)
    rates = evaluator(floor, evaluator.source.examples("test"))
    # Items clicked equally often are in the order of rows, and count against a floor.
    assert found["channel/popularity/HR@10"] >= rates["HR@10"]


def test_the_blend_stands_beside_every_list_and_floor_with_intervals(measured) -> None:
    run, _, _ = measured
    rows = {(row["role"], row["name"]): row for row in read_json(RunFolder(run).path(FILE))["rows"]}
    floors = {name for role, name in rows if role == "floor"}
    assert floors == {"popularity", "tfidf", "query_filter"}
    for (role, _), row in rows.items():
        if role != "blend":
            gain, low, high = row["gain@10"]
            assert low <= gain <= high
            assert gain == pytest.approx(rows["blend", "blend"]["HR@10"] - row["HR@10"])


def test_ranks_that_are_kept_with_the_metrics_of_floors_are_those_of_a_measurement(
    measured, tmp_path: Path
) -> None:
    run, evaluator, found = measured
    known = FloorFile.of(evaluator, str(tmp_path))
    assert known.ranks("tfidf") is None
    floor_metrics(evaluator, str(tmp_path), known)
    ranker = build_floor("tfidf", evaluator.source)
    ranks = evaluator.detailed(ranker, evaluator.source.examples("test")).details.ranks
    kept = known.ranks("tfidf")
    assert kept is not None and np.array_equal(kept, ranks)
    retriever = Retriever.load(run, evaluator.source.items_uri)
    folder = RunFolder(str(tmp_path))
    assert channel_metrics(evaluator, retriever, run, folder, str(tmp_path), known) == found
    assert read_json(folder.path(FILE)) == read_json(RunFolder(run).path(FILE))


def test_the_report_shows_the_lists(measured) -> None:
    record = read_run(measured[0])
    assert [row.name for row in list_rows(record)[:2]] == ["blend", "dense (the model)"]
    lines = screen_lines(record)
    assert len(lines) == 7 and all(len(line) <= 100 for line in lines)
    assert "the blend answers unless --channels says otherwise" in verdict_of_lists(record)[0]
    assert "not above for certain: " in verdict_of_lists(record)[0]  # 50 of 40 items


def test_a_run_without_channels_says_nothing_of_lists(measured, tmp_path) -> None:
    run, evaluator, _ = measured
    copy = str(shutil.copytree(run, tmp_path / "run"))
    shutil.rmtree(channels_of(served(copy)))
    (tmp_path / "run" / FILE).unlink()
    retriever = Retriever.load(copy, evaluator.source.items_uri)
    assert channel_metrics(evaluator, retriever, copy, RunFolder(copy), str(tmp_path)) == {}
    record = read_run(copy)
    assert screen_lines(record) == verdict_of_lists(record) == list_rows(record) == []
