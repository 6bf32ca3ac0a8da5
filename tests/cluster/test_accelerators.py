"""GPUs in name only: they are asked for, given, and said to be what they are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from karma_ray.retrieval.encode import load_embeddings
from tests import tiny_run
from tests.conftest import ROOT


@pytest.mark.slow
@pytest.mark.ray
def test_gpus_are_given_to_workers_which_compute_on_cpus_if_cuda_is_absent(tmp_path: Path) -> None:
    tiny_run.write_data(tmp_path)
    run = tiny_run.write_run(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "tests.cluster.fake_gpus", tmp_path, run, tmp_path / "data"],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "0,1"},
        capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    workers = [json.loads((tmp_path / f"worker-{n}.json").read_text()) for n in (0, 1)]
    assert sorted(gpu for worker in workers for gpu in worker["gpus"]) == ["0", "1"]
    assert {(w["backend"], w["device"]) for w in workers} == {("gloo", "cpu")}
    assert load_embeddings(str(tmp_path / "embedded")).num_items == 40
    assert load_embeddings(str(tmp_path / "embedded_on_cpus")).num_items == 40
    for sentence in (
        "training on 2 GPUs: 2 are up, the autoscaler may add none",
        "joint: a GPU was assigned, but its process finds no CUDA: computing on the CPU",
        "embedding 40 items with 2 encoders on GPUs: 2 are up",
        "embedding 40 items with 3 encoders on CPUs: training.use_gpu is false",
        "evaluating on a GPU of the cluster",
        "evaluation: waiting for 1 GPU: 2 in the cluster, 0 of them free",
        "a task: waiting for 3 GPUs: 2 in the cluster, 2 of them free",
    ):
        assert sentence in done.stderr
