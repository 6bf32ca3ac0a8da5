"""Names of checkpoints and files in records: by name and content, not by their place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from karma_ray.artifacts import content_hash
from karma_ray.config import SHORT

FIELDS = SHORT["model.checkpoint"]
"""The fields that name a checkpoint."""
FILES = ("evaluation.paraphrases", "evaluation.general_texts")
"""Fields that may name a file whose content is measured on."""


def portable(checkpoint: str) -> str:
    """Return `NAME@HASH` of a file or folder; `tiny` and names of the hub and of records stay."""
    path = Path(checkpoint)
    if checkpoint == "tiny" or not path.exists():
        return checkpoint
    return f"{path.name}@{_hashed(checkpoint, path.stat().st_mtime_ns)}"


def portable_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return dotted fields of a configuration with portable checkpoints and files."""
    return {name: _told(name, value) for name, value in fields.items()}


def portable_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return a nested configuration with portable checkpoints and files."""
    parts = {
        name: {**config["model"][name], "checkpoint": portable(config["model"][name]["checkpoint"])}
        for name in ("item_encoder", "user_decoder")
    }
    measured = {n: _told(f"evaluation.{n}", value) for n, value in config["evaluation"].items()}
    return {**config, "model": {**config["model"], **parts}, "evaluation": measured}


def portable_assignments(assignments: Iterable[str]) -> list[str]:
    """Return values of `--set` with portable checkpoints and files."""
    told = []
    for assignment in assignments:
        field, _, value = assignment.partition("=")
        given = value.strip()
        named = _told(field.strip(), given)
        told.append(assignment if named == given else f"{field}={named}")
    return told


def _told(name: str, value: Any) -> Any:
    # A table of paraphrases has a name or is a file; a folder of that name is something else.
    named = name in (*FIELDS, *SHORT) or (name in FILES and Path(value).is_file())
    return portable(value) if named else value


@lru_cache
def _hashed(checkpoint: str, changed: int) -> str:
    return content_hash(checkpoint)[:8]
