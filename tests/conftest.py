"""What every test shares: a quiet environment, one local Ray per session, the shared data."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Read by Ray, OpenMP and tokenizers when they are first imported, so set before any of them.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # as in every local Ray of the package
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "MPLBACKEND": "Agg",
}
os.environ.update(ENVIRONMENT)
os.environ.pop("MLFLOW_TRACKING_URI", None)  # runs of tests are sent nowhere
# The workers of Ray and the jobs that tests start would each compile the whole package again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

import pytest


@pytest.fixture(scope="session", autouse=True)
def single_threaded_torch() -> None:
    """One thread: reproducible sums, and room for the cluster's workers on a small machine."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local Ray for the whole session: 8 logical CPUs, no dashboard, loopback only."""
    import ray

    ray.init(
        num_cpus=8,
        include_dashboard=False,
        object_store_memory=256 * 1024 * 1024,
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT), **ENVIRONMENT}},
        log_to_driver=False,
        logging_level="warning",
    )
    try:
        yield
    finally:
        ray.shutdown()


@pytest.fixture
def two_cpus(ray_cluster: None) -> Iterator[None]:
    """The cluster of the session while all but two of its CPUs are taken."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    taken = placement_group([{"CPU": ray.cluster_resources()["CPU"] - 2}])
    ray.get(taken.ready())
    try:
        yield
    finally:
        remove_placement_group(taken)


@pytest.fixture
def mlflow_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A tracking server of MLflow in a folder."""
    uri = f"file://{tmp_path / 'mlruns'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return uri


@pytest.fixture(scope="module")
def blank_pictures() -> Iterator[None]:
    """Reports of runs with a dot for each figure: drawing six takes longer than a few steps.

    `tests/report/` draws each of them, and `runs/test_pipeline.py` those of a whole run.
    """
    from PIL import Image

    from karma_ray.report import plots

    sink = io.BytesIO()
    Image.new("1", (1, 1)).save(sink, "PNG")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "png", lambda figure: sink.getvalue())
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of public datasets beside the project; the test skips where it is absent."""
    folder = Path(os.environ.get("KARMA_RAY_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no datasets at {folder}; set KARMA_RAY_SHARED_DATA to their folder")
    return folder
