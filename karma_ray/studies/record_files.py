"""Records of finished runs, as files of a results folder: found, named and written."""

from __future__ import annotations

import functools
import subprocess
from collections.abc import Iterable
from pathlib import Path

from karma_ray.artifacts import join, read_json, value_hash, write_json
from karma_ray.config import to_dict
from karma_ray.studies.plan import Data
from karma_ray.studies.records import OUTCOMES, Record, outcomes_of, run_key, same_run
from karma_ray.studies.trial import Trial

ROOT = Path(__file__).resolve().parents[2]


def finished_record(
    trial: Trial, data: Data, known: Iterable[Record], results: Path
) -> Record | None:
    """The record of this run, seed and data, with its values per example.

    Where only other rows have it (`hllm` is `action_only` under InfoNCE), one of theirs.
    """
    found = [
        record
        for record in known
        if record.get("row")
        and same_run(record, trial.config, data.hash)
        and outcomes_of(record, results) is not None
    ]
    return min(found, key=lambda record: record["row"] != trial.row, default=None)


@functools.cache
def commit() -> str | None:
    """HEAD, with `+` where the package differs from it; None outside a repository."""
    told = "describe --always --abbrev=40 --match= --dirty=+"
    command = ["git", "-C", str(ROOT), *told.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def run_folder(trial: Trial, data: Data, runs: str) -> str:
    """Where a trial runs: the same for the same run, whenever it is continued."""
    digest = run_key(to_dict(trial.config), data.hash)[:8]
    return join(runs, f"{data.name}-{trial.name}-{digest}")


def write_record(trial: Trial, found: Record, data: Data, results: Path) -> None:
    """Values per example first, so that a record never lacks them."""
    examples, outcomes = found.pop("examples"), found.pop("outcomes")
    folder = results / OUTCOMES
    folder.mkdir(parents=True, exist_ok=True)
    names = {"examples": f"{data.name}-{value_hash(examples.hex())[:8]}.npz",
             "outcomes": f"{_path(trial, data, results).stem}.npz"}  # fmt: skip
    for name, content in zip(names.values(), (examples, outcomes), strict=True):
        (folder / name).write_bytes(content)
    write_found(trial, {**found, **names, "commit": commit()}, data, results)


def _path(trial: Trial, data: Data, results: Path) -> Path:
    """Where a record goes; another configuration of the same row and seed keeps its file."""
    stem = f"{data.name}-{trial.name}"
    path = results / f"{stem}.json"
    if path.exists() and not same_run(read_json(str(path)), trial.config, data.hash):
        path = results / f"{stem}-{run_key(to_dict(trial.config), data.hash)[:8]}.json"
    return path


def write_found(trial: Trial, found: Record, data: Data, results: Path) -> None:
    """A record of what was `found`, under the trial's row."""
    told = {
        "data": data.name,
        "row": trial.row,
        "recipe": trial.config.recipe,
        "seed": trial.config.seed,
        "set": list(trial.extra),
        "assignments": list(trial.assignments),
        **({"searched": list(trial.searched)} if trial.searched else {}),
    }
    same = {"data_hash": data.hash, "config": to_dict(trial.config)}
    write_json({**found, **told, **same}, str(_path(trial, data, results)))
