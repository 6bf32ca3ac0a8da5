"""What Ray Train starts for a training, and what its controller needs to know."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from ray import cloudpickle

from karma_ray.cluster.backend import Collectives
from karma_ray.cluster.training import _Trainer

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import sys
from ray import cloudpickle
found = cloudpickle.loads(sys.stdin.buffer.read())
print(found.timeout_s, found.backend_cls.__name__, "transformers" in sys.modules)
"""


def test_the_controller_does_not_load_the_model() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], input=cloudpickle.dumps(Collectives(timeout_s=7)),
        capture_output=True, check=True, cwd=ROOT,
    )  # fmt: skip
    assert done.stdout.split() == [b"7", b"_Backend", b"False"]


def test_no_process_is_started_for_datasets_that_training_does_not_have() -> None:
    names = [type(one).__name__ for one in _Trainer(lambda: None)._create_default_callbacks()]
    assert "BackendSetupCallback" in names and "DatasetsCallback" not in names
