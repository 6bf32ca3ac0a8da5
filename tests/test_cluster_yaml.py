"""cluster.yaml offline: Ray's own schema, and Ray's AWS provider against a stand-in for AWS (moto).

The rights of deploy/*.json and the choice between spot and on demand are held here too.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
WORKERS = ("gpu_spot", "gpu_on_demand", "cpu_spot", "cpu_on_demand")


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
    assert set(prepared["available_node_types"]) == {"head", *WORKERS}


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


@pytest.mark.parametrize("token", [None, "open sesame"])
def test_nodes_know_the_endpoints_token_if_its_file_is_there(
    cluster, tmp_path: Path, token: str | None
) -> None:
    (tmp_path / "ray").write_text('#!/bin/sh\necho "${KARMA_RAY_TOKEN-none}"\n')
    (tmp_path / "ray").chmod(0o700)
    if token is not None:
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "endpoint_token").write_text(f"{token}\n")
    said = [
        subprocess.run(
            ["bash", "-c", command], capture_output=True, text=True, check=True,
            env={"HOME": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        ).stdout
        for key in ("head_start_ray_commands", "worker_start_ray_commands")
        for command in cluster[key]
        if "ray start" in command
    ]  # fmt: skip
    assert said == [f"{token or 'none'}\n"] * 2


def test_the_file_holds_no_credentials(text) -> None:
    lowered = text.lower()
    assert not [
        word
        for word in ("aws_secret", "access_key", "secret_key", "akia", "private_key", "password")
        if word in lowered
    ]


def test_the_images_run_the_pinned_ray(cluster) -> None:
    pinned = next(
        line.removeprefix("ray==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line.startswith("ray==")
    )
    images = [cluster["docker"]["image"]] + [
        kind["docker"]["worker_image"]
        for kind in cluster["available_node_types"].values()
        if "docker" in kind
    ]
    assert len(images) == 3
    assert all(f":{pinned}-" in image for image in images)


@pytest.fixture
def aws(tmp_path, monkeypatch) -> Iterator[None]:
    """An empty account with the two instance profiles of docs/cluster.md."""
    import boto3
    from moto import mock_aws

    monkeypatch.setenv("HOME", str(tmp_path))  # Ray writes its SSH key there
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    with mock_aws():
        iam = boto3.client("iam", region_name="us-west-2")
        for name in ("karma-ray-head", "karma-ray-worker"):
            iam.create_instance_profile(InstanceProfileName=name)
        yield


def test_nodes_offer_what_their_machines_have(aws, cluster) -> None:
    """Only the head offers less: nothing, so that no work runs beside the cluster's control."""
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    bare = copy.deepcopy(cluster)
    for kind in bare["available_node_types"].values():
        kind["resources"] = {}
    filled = AWSNodeProvider.fillout_available_node_types_resources(bare)
    for name in WORKERS:
        offered = cluster["available_node_types"][name]["resources"]
        there = filled["available_node_types"][name]["resources"]
        assert offered == {unit: there[unit] for unit in ("CPU", "GPU") if unit in there}
    assert cluster["available_node_types"]["head"]["resources"] == {"CPU": 0}


def test_every_machine_has_rights_a_disk_and_an_image_and_workers_may_be_spot(aws, cluster) -> None:
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    config = AWSNodeProvider.bootstrap_config(cluster)
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    for name, kind in config["available_node_types"].items():
        (machine,) = provider.create_node(kind["node_config"], {}, 1).values()
        profile = machine.iam_instance_profile["Arn"].rsplit("/", 1)[-1]
        assert profile == ("karma-ray-head" if name == "head" else "karma-ray-worker")
        assert machine.instance_lifecycle == ("spot" if name.endswith("spot") else None)
        assert machine.image_id.startswith("resolve:ssm:/aws/service/deeplearning/")
        (disk,) = list(machine.volumes.all())
        assert (disk.size, disk.volume_type) == (200, "gp3")


def test_every_container_gets_open_files_and_the_shared_memory_that_ray_computes(cluster) -> None:
    options = " ".join(cluster["docker"]["run_options"])
    assert "--ulimit nofile=65536" in options
    assert "--shm-size" not in options and "disable_shm_size_detection" not in cluster["docker"]


def test_a_refused_spot_machine_is_replaced_by_one_on_demand(cluster) -> None:
    """Ray's own planning, with the scorer that cluster.yaml names."""
    from ray.autoscaler._private.loader import load_function_or_class
    from ray.autoscaler._private.node_provider_availability_tracker import (
        NodeProviderAvailabilityTracker,
    )
    from ray.autoscaler._private.resource_demand_scheduler import get_nodes_for
    from ray.autoscaler.node_launch_exception import NodeLaunchException

    (start,) = (line for line in cluster["head_start_ray_commands"] if "--head" in line)
    settings = dict(word.split("=", 1) for word in start.split() if "=" in word)
    assert settings["RAY_enable_autoscaler_v2"] == "0"
    scorer = load_function_or_class(settings["RAY_AUTOSCALER_UTILIZATION_SCORER"])
    tracker = NodeProviderAvailabilityTracker()

    def started(*demands: dict[str, float]) -> dict[str, int]:
        def score(*arguments: Any) -> Any:
            return scorer(*arguments, node_availability_summary=tracker.summary())

        types = cluster["available_node_types"]
        nodes, left = get_nodes_for(types, {}, "head", 12, list(demands), score)
        assert not left
        return dict(nodes)

    gpu, cpu = {"GPU": 1.0, "CPU": 1.0}, {"CPU": 4.0}
    assert started(*[gpu] * 4) == {"gpu_spot": 4}
    assert started(*[cpu] * 5) == {"cpu_spot": 2}
    refused = NodeLaunchException("InsufficientInstanceCapacity", "no spot", None)
    tracker.update_node_availability("gpu_spot", 2**40, refused)
    assert started(*[gpu] * 4) == {"gpu_on_demand": 4}
    assert started(*[cpu] * 5) == {"cpu_spot": 2}


def policy(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((ROOT / "deploy" / name).read_text())["Statement"]
    return found


def test_workers_reach_two_prefixes_of_one_bucket_and_nothing_else() -> None:
    for statement in policy("aws-policy.json"):
        named = statement["Action"]
        actions = [named] if isinstance(named, str) else named
        assert statement["Effect"] == "Allow"
        assert all(action.startswith("s3:") and "*" not in action for action in actions)
        if actions == ["s3:ListBucket"]:
            assert statement["Resource"] == "arn:aws:s3:::BUCKET"
            allowed = statement["Condition"]["StringLike"]["s3:prefix"]
            assert set(allowed) == {"data", "data/*", "runs", "runs/*"}
        else:
            assert statement["Resource"] == [
                "arn:aws:s3:::BUCKET/data/*", "arn:aws:s3:::BUCKET/runs/*",
            ]  # fmt: skip


def test_the_head_may_start_machines_and_end_only_those_of_its_cluster(cluster) -> None:
    by_name = {statement["Sid"]: statement for statement in policy("aws-head-policy.json")}
    ends = by_name["EndMachinesOfThisCluster"]
    tag = ends["Condition"]["StringEquals"]["ec2:ResourceTag/ray-cluster-name"]
    assert tag == cluster["cluster_name"]
    assert by_name["GiveWorkersTheirRole"]["Resource"].endswith(":role/karma-ray-worker")
    assert not [name for name, found in by_name.items() if "*" in "".join(found["Action"])]
