"""Names of checkpoints in records: by file and content, not by the place on one machine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from karma_ray.artifacts import content_hash
from karma_ray.config import SHORT

FIELDS = SHORT["model.checkpoint"]
"""The fields that name a checkpoint."""


def portable(checkpoint: str) -> str:
    """Return `NAME@HASH` of a file or folder; names of the hub and of records stay as they are."""
    path = Path(checkpoint)
    if not path.exists():
        return checkpoint
    return f"{path.name}@{_hashed(checkpoint, path.stat().st_mtime_ns)}"


def portable_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return dotted fields of a configuration with portable checkpoints."""
    return {name: portable(value) if name in FIELDS else value for name, value in fields.items()}


def portable_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return a nested configuration with portable checkpoints."""
    parts = {
        name: {**config["model"][name], "checkpoint": portable(config["model"][name]["checkpoint"])}
        for name in ("item_encoder", "user_decoder")
    }
    return {**config, "model": {**config["model"], **parts}}


def portable_assignments(assignments: Iterable[str]) -> list[str]:
    """Return values of `--set` with portable checkpoints."""
    told = []
    for assignment in assignments:
        field, _, value = assignment.partition("=")
        named = field.strip() in (*FIELDS, *SHORT)
        told.append(f"{field}={portable(value.strip())}" if named else assignment)
    return told


@lru_cache
def _hashed(checkpoint: str, changed: int) -> str:
    return content_hash(checkpoint)[:8]
