"""Parsing of times and flags in a log with a row per exposure, for any file type."""

from __future__ import annotations

import polars as pl

from karma_ray.data.identifiers import MISSING

_OFFSET = r"\s*(Z|z|UTC|GMT|[+-]\d{2}(?::?\d{2})?)$"
_NUMBER = r"^-?\d+(\.\d+)?([eE]\+?\d+)?$"
_FORMATS = ("%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%d %H:%M", "%Y-%m-%d")
_TRUE = ["true", "t", "yes", "y"]
_FALSE = ["false", "f", "no", "n", *(text.lower() for text in MISSING)]


def timestamp(name: str, dtype: pl.DataType, stated: str | None = None) -> pl.Expr:
    """Return column `name` as UTC microseconds; null where it cannot be read.

    Values in the `stated` format (`%m/%d/%Y`) are read by it. Others may be dates, times with or
    without a zone (without: UTC), ISO strings, and epoch numbers, whose unit is chosen by size:
    below 1e11 seconds, below 1e14 milliseconds, below 1e17 microseconds, else nanoseconds.
    """
    column = pl.col(name)
    if stated:
        text = column.cast(pl.String).str.strip_chars()
        time = text.str.to_datetime(stated, strict=False, time_unit="us")
        if "z" not in stated:
            time = time.dt.replace_time_zone("UTC")
        return pl.coalesce(time, timestamp(name, dtype))
    if isinstance(dtype, pl.Datetime):
        utc = column.cast(pl.Datetime("us", dtype.time_zone))
        if dtype.time_zone:
            return utc.dt.convert_time_zone("UTC")
        return utc.dt.replace_time_zone("UTC")
    if dtype == pl.Date:
        return column.cast(pl.Datetime("us")).dt.replace_time_zone("UTC")
    if dtype.is_numeric():
        # A 32-bit column of seconds would overflow as microseconds.
        whole = column.cast(pl.Int64, strict=False)
        return _epoch(whole if dtype.is_integer() else column.cast(pl.Float64).fill_nan(None))
    text = column.cast(pl.String).str.strip_chars()
    number = text.str.contains(_NUMBER)
    # Whole numbers stay integers, because a double cannot represent nanoseconds.
    whole = _epoch(pl.when(number).then(text).cast(pl.Int64, strict=False))
    decimal = _epoch(pl.when(number).then(text).cast(pl.Float64, strict=False))
    return pl.coalesce(whole, decimal, _iso(pl.when(~number).then(text)))


def flag(name: str, dtype: pl.DataType) -> pl.Expr:
    """Return column `name` as a boolean: true for numbers above 0 and true/t/yes/y, false for
    missing values, null for other text that is not a number."""
    column = pl.col(name)
    if dtype == pl.Boolean:
        return column.fill_null(False)
    if dtype.is_numeric():  # NaN is a missing label, but polars compares it as above 0
        return column.cast(pl.Float64).fill_nan(None).fill_null(0) > 0
    text = column.cast(pl.String).str.strip_chars().str.to_lowercase().fill_null("")
    number = text.cast(pl.Float64, strict=False).fill_nan(None) > 0
    said = pl.when(text.is_in(_TRUE)).then(True).when(text.is_in(_FALSE)).then(False)
    return said.otherwise(number)


def _epoch(value: pl.Expr) -> pl.Expr:
    size = value.abs()
    micros = (
        pl.when(size < 10**11).then(value * 10**6)
        .when(size < 10**14).then(value * 10**3)
        .when(size < 10**17).then(value)
        .otherwise(value // 1000)
    )  # fmt: skip
    return micros.cast(pl.Int64, strict=False).cast(pl.Datetime("us", "UTC"))


def _iso(text: pl.Expr) -> pl.Expr:
    has_time = text.str.contains(":")
    offset = pl.when(has_time).then(text.str.extract(_OFFSET, 1))
    bare = pl.when(has_time).then(text.str.replace(_OFFSET, "")).otherwise(text)
    bare = bare.str.replace("T", " ", literal=True).str.strip_chars()
    parsed = pl.coalesce(
        *(bare.str.to_datetime(form, strict=False, time_unit="us") for form in _FORMATS)
    )
    digits = offset.str.replace_all(r"\D", "")
    minutes = digits.str.slice(0, 2).cast(pl.Int64, strict=False) * 60
    minutes += digits.str.slice(2, 2).cast(pl.Int64, strict=False).fill_null(0)
    sign = pl.when(offset.str.starts_with("-")).then(-1).otherwise(1)
    shift = pl.duration(minutes=(minutes * sign).fill_null(0))
    return (parsed - shift).dt.replace_time_zone("UTC")
