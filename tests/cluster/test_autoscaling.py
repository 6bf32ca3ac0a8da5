"""A cluster with Ray's autoscaler and its fake nodes grows for GPUs, and shrinks afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

from karma_ray.cluster.supply import NodeType, declared_types
from karma_ray.retrieval.encode import load_embeddings
from tests import tiny_run
from tests.cluster.nodes import ROOT, as_head, free_port, node, short_folder

EMPTY_LISTS = (
    "initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands",
    "head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files",
    "rsync_exclude", "rsync_filter",
)  # fmt: skip


def cluster_file(address: str) -> dict[str, Any]:
    """A CPU head, and up to two nodes with a GPU in name only, which leave after three seconds."""
    return {
        "cluster_name": "fake", "max_workers": 2, "upscaling_speed": 1.0,
        "idle_timeout_minutes": 0.05, "auth": {"ssh_user": "nobody"}, "docker": {},
        # Nodes are processes of this machine: there is nothing to set up over SSH, and as all have
        # the same address they are told apart by their ids; otherwise none is ever known as idle.
        "provider": {"type": "fake_multinode", "gcs_address": address,
                     "disable_node_updaters": True, "use_node_id_as_ip": True},
        "file_mounts": {}, "file_mounts_sync_continuously": False,
        **{name: [] for name in EMPTY_LISTS},
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 2}, "node_config": {}, "max_workers": 0},
            "gpu": {"resources": {"CPU": 1, "GPU": 1}, "node_config": {}, "min_workers": 0,
                    "max_workers": 2},
        },
    }  # fmt: skip


def test_the_head_counts_once_whatever_its_number_of_workers() -> None:
    types, most = declared_types(cluster_file("127.0.0.1:1"))
    assert types == [NodeType({"CPU": 2.0}, 1), NodeType({"CPU": 1.0, "GPU": 1.0}, 2)]
    assert most == 3


@pytest.mark.ray
@pytest.mark.slow
def test_training_embedding_and_a_search_make_the_cluster_grow_and_it_shrinks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_run.write_data(tmp_path)
    run = tiny_run.write_run(tmp_path)
    port = free_port()
    address = f"127.0.0.1:{port}"
    config = tmp_path / "cluster.json"
    cluster = cluster_file(address)
    cluster["provider"] |= {"type": "external", "module": "tests.cluster.clouds.SlowProvider"}
    config.write_text(json.dumps(cluster))
    for name, value in (
        ("RAY_AUTH_MODE", "disabled"), ("RAY_FAKE_CLUSTER", "1"), ("PYTHONPATH", str(ROOT)),
        ("AUTOSCALER_UPDATE_INTERVAL_S", "1"), ("RAY_ADDRESS", address),
        ("RAY_OVERRIDE_NODE_ID_FOR_TESTING", FAKE_HEAD_NODE_ID),
    ):  # fmt: skip
        monkeypatch.setenv(name, value)
    with (
        short_folder() as temp,
        node(
            tmp_path / "head.log", *as_head(port, temp), "--autoscaling-config", str(config)
        ),
    ):  # fmt: skip
        wait = ["-c", f"import ray; ray.init('{address}')"]
        for _ in range(20):
            if subprocess.run([sys.executable, *wait], capture_output=True).returncode == 0:
                break
        done = subprocess.run(
            [sys.executable, "-m", "tests.cluster.growing", tmp_path, run, tmp_path / "data"],
            cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True, text=True, timeout=500,
        )  # fmt: skip
        log = "".join(
            path.read_text()[-3000:] for path in temp.glob("session_latest/logs/monitor*")
        )
    assert done.returncode == 0, done.stderr + log
    assert "training on 1 GPU: none are up, the autoscaler may add up to 2" in done.stderr
    assert "embedding 40 items with 1 encoder on GPUs: none are up" in done.stderr
    assert "waiting for 1 GPU: 0 in the cluster" in done.stderr
    assert "trials: waiting for 1 GPU: 0 in the cluster" in done.stderr
    for name in ("worker-0.json", "trial.json"):
        assert json.loads((tmp_path / name).read_text())["gpus"]
    assert load_embeddings(str(tmp_path / "embedded")).num_items == 40
    seen = [line.split() for line in (tmp_path / "seen").read_text().splitlines()]
    assert seen == [
        ["before", "0"], ["trained", "1"], ["idle", "0"], ["embedded", "1"], ["idle", "0"],
        ["searched", "1"], ["idle", "0"],
    ], log  # fmt: skip
