"""`ray job submit` on a real local cluster: what a job says, how it ends, and how it is stopped.

benchmarks/every_job.py, whose cluster this is, submits every job.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.every_job import ROOT, LocalCluster, every_job, script_of, settings
from karma_ray.artifacts import read_lines
from karma_ray.data.synthetic.config import ToyShopConfig
from karma_ray.data.synthetic.shop import write_toy_shop
from tests.cluster.test_secrets import PLANTED, files_below, leaks

MORE = settings("training.num_workers=0", "training.steps=60", "training.checkpoint_every=5")


def steps(run: Path) -> list[int]:
    try:
        lines = list(read_lines(str(run / "metrics.jsonl")))
    except Exception:  # the last line is half written
        return []
    return [line["step"] for line in lines if line["stage"] == "joint"]


def wait_for(condition: Callable[[], Any], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.3)


def test_no_job_is_left_out() -> None:
    assert set(map(script_of, every_job("out"))) == {path.stem for path in ROOT.glob("jobs/*.py")}


@pytest.mark.ray
@pytest.mark.slow
def test_a_submitted_job_ends_with_its_screen_or_its_message_and_goes_on_after_a_stop(
    tmp_path: Path,
) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    write_toy_shop(str(data), ToyShopConfig(num_items=240, num_users=120))
    train = ("jobs/train.py", "--data", str(data), "--out", str(run), "--recipe", "karma_text")
    cluster = LocalCluster(tmp_path)
    cluster.environment.update(PLANTED)
    with cluster:
        with pytest.raises(urllib.error.HTTPError, match="401"):  # who has no token, is refused
            urllib.request.urlopen(f"{cluster.address}/api/jobs/", timeout=30)

        code, said = cluster.submit("mistake", *train, "--set", "training.stepps=3")
        assert (code, cluster.status("mistake")) == (1, "FAILED")
        assert "error: --set training: 'stepps' is not a known field" in said
        assert "Traceback" not in said

        cluster.submit("stopped", *train, *MORE, wait=False)
        stored = run / "checkpoints" / "joint"
        wait_for(lambda: list(stored.glob("step*")), 240, "the first checkpoint")
        assert cluster.ray("job", "stop", "stopped").returncode == 0
        assert cluster.status("stopped") == "STOPPED"
        assert not (run / "metrics.json").exists()

        code, said = cluster.submit("resumed", *train, *MORE, "--resume")
        assert (code, cluster.status("resumed")) == (0, "SUCCEEDED"), said
        _, told = cluster.submit("status", "jobs/status.py", str(run))
        assert f"{run}: finished, HR@50" in told and "x head, 4 CPU." in told
        assert told.rstrip().endswith("No other job runs.\nNothing is waited for."), told
        jobs = {"the list of jobs": cluster.ray("job", "list").stdout.encode()}
        assert leaks({**jobs, **files_below(tmp_path), **files_below(cluster.logs)}) == []
    screen = said[said.index("karma_text on toy_shop") :]
    assert "HR@50" in screen and screen.rstrip().endswith(f"jobs/serve.py {run}")
    assert steps(run) == list(range(2, 61, 2))
    assert json.loads((run / "metrics.json").read_text())["seconds"] > 0
