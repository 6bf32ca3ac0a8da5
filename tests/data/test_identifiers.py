"""Ids as text: whatever wrote them, one id has one text and two ids have two."""

from __future__ import annotations

import polars as pl
import pytest

from karma_ray.data.identifiers import id_text, one_id
from karma_ray.errors import InputError

NAN = float("nan")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (pl.Series([7, None], dtype=pl.Int32), ["7", None]),
        (pl.Series([1234567890123456789]), ["1234567890123456789"]),
        (pl.Series([7.0, NAN, None, 1e15]), ["7", None, None, "1000000000000000"]),
        (pl.Series([7.0], dtype=pl.Float32), ["7"]),
        (pl.Series([" 7.0 ", "007", "7.50", "12e5"]), ["7", "007", "7.50", "12e5"]),
        (pl.Series(["nan", "NaN", "NULL", "None", "\\N", "", "<NA>"]), [None] * 7),
        (pl.Series(["a"], dtype=pl.Categorical), ["a"]),
        (pl.Series(["7"]).cast(pl.Decimal(38, 2)), ["7"]),
        (pl.Series([[1.0, NAN], None, []]), [["1", None], None, []]),
    ],
    ids=str,
)
def test_an_id_is_the_same_text_whatever_its_type(values: pl.Series, expected: list) -> None:
    assert id_text(values, "id").to_list() == expected


@pytest.mark.parametrize(
    "values",
    [
        pl.Series([1234567890123456789.0]),
        pl.Series([16777217.0], dtype=pl.Float32),
        pl.Series(["1.23457E+12"]),
        pl.Series(["1234567890123456789.0"]),
        pl.Series([[float("inf")]]),
    ],
    ids=str,
)
def test_a_rounded_id_is_refused_with_field_and_value(values: pl.Series) -> None:
    with pytest.raises(InputError, match=r"log: user_id: .* is a rounded number"):
        id_text(values, "log: user_id")


def test_a_type_that_is_no_id_is_refused() -> None:
    with pytest.raises(InputError, match="cannot be an id"):
        id_text(pl.Series([{"a": 1}]), "item_id")


def test_one_value_of_a_record_follows_the_same_rule() -> None:
    assert [one_id(value, "id") for value in (7, 7.0, "7.0", NAN, None, "NULL", 0)] == [
        "7", "7", "7", None, None, None, "0",
    ]  # fmt: skip
    with pytest.raises(InputError, match="rounded"):
        one_id(1e18, "id")
