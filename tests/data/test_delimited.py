"""Quotes and odd lines: every line is a row, part of one, or told; none is swallowed."""

from __future__ import annotations

import polars as pl
import pytest

from karma_ray.data.importers.delimited import read_delimited


def values(text: str, separator: str = ",", quotes: str = "auto") -> list[tuple[str | None, ...]]:
    return read_delimited(text, separator, quotes).frame.drop("row").rows()


def test_a_quote_that_nothing_closes_swallows_no_row() -> None:
    rows = ['u1,"big lamp,1', "u2,lamp,2", 'u3,15" tv,3', 'u4,"a, b",4', 'u5,lamp"', 'u6,"x,6']
    read = read_delimited("uid,q,sku\n" + "\n".join(rows), ",")
    assert read.frame.rows() == [
        ("u1", '"big lamp', "1", 0), ("u2", "lamp", "2", 1), ("u3", '15" tv', "3", 2),
        ("u4", "a, b", "4", 3), ("u6", '"x', "6", 5),
    ]  # fmt: skip
    assert read.rejected.rows() == [(4, 'u5,lamp"')]
    assert (read.joined, read.literal) == (0, 3)


def test_a_quoted_field_may_span_lines() -> None:
    read = read_delimited('id,title\n1,"Lamp\n""big"",\n\nred"\n2,Shoe\n', ",")
    assert read.frame.rows() == [("1", 'Lamp\n"big",\nred', 0), ("2", "Shoe", 4)]
    assert read.joined == 1 and read.rejected.is_empty()


def test_two_lines_that_are_rows_on_their_own_are_joined_by_request_alone() -> None:
    text = 'uid,q,sku\nu1,"big,1\nu2,lamp",2\n'
    assert values(text) == [("u1", '"big', "1"), ("u2", 'lamp"', "2")]
    assert values(text, quotes="csv") == [("u1", "big,1\nu2,lamp", "2")]


def test_tsv_is_unquoted_unless_its_header_is_quoted() -> None:
    assert values('uid\tq\nu1\t"big\nu2\tx"\n', "\t") == [("u1", '"big'), ("u2", 'x"')]
    assert values('"uid"\t"q"\n"u1"\t"a ""b"""\n', "\t") == [("u1", 'a "b"')]
    assert values('uid\tq\nu1\t"a"\n', "\t", "csv") == [("u1", "a")]
    assert values('uid,q\nu1,"a"\n', ",", "text") == [("u1", '"a"')]


@pytest.mark.parametrize("separator", [",", "\t"])
def test_lines_of_another_number_of_fields_are_told_with_their_number(separator: str) -> None:
    lines = ["a,b", "1,2", "3", "", "4,5,6", "7,8\r"]
    read = read_delimited("\n".join(lines).replace(",", separator), separator)
    assert read.frame.rows() == [("1", "2", 0), ("7", "8", 4)]
    assert read.rejected["row"].to_list() == [1, 3]


def test_empty_cells_are_null_and_names_are_told_apart() -> None:
    frame = read_delimited('a,a,\n1,,""\n', ",").frame
    assert frame.columns == ["a", "a_1", "", "row"]
    assert frame["a_1"].to_list() == [None]


def test_what_polars_reads_without_odd_lines_is_read_the_same() -> None:
    frame = pl.DataFrame({"a": ["1", 'x "y", z', "two\nlines", None], "b": ["é", " ", "q", ","]})
    assert read_delimited(frame.write_csv(), ",", "csv").frame.drop("row").equals(frame)


def test_lines_may_end_as_they_did_on_any_system() -> None:
    for end in ("\n", "\r\n", "\r"):
        assert values(end.join(["a,b", "1,2", "3,4"])) == [("1", "2"), ("3", "4")]


def test_a_header_alone_has_no_rows() -> None:
    assert values("a,b\n") == values("a\tb", "\t") == []


def test_an_empty_text_is_no_table() -> None:
    with pytest.raises(pl.exceptions.NoDataError):
        read_delimited("\n", ",")
