"""Runs in MLflow: parameters, curves, final metrics, report and bundle.

A finished or failed run is sent from its folder, in one place, so the runs of jobs, searches and
studies are all sent, with or without Ray. It is done if MLFLOW_TRACKING_URI is set; the package
(mlflow or mlflow-skinny) is no dependency. Server, user and experiment are set by MLflow's own
variables. No failure here ends a run.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from importlib.util import find_spec
from itertools import islice
from typing import Any, Concatenate, ParamSpec

from karma_ray.artifacts import (
    RunFolder,
    absolute,
    exists,
    open_filesystem,
    read_json,
    read_lines,
    write_json,
)
from karma_ray.config import flattened
from karma_ray.errors import InputError
from karma_ray.training.checkpoints.outage import reason, redacted

LOG = logging.getLogger(__name__)

P = ParamSpec("P")
Train = Callable[Concatenate[Any, str | None, str, P], dict[str, Any]]
"""(config, data, out, ...) -> metrics, as `train_run`."""

METRICS_A_REQUEST = 1000
PARAMS_A_REQUEST = 100
LONGEST_PARAM = 500
"""Characters of a parameter that every server keeps."""
PARTS = ("report", "bundle")
"""Folders that are sent."""


def tracked(train: Train[P]) -> Train[P]:
    """Send every run of `train` to MLflow, also one that fails or is interrupted."""

    @wraps(train)
    def run(
        config: Any, data: str | None, out: str, /, *args: P.args, **options: P.kwargs
    ) -> dict[str, Any]:
        try:
            metrics = train(config, data, out, *args, **options)
        except InputError:  # nothing ran, and the folder may be another run's
            raise
        except KeyboardInterrupt:
            send_run(absolute(out), "KILLED")
            raise
        except BaseException:
            send_run(absolute(out), "FAILED")
            raise
        send_run(absolute(out), "FINISHED")
        return metrics

    return run


def send_run(run: str, status: str) -> None:
    """Send a run folder if MLFLOW_TRACKING_URI is set; a run that was sent before is replaced."""
    if not os.environ.get("MLFLOW_TRACKING_URI") or not exists(RunFolder(run).config):
        return
    if find_spec("mlflow") is None:
        LOG.warning("MLFLOW_TRACKING_URI is set, but mlflow is not installed: the run is not sent")
        return
    try:
        _send(run, status)
    except Exception as error:  # of the server, or of the network
        LOG.warning("the run is not in MLflow: %s", reason(error))


def _send(run: str, status: str) -> None:
    from mlflow import MlflowClient
    from mlflow.entities import Param

    folder, client = RunFolder(run), MlflowClient()
    config = read_json(folder.config)
    noted = folder.path("mlflow.json")
    if exists(noted):
        client.delete_run(read_json(noted)["run_id"])
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "karma_ray")
    found = client.get_experiment_by_name(name)
    experiment = found.experiment_id if found else client.create_experiment(name)
    above, _, own = redacted(run).rstrip("/").rpartition("/")
    tags = {"folder": above, "recipe": str(config.get("recipe"))}
    identity = client.create_run(experiment, run_name=own, tags=tags).info.run_id
    write_json({"run_id": identity}, noted)
    params = [Param(name, str(value)[:LONGEST_PARAM]) for name, value in flattened(config)]
    for some in _portions(params, PARAMS_A_REQUEST):
        client.log_batch(identity, params=some)
    for some in _portions(_curves(folder), METRICS_A_REQUEST):
        client.log_batch(identity, metrics=some)
    for part in PARTS:
        if exists(folder.path(part)):
            _send_folder(client, identity, folder.path(part), part)
    client.set_terminated(identity, status)


def _curves(folder: RunFolder) -> Iterator[Any]:
    """Yield the numbers of every report, and those of metrics.json at the end.

    The @ of HR@50, which MLflow refuses, is written _at_.
    """
    from mlflow.entities import Metric

    now, last = int(time.time() * 1000), 0
    for line in read_lines(folder.metrics_lines):
        last = max(last, line["step"])
        for name, value in _numbers(line):
            if name != "step":
                yield Metric(
                    f"{line['stage']}/{name}".replace("@", "_at_"), value, now, line["step"]
                )
    if exists(folder.metrics):
        for name, value in _numbers(read_json(folder.metrics)):
            yield Metric(f"final/{name}".replace("@", "_at_"), value, now, last)


def _numbers(record: dict[str, Any]) -> list[tuple[str, float]]:
    return [
        (name, float(value))
        for name, value in record.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    ]


def _portions(values: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Yield lists of `size` values; the last is shorter."""
    rest = iter(values)
    while portion := list(islice(rest, size)):
        yield portion


def _send_folder(client: Any, identity: str, uri: str, name: str) -> None:
    fs, path = open_filesystem(uri)
    if "file" in fs.protocol:
        client.log_artifacts(identity, path, name)
        return
    with tempfile.TemporaryDirectory(prefix="karma-ray-") as copy:
        fs.get(f"{path}/", copy, recursive=True)
        client.log_artifacts(identity, copy, name)
