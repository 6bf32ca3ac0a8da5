"""How far a run has come, and what it has cost, as sentences: what its folder alone can say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from karma_ray.artifacts import RunFolder, exists, read_json, read_lines
from karma_ray.errors import InputError
from karma_ray.report.record import number


def progress_sentences(run: str, hours: Mapping[str, float]) -> list[str]:
    """Return what a run has done and used; raises InputError if `run` is no run folder.

    `hours` are those of its machines, by kind.
    """
    folder = RunFolder(run)
    if not exists(folder.config):
        raise InputError("RUN", run, "is no run folder: it has no config.json")
    config = read_json(folder.config)
    if exists(folder.metrics):
        found = read_json(folder.metrics)
        score = f", {headline[1]}" if (headline := score_of(found)) else ""
        told = [f"{run}: finished{score}; {found.get('seconds') or 0:,.0f} seconds."]
    else:
        told = [f"{run}: not finished; {_stage(folder, config)}."]
    return [*told, hours_sentence(hours)]


def score_of(metrics: Mapping[str, Any]) -> tuple[float, str] | None:
    """Return the headline of a run's metrics and how it is told, or None if it has none.

    A model that ranks pages has no hit rate, and its headline is the AUC.
    """
    for name in ("HR@50", "AUC"):
        if (value := number(metrics.get(name))) is not None:
            return value, f"{name} {value:.1f}"
    return None


def hours_sentence(hours: Mapping[str, float]) -> str:
    """Say how many hours of which kinds of machines were used."""
    if not hours:
        return "Machine hours: none noted."
    parts = [f"{amount:.2f} x {kind}" for kind, amount in sorted(hours.items())]
    return f"Machine hours so far: {'; '.join(parts)}."


def _stage(folder: RunFolder, config: Mapping[str, Mapping[str, int]]) -> str:
    lines = [line for line in read_lines(folder.metrics_lines) if "of" not in line]
    if not lines:
        return "no step is logged yet"
    last = lines[-1]
    section = {"joint": "training"}.get(last["stage"], last["stage"])
    steps = config.get(section, {}).get("steps")
    of = f" of {steps:,}" if steps else ""
    return f"the stage {last['stage']} is at step {last['step']:,}{of}"
