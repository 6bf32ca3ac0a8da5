"""How far a run has come, and what it has cost, as sentences: what its folder alone can say."""

from __future__ import annotations

from collections.abc import Mapping

from karma_ray.artifacts import RunFolder, exists, read_json, read_lines
from karma_ray.errors import InputError


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
        hit = found.get("HR@50")
        score = f", HR@50 {hit:.1f}" if isinstance(hit, float) else ""
        told = [f"{run}: finished{score}; {found.get('seconds') or 0:,.0f} seconds."]
    else:
        told = [f"{run}: not finished; {_stage(folder, config)}."]
    if hours:
        parts = [f"{amount:.2f} x {kind}" for kind, amount in sorted(hours.items())]
        told.append(f"Machine hours so far: {'; '.join(parts)}.")
    else:
        told.append("Machine hours: none noted.")
    return told


def _stage(folder: RunFolder, config: Mapping[str, Mapping[str, int]]) -> str:
    lines = [line for line in read_lines(folder.metrics_lines) if "of" not in line]
    if not lines:
        return "no step is logged yet"
    last = lines[-1]
    section = {"joint": "training"}.get(last["stage"], last["stage"])
    steps = config.get(section, {}).get("steps")
    of = f" of {steps:,}" if steps else ""
    return f"the stage {last['stage']} is at step {last['step']:,}{of}"
