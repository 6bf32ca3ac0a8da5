"""One run of a study in its own process, and the measurements that are recorded."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from karma_ray import pretrained, recipes
from karma_ray.artifacts import (
    RunFolder,
    exists,
    join,
    locked,
    read_bytes,
    read_lines,
    value_hash,
)
from karma_ray.config import Config
from karma_ray.runs.executor import HERE, Executor

CURVE = ("HR@10", "HR@50", "HR@200", "gAUC", "JS@50_excl_gt", "cold/HR@50", "held_out/HR@50")
"""Validation metrics that are recorded at every validated step."""
LAST_REPORTS = 5
"""Number of last reports whose metrics are averaged, because each covers one batch."""
_PROBES = ("decode", "collapse/", "negatives/", "loss/")


@dataclass(frozen=True)
class Trial:
    """A row with one seed and its settings."""

    row: str
    config: Config
    assignments: tuple[str, ...]
    """Settings beyond those of the row and its recipe."""
    extra: tuple[str, ...] = ()
    """The part of them that is not from the data set's study settings."""
    searched: tuple[str, ...] = ()
    """Settings that a search gave only to this row; they are part of the configuration."""

    @property
    def name(self) -> str:
        """`ROW-seedN`, with a short hash of searched settings."""
        name = f"{self.row}-seed{self.config.seed}"
        return f"{name}-{value_hash(list(self.searched))[:4]}" if self.searched else name

    def progress(self, run: str) -> str:
        """Describe the progress of its run, from the run's log."""
        steps = [line["step"] for line in read_lines(RunFolder(run).metrics_lines)
                 if line["stage"] == "joint"]  # fmt: skip
        return f"is at step {max(steps, default=0)} of {self.config.training.steps}"


def first_stage_key(config: Config, data: str) -> str:
    """Return a key that is equal for configurations that share the results of `first_stage`."""
    from karma_ray.runs.pretraining import pretrain_key
    from karma_ray.runs.warm_up import warmup_key

    stages = [pretrain_key(config, ""), warmup_key(config, "", data)]
    kind = config.model.kind if config.recipe in recipes.TRAINED else ""
    model, limit = config.model, config.collate.max_item_tokens
    encoder = [vars(model.item_encoder), model.weights, limit]
    floors = [vars(config.evaluation), encoder if pretrained.names_llm(config) else None]
    return value_hash([kind, stages if kind else None, *floors, config.seed])


def first_stage(config: Config, data: str, cache: str, executor: Executor = HERE) -> None:
    """Put pretraining, warm-up and floors into the cache."""
    from karma_ray.runs.evaluator import Evaluator
    from karma_ray.runs.first_stages import start_stage
    from karma_ray.runs.floor_metrics import floor_metrics
    from karma_ray.runs.preparation import ensure_prepared

    source = ensure_prepared(data, config.prepare, executor.prepare)
    if config.recipe in recipes.TRAINED:
        start_stage(config, source, cache, executor=executor)
    with locked(join(cache, "floors")):  # trials that start together share them
        floor_metrics(Evaluator(config, source), cache)


def train_trial(
    config: Config, data: str, out: str, cache: str, executor: Executor = HERE
) -> dict[str, Any]:
    """Train and evaluate; returns the measured part of a record, with values per example.

    An interrupted run has a configuration and perhaps checkpoints, and is continued.
    """
    import torch

    from karma_ray.runs.cost import peak_gib
    from karma_ray.runs.pipeline import train_run

    started = time.monotonic()
    torch.set_num_threads(config.training.num_threads())
    folder = RunFolder(out)
    resumed = exists(folder.config)
    metrics = train_run(config, data, out, resume=resumed, cache=cache, executor=executor)
    lines = list(read_lines(folder.metrics_lines))
    joint = [line for line in lines if line["stage"] == "joint"]
    return {
        "metrics": metrics,
        "probes": _probes(joint[-LAST_REPORTS:]),
        "alarms": {
            name.removeprefix("alarm/"): line["step"]
            for line in reversed(joint)
            for name in line
            if name.startswith("alarm/")
        },
        "curve": _curve(lines),
        "stage_seconds": {
            stage: max(line["seconds"] for line in lines if line["stage"] == stage)
            for stage in dict.fromkeys(line["stage"] for line in lines if line["stage"] != "valid")
        },
        "steps": joint[-1]["step"] if joint else 0,
        "seconds": round(time.monotonic() - started, 1),
        "resumed": resumed,
        "peak_gib": peak_gib(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "examples": read_bytes(folder.path("outcomes", "examples.npz")),
        "outcomes": read_bytes(folder.path("outcomes", "outcomes.npz")),
    }


def _curve(lines: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Return the validated steps, with the seconds of the joint training alone.

    Reports contain the time, and validations fall between reports, so it is interpolated.
    """
    joint = [(line["step"], line["seconds"]) for line in lines if line["stage"] == "joint"]
    steps, seconds = zip((0, 0.0), *joint, strict=True)
    return [
        {"step": line["step"], "seconds": round(float(np.interp(line["step"], steps, seconds)), 1)}
        | {name: line[name] for name in CURVE if name in line}
        for line in lines
        if line["stage"] == "valid"
    ]


def _probes(lines: list[dict[str, Any]]) -> dict[str, float]:
    """Average the metrics of the reports' batches."""
    names = dict.fromkeys(name for line in lines for name in line if name.startswith(_PROBES))
    found = {name: [line[name] for line in lines if line.get(name) is not None] for name in names}
    return {name: float(np.mean(values)) for name, values in found.items() if values}
