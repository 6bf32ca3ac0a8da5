"""Ids as text, for any type in a file: `7`, `7.0` and `"7"` are the same id.

Integer columns with missing values are often written as floats, and missing values as NaN or a
word. A float beyond 2^53 stands for several integers, so that several users would become one;
such ids are refused.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any, NoReturn

from karma_ray.errors import InputError

if TYPE_CHECKING:  # a machine that only trains or serves needs no polars
    import polars as pl

MISSING = ("", "nan", "NaN", "null", "NULL", "None", "\\N", "<NA>")
"""Texts that programs write for a missing value."""
_EXACT, _EXACT_SINGLE = 2**53, 2**24
_WHOLE = r"^(-?\d+)\.0+$"
_ROUNDED = r"^-?\d(?:\.\d+[eE]\+?|[eE]\+)\d+$"


def id_text(values: pl.Series, field: str) -> pl.Series:
    """Convert ids to text without outer spaces; missing values, NaN and words for it become null.

    Integral floats become the text of the integer; lists stay lists. Raises InputError, which
    names `field`, on floats beyond 2^53 and on types that cannot be ids.
    """
    import polars as pl

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
        raise InputError(field, str(kind), "cannot be an id; write text or integers")
    if kind.is_float():
        values = values.fill_nan(None)
        exact = _EXACT if kind == pl.Float64 else _EXACT_SINGLE
        if (lost := values.filter(values.abs() >= exact)).len():
            _refuse(field, lost[0])
        return values.cast(pl.String).str.replace(_WHOLE, "${1}")
    text = values.cast(pl.String, strict=False).str.strip_chars()
    rounded = text.str.contains(_ROUNDED)
    whole = text.str.extract(_WHOLE, 1)
    if not kind.is_decimal():  # a decimal has all its digits
        rounded |= whole.cast(pl.Float64, strict=False).abs() >= _EXACT
    if (lost := text.filter(rounded)).len():
        _refuse(field, lost[0])
    text = pl.select(pl.coalesce(whole, text)).to_series().alias(values.name)
    return text.set(text.is_in(MISSING), None)


def one_id(value: Any, field: str) -> str | None:
    """Apply `id_text` to one value of a JSON record."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, float):
        if abs(value) >= _EXACT:
            _refuse(field, value)
        return str(int(value)) if value.is_integer() else str(value)
    text = re.sub(_WHOLE, r"\1", str(value).strip())
    return None if text in MISSING else text


def known_text(name: str) -> pl.Expr:
    """Return column `name` as text without outer spaces, with words for missing values as null."""
    import polars as pl

    text = pl.col(name).cast(pl.String).str.strip_chars()
    return pl.when(~text.is_in(MISSING)).then(text).alias(name)


def _refuse(field: str, value: object) -> NoReturn:
    raise InputError(
        field, value,
        "is a rounded number, which may stand for several ids (floats are exact up to 2^53, "
        "32-bit ones up to 2^24); write ids as text or integers, and missing ones as null",
    )  # fmt: skip
