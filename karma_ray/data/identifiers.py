"""Ids as text, whatever type a file gives them: `7`, `7.0` and `"7"` are one id.

A column of integers with one gap is often written as floats, and a gap as NaN or as a word for
it. A float beyond 2^53 stands for several integers, so two people would become one: refused.
"""

from __future__ import annotations

import math
import re
from typing import Any, NoReturn

import polars as pl

from karma_ray.errors import InputError

MISSING = ("", "nan", "NaN", "null", "NULL", "None", "\\N", "<NA>")
"""Texts that programs write where there is no value."""
_EXACT, _EXACT_SINGLE = 2**53, 2**24
_WHOLE = r"^(-?\d+)\.0+$"
_ROUNDED = r"^-?\d(?:\.\d+[eE]\+?|[eE]\+)\d+$"


def id_text(values: pl.Series, field: str) -> pl.Series:
    """Ids as text without outer spaces; missing ones, also NaN and words for it, are null.

    Integral floats are their integer's text; lists keep their shape. Raises InputError naming
    `field` and the value of a float beyond 2^53, or the type that is no id.
    """
    kind = values.dtype
    if isinstance(kind, pl.List):
        rows = pl.DataFrame({"row": range(len(values)), "ids": values.rename("ids")})
        single = rows.explode("ids", empty_as_null=False, keep_nulls=False)
        single = single.with_columns(id_text(single["ids"], field))
        lists = single.group_by("row", maintain_order=True).agg("ids")
        joined = rows.select("row", pl.col("ids").is_null().alias("none")).join(
            lists, on="row", how="left", maintain_order="left"
        )
        empty = pl.lit([], pl.List(pl.String))
        filled = pl.when("none").then(None).otherwise(pl.col("ids").fill_null(empty))
        return joined.select(filled.alias(values.name)).to_series()
    if kind.is_nested():
        raise InputError(field, str(kind), "is no type of an id; write text or integers")
    if kind.is_float():
        values = values.fill_nan(None)
        exact = _EXACT if kind == pl.Float64 else _EXACT_SINGLE
        if (lost := values.filter(values.abs() >= exact)).len():
            _refuse(field, lost[0])
        return values.cast(pl.String).str.replace(_WHOLE, "${1}")
    text = values.cast(pl.String, strict=False).str.strip_chars()
    rounded = text.str.contains(_ROUNDED)
    whole = text.str.extract(_WHOLE, 1)
    if not kind.is_decimal():  # whose digits are all there
        rounded |= whole.cast(pl.Float64, strict=False).abs() >= _EXACT
    if (lost := text.filter(rounded)).len():
        _refuse(field, lost[0])
    text = pl.select(pl.coalesce(whole, text)).to_series().alias(values.name)
    return text.set(text.is_in(MISSING), None)


def one_id(value: Any, field: str) -> str | None:
    """`id_text` of one value of a JSON record."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, float):
        if abs(value) >= _EXACT:
            _refuse(field, value)
        return str(int(value)) if value.is_integer() else str(value)
    text = re.sub(_WHOLE, r"\1", str(value).strip())
    return None if text in MISSING else text


def known_text(name: str) -> pl.Expr:
    """Column `name` as text without outer spaces; words for a missing value are null."""
    text = pl.col(name).cast(pl.String).str.strip_chars()
    return pl.when(~text.is_in(MISSING)).then(text).alias(name)


def _refuse(field: str, value: object) -> NoReturn:
    raise InputError(
        field, value,
        "is a rounded number, which several ids share (floats are exact up to 2^53, 32-bit ones "
        "up to 2^24); write ids as text or as integers, a missing one as null",
    )  # fmt: skip
