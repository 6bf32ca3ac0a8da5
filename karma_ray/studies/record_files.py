"""Record files: finding, naming and writing records of finished runs as lines."""

from __future__ import annotations

import functools
import subprocess
from collections.abc import Iterable
from pathlib import Path

from karma_ray.artifacts import (
    join,
    locked,
    read_lines,
    value_hash,
    write_bytes,
    write_lines,
)
from karma_ray.config import to_dict
from karma_ray.studies.checkpoints import portable_assignments, portable_config
from karma_ray.studies.plan import Data
from karma_ray.studies.records import Record, outcomes_path, run_key, same_run
from karma_ray.studies.trial import Trial

ROOT = Path(__file__).resolve().parents[2]


def finished_record(trial: Trial, data: Data, known: Iterable[Record]) -> Record | None:
    """Return the record of this run, seed and data, or None.

    If only other rows have it (`hllm` is `action_only` under InfoNCE), one of theirs is returned.
    """
    found = [r for r in known if r.get("row") and same_run(r, trial.config, data.hash)]
    return min(found, key=lambda record: record["row"] != trial.row, default=None)


@functools.cache
def commit() -> str | None:
    """Return HEAD, with `+` if the package was modified; None outside a repository."""
    told = "describe --always --abbrev=40 --match= --dirty=+"
    command = ["git", "-C", str(ROOT), *told.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def run_folder(trial: Trial, data: Data, runs: str) -> str:
    """Return the run folder of a trial, which is the same whenever the run is continued."""
    digest = run_key(to_dict(trial.config), data.hash)[:8]
    return join(runs, f"{data.name}-{trial.name}-{digest}")


def write_record(trial: Trial, found: Record, data: Data, results: str | Path) -> None:
    """Write values per example first, so that a record made here always has them."""
    examples, outcomes = found["examples"], found["outcomes"]
    names = {"examples": _digest(examples), "outcomes": _digest(examples + outcomes)}
    for name, content in zip(names.values(), (examples, outcomes), strict=True):
        write_bytes(content, outcomes_path(results, name))
    write_found(trial, {**found, **names, "commit": commit()}, data, results)


def write_found(trial: Trial, found: Record, data: Data, results: str | Path) -> None:
    """Write a record of `found` under the trial's row, without changing other records."""
    told = {
        "data": data.name,
        "row": trial.row,
        "recipe": trial.config.recipe,
        "seed": trial.config.seed,
        "set": portable_assignments(trial.extra),
        "assignments": portable_assignments(trial.assignments),
        **({"searched": list(trial.searched)} if trial.searched else {}),
    }
    same = {"data_hash": data.hash, "config": portable_config(to_dict(trial.config))}
    uri = join(str(results), f"{data.name}.jsonl")
    with locked(uri):  # two studies that finish a run at once must not lose a record
        known = list(read_lines(uri))
        name = _name(trial, data, known)
        others = [record for record in known if record["name"] != name]
        write_lines(in_order([*others, {**found, **told, **same, "name": name}]), uri)


def in_order(records: Iterable[Record]) -> list[Record]:
    """Return the records in the order of a file."""
    return sorted(records, key=lambda record: str(record["name"]))


def _name(trial: Trial, data: Data, known: Iterable[Record]) -> str:
    """Name a record; another configuration of the same row and seed gets a different name."""
    for record in known:
        if record["name"] == trial.name and not same_run(record, trial.config, data.hash):
            return f"{trial.name}-{run_key(to_dict(trial.config), data.hash)[:8]}"
    return trial.name


def _digest(content: bytes) -> str:
    return value_hash(content.hex())[:8]
