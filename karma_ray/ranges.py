"""Types for the allowed numbers of configuration fields.

`config.from_dict` checks them for flags, files and searches; a part that is built directly checks
its fields with `check_ranges`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from karma_ray.errors import InputError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")

Count = Annotated[int, Field(ge=1)]
"""At least 1."""
CountOrZero = Annotated[int, Field(ge=0)]
"""At least 0, where 0 means *none*, *all*, or *automatic*."""
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
"""At least 0."""
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
"""Above 0."""
Share = Annotated[float, Field(ge=0, le=1)]
"""From 0 to 1."""
ShareBelowOne = Annotated[float, Field(ge=0, lt=1)]
"""From 0 to below 1."""


def validated(kind: type[T], value: Mapping[str, Any], path: str = "") -> T:
    """Build a configuration from plain values; `path` is its place in the whole configuration.

    Raises InputError naming field, value and problem.
    """
    try:
        return TypeAdapter(kind).validate_python(dict(value))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join([*filter(None, [path]), *map(str, first["loc"])])
        message = first["msg"].replace("Input should be", "should be")
        raise InputError(field, first["input"], message) from None


def check_ranges(config: DataclassInstance, path: str) -> None:
    """Raise InputError on a field outside its type's range; `path` as in `validated`."""
    validated(type(config), asdict(config), path)
