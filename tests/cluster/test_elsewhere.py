"""What the cluster computes for the driver looks as if the driver had computed it."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from karma_ray.cluster.elsewhere import run_elsewhere
from karma_ray.errors import InputError, KarmaRayError

# Functions are defined in the tests: a worker cannot import a test module, but unpickles a closure.


@pytest.mark.ray
def test_its_process_is_another_with_resources_of_the_cluster_and_is_heard_here(
    ray_cluster: None,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def note() -> None:
        import logging
        import sys

        import ray

        given = ray.get_runtime_context().get_assigned_resources()
        Path("noted").write_text(f"{os.getpid()} {given['CPU']:g}")  # a path of the driver
        logging.getLogger("karma_ray.somewhere").info("step %d", 3)
        sys.stderr.write("\r50 %")

    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.INFO):
        run_elsewhere("noting", note, 2.0, 0.0)
    process, cpus = Path("noted").read_text().split()
    assert int(process) != os.getpid() and cpus == "2"
    assert ("karma_ray.somewhere", logging.INFO, "step 3") in caplog.record_tuples
    assert "\r50 %" in capsys.readouterr().err


@pytest.mark.ray
def test_its_errors_are_those_of_a_call(ray_cluster: None) -> None:
    def fail() -> None:
        raise InputError("METRIC", "valid/HR@7", choices=["HR@10"])

    with pytest.raises(InputError) as raised:
        run_elsewhere("failing", fail, 1.0, 0.0)
    assert type(raised.value) is InputError
    assert str(raised.value) == "METRIC: 'valid/HR@7' is not valid; choices: HR@10"


@pytest.mark.ray
def test_it_starts_again_where_its_process_was_lost(ray_cluster: None, tmp_path: Path) -> None:
    def lost_until(times: int) -> None:
        starts = tmp_path / f"starts-{times}"
        with starts.open("a") as file:
            file.write("x")
        if starts.stat().st_size < times:
            os._exit(1)

    run_elsewhere("losing", lambda: lost_until(2), 1.0, 0.0)
    assert (tmp_path / "starts-2").read_text() == "xx"
    with pytest.raises(KarmaRayError, match="losing: its process was lost"):
        run_elsewhere("losing", lambda: lost_until(9), 1.0, 0.0)
