"""cluster.yaml against Ray's own schema, offline: what `ray up` checks before it calls AWS."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def text() -> str:
    return (ROOT / "cluster.yaml").read_text(encoding="utf-8")


@pytest.fixture
def cluster(text: str) -> dict[str, Any]:
    return yaml.safe_load(text)


def check(cluster: dict[str, Any]) -> dict[str, Any]:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(copy.deepcopy(cluster))
    validate_config(prepared)
    return prepared


def test_ray_accepts_the_cluster(cluster) -> None:
    prepared = check(cluster)
    assert prepared["cluster_name"] == "karma-ray"
    assert set(prepared["available_node_types"]) == {"head", "gpu_worker", "cpu_worker"}


def test_an_unknown_key_is_rejected(cluster) -> None:
    with pytest.raises(Exception, match="max_wrokers"):
        check({**cluster, "max_wrokers": 3})


def test_a_wrong_type_is_rejected(cluster) -> None:
    with pytest.raises(Exception, match="many"):
        check({**cluster, "max_workers": "many"})


def test_a_head_type_that_does_not_exist_is_rejected(cluster) -> None:
    with pytest.raises(ValueError, match="head_node_type"):
        check({**cluster, "head_node_type": "brain"})


def test_workers_come_and_go_within_the_cluster_bound(cluster) -> None:
    workers = {
        name: kind for name, kind in cluster["available_node_types"].items() if name != "head"
    }
    for kind in workers.values():
        assert kind["min_workers"] == 0
        assert 0 < kind["max_workers"] <= cluster["max_workers"]
    assert cluster["idle_timeout_minutes"] > 0


def test_nothing_listens_on_a_public_interface_and_every_call_carries_the_token(
    cluster, text
) -> None:
    assert "0.0.0.0" not in text
    starts = [
        command
        for key in ("head_start_ray_commands", "worker_start_ray_commands")
        for command in cluster[key]
        if "ray start" in command
    ]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in command for command in starts)
    assert any("--dashboard-host=127.0.0.1" in command for command in starts)


def test_the_file_holds_no_credentials(text) -> None:
    lowered = text.lower()
    assert not [
        word
        for word in ("aws_secret", "access_key", "secret_key", "akia", "private_key", "password")
        if word in lowered
    ]


def test_the_image_runs_the_pinned_ray(cluster) -> None:
    pinned = next(
        line.removeprefix("ray==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line.startswith("ray==")
    )
    assert f":{pinned}-" in cluster["docker"]["image"]
