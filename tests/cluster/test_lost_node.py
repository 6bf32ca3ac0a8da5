"""A machine of the cluster is lost: an elastic training goes on with what is left."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from karma_ray.cluster.training import run_training
from tests.cluster import driver, nodes
from tests.cluster import test_training as small


def _workers(run: Path) -> list[int]:
    return [int(line) for line in Path(f"{run}.workers").read_text().split()]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.fault
def test_an_elastic_training_goes_on_without_a_lost_machine(tmp_path: Path) -> None:
    rows = small.write_rows(tmp_path)
    run_training(driver.job(str(tmp_path / "whole"), rows, 0), progress=False)
    whole = small._losses(tmp_path / "whole")
    address = f"127.0.0.1:{(port := nodes.free_port())}"
    run = tmp_path / "cut"
    environment = {**os.environ, "RAY_ADDRESS": address, "RAY_AUTH_MODE": "disabled"}
    os.environ["RAY_AUTH_MODE"] = "disabled"
    try:
        with (
            nodes.short_folder() as temp,
            nodes.node(tmp_path / "head.log", *nodes.as_head(port, temp)) as head,
        ):
            nodes.wait(lambda: socket.create_connection(("127.0.0.1", port), 1).close() is None,
                       head, 60, "the head starts")  # fmt: skip
            with nodes.node(log := tmp_path / "node.log", "--address", address) as other:
                nodes.wait(lambda: nodes.started(log), other, 60, "the node joins")
                command = [sys.executable, "-m", "tests.cluster.driver", str(run), rows, "2",
                           "--elastic"]  # fmt: skip
                training = subprocess.Popen(command, cwd=nodes.ROOT, env=environment)
                try:
                    nodes.wait(lambda: max(small._losses(run), default=0) >= 12, training, 180,
                               "step 12")  # fmt: skip
                    assert _workers(run)[-1] == 2
                    nodes.kill(other)
                    assert training.wait(300) == 0
                finally:
                    training.kill()
    finally:
        os.environ.pop("RAY_AUTH_MODE", None)
    found = small._losses(run)
    assert list(found) == list(whole)
    assert list(found.values()) == pytest.approx(list(whole.values()), rel=1e-4, abs=1e-6)
    assert _workers(run)[-1] == 1
