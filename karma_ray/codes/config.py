"""Choices of semantic ids."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any, Literal, TypeVar, cast

from pydantic import ConfigDict, Field

from karma_ray.errors import InputError
from karma_ray.ranges import Count, CountOrZero, check_ranges, validated

T = TypeVar("T")
Kind = Literal["res_kmeans_fsq", "rq_kmeans"]
KINDS: tuple[Kind, ...] = ("res_kmeans_fsq", "rq_kmeans")
MOST_CODES = 2**62
"""Codes are counted as one integer of 64 bits per item."""


@dataclass(frozen=True)
class CodesConfig:
    """How items are given codes."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    kind: Kind = "res_kmeans_fsq"
    """Residual k-means with FSQ on the last level (`res_kmeans_fsq`), or k-means on every level
    (`rq_kmeans`)."""
    levels: Annotated[int, Field(ge=1, le=16)] = 3
    """Numbers in the code of an item, the one of FSQ included."""
    codewords: Annotated[int, Field(ge=2, le=2**20)] = 256
    """Codewords of each level of k-means but the last."""
    fsq_levels: Annotated[
        tuple[Annotated[int, Field(ge=2, le=256)], ...], Field(min_length=1, max_length=16)
    ] = (8, 8, 4)
    """Values of each dimension of FSQ. Their product is the number of codes of the last level, of
    both kinds, so that both have the same number of codes altogether."""
    sample: Count = 262_144
    """Items that codebooks are fitted on, drawn from the catalogue."""
    iterations: Count = 25
    """Iterations of k-means."""
    seed: CountOrZero = 0
    """Seed of the sample and of k-means."""

    def check(self) -> None:
        """Raise InputError on numbers out of range, and on more codes than can be counted."""
        check_ranges(self, "codes")
        if self.num_codes > MOST_CODES:
            raise InputError("codes.levels", self.levels, "makes more than 2^62 different codes")

    def plain(self) -> dict[str, Any]:
        """Return the choices as JSON values."""
        return {**asdict(self), "fsq_levels": list(self.fsq_levels)}

    @property
    def last_codes(self) -> int:
        """Number of codes of the last level."""
        return math.prod(self.fsq_levels)

    @property
    def sizes(self) -> list[int]:
        """Number of codes of each level."""
        return [self.codewords] * (self.levels - 1) + [self.last_codes]

    @property
    def num_codes(self) -> int:
        """Number of different codes of an item."""
        return math.prod(self.sizes)


def config_of(assignments: Sequence[str], **known: Any) -> CodesConfig:
    """Return the configuration that `codes.field=value` strings describe, beside `known` fields.

    Raises InputError on an unknown field or a value out of range, with the choices.
    """
    config = with_assignments(CodesConfig, "codes", assignments, **known)
    config.check()
    return config


def with_assignments(kind: type[T], path: str, assignments: Sequence[str], /, **known: Any) -> T:
    """Return the configuration of a class that `path.field=value` strings describe."""
    names, values = [f"{path}.{field.name}" for field in fields(cast(Any, kind))], dict(known)
    for assignment in assignments:
        name, separator, text = assignment.partition("=")
        if not separator:
            raise InputError("--set", assignment, f"is not of the form {path}.field=value")
        if name.strip() not in names:
            raise InputError("--set", name.strip(), "is not a known field", choices=names)
        values[name.strip().removeprefix(f"{path}.")] = _literal(text.strip())
    return validated(kind, values, path)


def _literal(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
