"""Ray's autoscaler, started as cluster.yaml starts it, where the cloud has no spot machines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.cluster.nodes import ROOT, as_head, free_port, node, short_folder
from tests.cluster.test_autoscaling import cluster_file

ASKING = """
import ray
ray.init("{address}")

@ray.remote(num_gpus=1)
def where():
    return ray.get_runtime_context().get_node_id()

node = ray.get(where.remote(), timeout=200)
print("ran on", [n["Resources"] for n in ray.nodes() if n["NodeID"] == node][0])
"""


@pytest.mark.ray
@pytest.mark.slow
def test_work_gets_a_machine_on_demand_where_spot_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    address = f"127.0.0.1:{port}"
    cluster = cluster_file(address)
    gpu = cluster["available_node_types"].pop("gpu")
    for name in ("gpu_spot", "gpu_on_demand"):
        kind = {**gpu, "resources": {**gpu["resources"]}}
        cluster["available_node_types"][name] = kind
    cluster["provider"] |= {"type": "external", "module": "tests.cluster.clouds.RefusingProvider"}
    config = tmp_path / "cluster.json"
    config.write_text(json.dumps(cluster))
    (start,) = (
        line
        for line in yaml.safe_load((ROOT / "cluster.yaml").read_text())["head_start_ray_commands"]
        if "--head" in line
    )
    for word in start.split():
        name, is_setting, value = word.partition("=")
        if is_setting and name in ("RAY_enable_autoscaler_v2", "RAY_AUTOSCALER_UTILIZATION_SCORER"):
            monkeypatch.setenv(name, value)
    for name, value in (
        ("RAY_AUTH_MODE", "disabled"), ("RAY_FAKE_CLUSTER", "1"), ("PYTHONPATH", str(ROOT)),
        ("AUTOSCALER_UPDATE_INTERVAL_S", "1"),
    ):  # fmt: skip
        monkeypatch.setenv(name, value)
    with (
        short_folder() as temp,
        node(
            tmp_path / "head.log", *as_head(port, temp), "--autoscaling-config", str(config)
        ),
    ):  # fmt: skip
        code = ASKING.format(address=address)
        for _ in range(5):  # until the head is up
            done = subprocess.run(
                [sys.executable, "-c", code], env=dict(os.environ), capture_output=True,
                text=True, timeout=300,
            )  # fmt: skip
            if done.returncode == 0:
                break
        log = "".join(p.read_text() for p in temp.glob("session_latest/logs/monitor*"))
    assert "ran on" in done.stdout, done.stderr[-2000:] + log[-3000:]
    assert "gpu_spot" in log and "InsufficientInstanceCapacity" in log
    assert log.index("gpu_spot") < log.rindex("gpu_on_demand")
