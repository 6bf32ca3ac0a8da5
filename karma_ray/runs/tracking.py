"""Runs in MLflow: parameters, curves, final metrics, report and bundle.

A finished or failed run is sent from its folder, in one place, so the runs of jobs, searches and
studies are all sent, with or without Ray; so is what searches and studies find in the end
(studies/tracking.py). It is done if MLFLOW_TRACKING_URI is set; the package (mlflow or
mlflow-skinny) is no dependency. Server, user and experiment are set by MLflow's own variables. No
failure here ends a run.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import wraps
from importlib.util import find_spec
from itertools import islice
from typing import Any, Concatenate, ParamSpec

from karma_ray.artifacts import (
    RunFolder,
    absolute,
    exists,
    join,
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


def is_asked() -> bool:
    """Whether results are sent."""
    return bool(os.environ.get("MLFLOW_TRACKING_URI"))


def send_run(run: str, status: str) -> None:
    """Send a run folder if that is asked; a run that was sent before is replaced."""
    folder = RunFolder(run)
    if not is_asked() or not exists(folder.config):
        return

    def sent() -> None:
        config = read_json(folder.config)
        _send(
            run, {"recipe": str(config.get("recipe"))}, dict(flattened(config)), _curves(folder),
            PARTS, status,
        )  # fmt: skip

    _try(sent)


def send_result(
    folder: str, kind: str, params: Mapping[str, Any], numbers: Mapping[str, float],
    parts: Sequence[str],
) -> None:  # fmt: skip
    """Send what many runs have shown together, as a run of its own, if that is asked.

    `parts` are the files and folders of `folder` to send; a result that was sent before is
    replaced.
    """
    if is_asked():
        metrics = ((name, value, 0) for name, value in numbers.items())
        _try(lambda: _send(folder, {"kind": kind}, params, metrics, parts, "FINISHED"))


def _try(send: Callable[[], None]) -> None:
    if find_spec("mlflow") is None:
        LOG.warning("MLFLOW_TRACKING_URI is set, but mlflow is not installed: the run is not sent")
        return
    try:
        send()
    except Exception as error:  # of the server, or of the network
        LOG.warning("the run is not in MLflow: %s", reason(error))


def _send(
    folder: str, tags: Mapping[str, str], params: Mapping[str, Any],
    metrics: Iterable[tuple[str, float, int]], parts: Sequence[str], status: str,
) -> None:  # fmt: skip
    """Send `(name, value, step)` of every metric; the @ of HR@50, which MLflow refuses, is _at_."""
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    client, noted, now = MlflowClient(), join(folder, "mlflow.json"), int(time.time() * 1000)
    if exists(noted):
        client.delete_run(read_json(noted)["run_id"])
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "karma_ray")
    found = client.get_experiment_by_name(name)
    experiment = found.experiment_id if found else client.create_experiment(name)
    above, _, own = redacted(folder).rstrip("/").rpartition("/")
    told = {"folder": above, **tags}
    identity = client.create_run(experiment, run_name=own, tags=told).info.run_id
    write_json({"run_id": identity}, noted)
    for some in _portions(params.items(), PARAMS_A_REQUEST):
        client.log_batch(identity, params=[Param(n, str(v)[:LONGEST_PARAM]) for n, v in some])
    for some in _portions(metrics, METRICS_A_REQUEST):
        sent = [Metric(n.replace("@", "_at_"), value, now, step) for n, value, step in some]
        client.log_batch(identity, metrics=sent)
    for part in parts:
        if exists(join(folder, part)):
            _send_part(client, identity, join(folder, part), part)
    client.set_terminated(identity, status)


def _curves(folder: RunFolder) -> Iterator[tuple[str, float, int]]:
    """Yield the numbers of every report, and those of metrics.json at the end."""
    last = 0
    for line in read_lines(folder.metrics_lines):
        last = max(last, line["step"])
        for name, value in _numbers(line):
            if name != "step":
                yield f"{line['stage']}/{name}", value, line["step"]
    if exists(folder.metrics):
        for name, value in _numbers(read_json(folder.metrics)):
            yield f"final/{name}", value, last


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


def _send_part(client: Any, identity: str, uri: str, name: str) -> None:
    """Send a file, or a folder with all that is in it."""
    fs, path = open_filesystem(uri)
    is_folder = fs.isdir(path)
    with tempfile.TemporaryDirectory(prefix="karma-ray-") as copy:
        if "file" not in fs.protocol:
            target = copy if is_folder else join(copy, name)
            fs.get(f"{path}/" if is_folder else path, target, recursive=is_folder)
            path = target
        if is_folder:
            client.log_artifacts(identity, path, name)
        else:
            client.log_artifact(identity, path)
