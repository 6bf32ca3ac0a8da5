"""The files of a finished run, read once; missing parts are empty."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from karma_ray.artifacts import RunFolder, exists, read_json, read_lines
from karma_ray.errors import InputError
from karma_ray.recipes import CEILINGS, FLOORS, RANKERS

Role = Literal["floor", "run", "ceiling"]
Metrics = Mapping[str, float]


@dataclass(frozen=True)
class Ranked:
    """The metrics of a ranker, and its role in a comparison."""

    name: str
    role: Role
    metrics: Metrics

    def value(self, metric: str) -> float | None:
        """Return the metric, or None if it was not measured or is not a finite number."""
        return number(self.metrics.get(metric))


@dataclass(frozen=True)
class RunRecord:
    """Everything that a report shows, as the run wrote it."""

    run: str
    config: dict[str, Any]
    metrics: dict[str, Any]
    floors: dict[str, dict[str, Any]]
    lines: list[dict[str, Any]]
    checks: dict[str, Any]
    cases: list[dict[str, Any]]
    data: dict[str, Any]
    bundle: dict[str, Any]
    cost: dict[str, Any]
    channels: dict[str, Any]

    @property
    def recipe(self) -> str:
        """Name of the recipe, or `run` if no configuration was saved."""
        return str(self.config.get("recipe", "run"))

    @property
    def data_name(self) -> str:
        """Name of the data set, from its importer."""
        return str(self.data.get("name", "unnamed data"))

    @property
    def is_trained(self) -> bool:
        """Whether the run trained a model; floors and ceilings are not trained."""
        return self.recipe not in (*FLOORS, *CEILINGS)

    @property
    def is_ctr(self) -> bool:
        """Whether the run trained a CTR model, which ranks pages instead of the catalogue."""
        return self.recipe in RANKERS

    def checkpoint(self, part: str) -> str:
        """The checkpoint that `item_encoder` or `user_decoder` began with, and its quantisation."""
        parts = self.config.get("model", {})
        named = str(parts.get(part, {}).get("checkpoint", "not recorded"))
        origin = self.bundle.get("quantised", {}).get(part)
        return f"{named} ({origin['quantisation']})" if origin else named

    def rankers(self) -> list[Ranked]:
        """Return floors, this run and ceilings, in the expected order of their quality."""
        others = {name: value for name, value in self.floors.items() if name != self.recipe}
        known = [*FLOORS, *sorted(name for name in others if name not in (*FLOORS, *CEILINGS))]
        floors = [Ranked(name, "floor", others[name]) for name in known if name in others]
        # taste_oracle knows what no model can see, but does not use the history: it comes first.
        above = [
            Ranked(name, "ceiling", others[name]) for name in reversed(CEILINGS) if name in others
        ]
        return [*floors, Ranked(self.recipe, "run", self.metrics), *above]

    def stage_lines(self, stage: str) -> list[dict[str, Any]]:
        """Return the reports of one stage (`pretrain`, `warmup`, `joint`, `valid`), in order."""
        return [line for line in self.lines if line.get("stage") == stage]

    def labels(self) -> list[str]:
        """Return warnings about the data that apply to every number, as sentences."""
        result = []
        if self.data.get("query_source") == "derived":
            result.append(
                "DERIVED queries: the log has none; each was made from attributes of the item "
                "that was then chosen."
            )
        if self.data.get("query_source") == "none":
            result.append("No queries: every request consists of the history alone.")
        if self.data.get("negative_source") == "proxy":
            result.append(
                "PROXY negatives: the log has no impressions; gAUC compares with similar items "
                "that were on sale and not chosen."
            )
        if self.data.get("negative_source") == "none":
            result.append("No negatives: gAUC cannot be measured.")
        return result


def number(value: object) -> float | None:
    """Return `value` as a finite float, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def read_run(run: str) -> RunRecord:
    """Read a run folder (local path or URI); raises InputError when there is none."""
    folder = RunFolder(run.rstrip("/"))
    if not exists(folder.config) and not exists(folder.metrics):
        raise InputError("run", run, "is not a run folder: it holds no config.json or metrics.json")

    def part(*names: str, default: Any) -> Any:
        path = folder.path(*names)
        return read_json(path) if exists(path) else default

    return RunRecord(
        run=folder.root,
        config=part("config.json", default={}),
        metrics=part("metrics.json", default={}),
        floors=part("floors.json", default={}),
        lines=list(read_lines(folder.metrics_lines)),
        checks=part("checks.json", default={}),
        cases=part("report", "cases.json", default=[]),
        data=part("data.json", default={}),
        bundle=part("bundle", "manifest.json", default={}),
        cost=part("cost.json", default={}),
        channels=part("channels.json", default={}),
    )
