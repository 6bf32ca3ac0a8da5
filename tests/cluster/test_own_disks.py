"""Whole jobs on machines that share no disk, with an S3 store between them; one of them is lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from karma_ray.artifacts import exists, join, read_json, read_lines, read_manifest
from karma_ray.data.event_parts import Sizes, list_parts
from karma_ray.data.prepared import PreparedData
from karma_ray.data.visual import features_uri
from karma_ray.retrieval.parts import embedded
from tests.cluster import nodes
from tests.cluster.own_disks import (
    COPIES,
    DATA,
    LARGE,
    RUN,
    SEARCH,
    STEPS,
    embed_again,
    fill_store,
    fill_with_large_log,
    pooled_features,
    prepare_large_log,
    search,
    train_while_one_is_lost,
    two_machines,
)
from tests.cluster.stores import running_store


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.fault
def test_jobs_complete_on_machines_that_share_no_disk_though_one_is_lost(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes.need_own_disks()
    runs = nodes.ROOT / "runs"
    hidden = [tmp_path_factory.getbasetemp(), *([runs] if runs.is_dir() else [])]
    with running_store(monkeypatch) as store, nodes.short_folder() as disk:
        fill_store(tmp_path / "shop")
        fill_with_large_log(tmp_path / "shop")
        with two_machines(tmp_path, disk, hidden, store.environment) as machines:
            head, lost = "127.0.0.1", "127.0.0.2"
            new = train_while_one_is_lost(machines, head, lost)
            for name in (head, new):  # each has read the items and the start, once
                (kept,) = machines.disk(name).glob("karma_ray-node-*")
                assert len(list(kept.glob("*.arrow"))) == 1
                assert len(list(kept.glob("copies/*/final/model.safetensors"))) >= 1
            _check_run(lost, new)
            trained = read_json(join(RUN, "metrics.json"))
            machines.run(new, "jobs/evaluate.py", RUN)
            assert read_json(join(RUN, "metrics.json"))["HR@50"] == trained["HR@50"]
            search(machines, head)
            pooled_features(machines, head)
            embed_again(machines, head)
            prepare_large_log(machines, head)
        assert len(read_json(join(SEARCH, "trials.json"))["trials"]) == 2
        assert read_json(join(SEARCH, "best.json"))["recipe"] == "toy"
        features = read_manifest(features_uri(DATA), "visual_features")
        before, again = (
            read_manifest(folder) for folder in (join(RUN, "item_embeddings"), embedded(RUN)[0])
        )
        assert features["parents"]["items"] == before["parents"]["items"]
        assert before["parents"] == again["parents"] and again["encoded"] == 240
        assert [facts["made"]["precision"] for facts in (before, again)] == ["float32", "bfloat16"]
        _check_large_log()
        assert (features["num_tokens"], features["num_items"]) == (1, 240)
    for event in machines.timeline:
        print(json.dumps(event))


def _check_large_log() -> None:
    """One process would not have prepared it alone, and every copy of a user is as the user is."""
    parts = list_parts(join(LARGE, "events"), Sizes())
    assert sum(part.cells for part in parts) > Sizes().here_cells and len(parts) > 2
    small, large = (PreparedData.load(uri).facts["counts"] for uri in (DATA, LARGE))
    for name in ("users", "event_rows", "clicks", "windows", "test_examples"):
        assert large[name] == COPIES * small[name], name


def _check_run(lost: str, new: str) -> None:
    """No step is missing, and the new workers went on from a checkpoint."""
    lines = list(read_lines(join(RUN, "metrics.jsonl")))
    assert {line["stage"] for line in lines} == {"pretrain", "warmup", "joint", "valid"}
    joint = [line["step"] for line in lines if line["stage"] == "joint"]
    assert joint == list(range(10, STEPS + 1, 10))
    first, *_, last = read_lines(join(RUN, "starts.jsonl"))
    # Of the head Ray tells an outer address.
    assert first["step"] == 0 and lost in first["machines"] and new not in first["machines"]
    assert last["step"] > 0 and new in last["machines"] and lost not in last["machines"]
    assert len(set(first["machines"])) == len(set(last["machines"])) == 2
    assert exists(join(RUN, "report", "report.html"))
