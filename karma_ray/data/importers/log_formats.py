"""The kinds of files of a log, each read in batches: CSV and TSV, JSON lines, Parquet.

The batches are those of the reader; the rows, their numbers and what is rejected do not depend on
them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import polars as pl

from karma_ray.data.importers.delimited import DelimitedReader, separator_of
from karma_ray.data.importers.text_blocks import NOT_UTF8, Block, Damaged, stream_blocks
from karma_ray.data.reading import Lost, stream_rows

KINDS = (".csv", ".tsv", ".parquet", ".jsonl", ".ndjson")
ENDINGS = (*KINDS, *(f"{kind}.gz" for kind in KINDS if kind != ".parquet"))
JSON = (".jsonl", ".ndjson")
_OTHER_COUNT = "not as many fields as the header"
_NO_OBJECT = "not a JSON object"
_BAD = {"row": pl.Int64, "line": pl.String}


@dataclass(frozen=True)
class Rows:
    """Some rows of a file."""

    frame: pl.DataFrame
    """The columns of the file, and `row`, the number below the header."""
    rejected: list[tuple[str, pl.DataFrame]] = field(default_factory=list)
    """Reason, and a frame with `row` and `line` of what could not be read as a row."""
    lost: list[Lost] = field(default_factory=list)
    """Rows of a damaged file."""
    notes: list[str] = field(default_factory=list)
    """Notes for the manifest on how the file was read."""
    num_lines: int = 0
    """Number of lines, of which those that are not UTF-8 are a part."""


def kind_of(name: str) -> str:
    """Return the ending that says how a file is to be read."""
    bare = name.lower().removesuffix(".gz")
    return next(kind for kind in KINDS if bare.endswith(kind))


def stream_file(uri: str, quotes: str, encoding: str | None, block_bytes: int) -> Iterator[Rows]:
    """Yield the rows of a file of any kind; values of text files stay strings.

    Raises polars' NoDataError on an empty file, UnicodeError on a header that cannot be read or a
    text that is not in the stated encoding, and Damaged where a text file ends too early.
    """
    kind = kind_of(uri)
    if kind == ".parquet":
        yield from _stream_parquet(uri)
        return
    blocks = stream_blocks(uri, encoding, block_bytes)
    if kind in JSON:
        yield from _stream_json(blocks)
    else:
        yield from _stream_delimited(uri, blocks, "\t" if kind == ".tsv" else ",", quotes)


def _stream_parquet(uri: str) -> Iterator[Rows]:
    for part in stream_rows(uri):
        if isinstance(part, Lost):
            yield Rows(pl.DataFrame(schema={"row": pl.Int64}), lost=[part])
            continue
        first, table = part
        frame = pl.from_arrow(table)
        assert isinstance(frame, pl.DataFrame)
        yield Rows(frame.with_columns(pl.int_range(first, first + frame.height).alias("row")))


def _stream_delimited(
    uri: str, blocks: Iterable[Block], separator: str, quotes: str
) -> Iterator[Rows]:
    reader: DelimitedReader | None = None
    header, joined, literal = 0, 0, 0
    held = pl.DataFrame(schema=_BAD)
    for block, last in _with_last(blocks):
        filled = (block.lines.str.len_bytes() > 0).fill_null(False).arg_true()
        lines, rows = block.lines.gather(filled), filled.to_numpy().astype("int64") + block.first
        if reader is None:
            if block.bad.height and (not len(rows) or block.bad["row"][0] < rows[0]):
                raise UnicodeError("the header is not UTF-8")
            if not len(rows):
                continue
            names = str(lines[0])
            reader = DelimitedReader(names, separator_of(names, separator), quotes)
            header, lines, rows = int(rows[0]) + 1, lines.slice(1), rows[1:]
        table = reader.read(lines, rows - header, last=last)
        joined, literal = joined + table.joined, literal + table.literal
        # What the reader keeps for the next block comes with it, so that rows stay in order.
        held = pl.concat([held, block.bad.with_columns(pl.col("row") - header)])
        limit = reader.waiting
        ready = pl.lit(True) if limit is None else pl.col("row") < limit
        rejected = [(_OTHER_COUNT, table.rejected), (NOT_UTF8, held.filter(ready))]
        held = held.filter(~ready)
        yield Rows(table.frame, rejected, num_lines=len(rows) + block.bad.height)
    if reader is None:
        raise pl.exceptions.NoDataError("it is empty")
    yield Rows(pl.DataFrame(schema={"row": pl.Int64}), notes=_quote_notes(uri, joined, literal))


def _quote_notes(uri: str, joined: int, literal: int) -> list[str]:
    notes = []
    if joined:
        notes.append(f"{joined} rows of {uri} have a quoted field of several lines")
    if literal:
        notes.append(
            f"{literal} rows of {uri} have quotes that enclose no field, which were kept "
            "unchanged; --quotes can change this"
        )
    return notes


def _with_last(blocks: Iterable[Block]) -> Iterator[tuple[Block, bool]]:
    """Yield each block and whether it is the last, also of a file that ends too early."""
    held: Block | None = None
    try:
        for block in blocks:
            if held is not None:
                yield held, False
            held = block
    except Damaged:
        if held is not None:
            yield held, True
        raise
    if held is not None:
        yield held, True


def _stream_json(blocks: Iterable[Block]) -> Iterator[Rows]:
    """Read JSON lines with strings as values, since a double would lose digits of numbers."""
    found = False
    for block in blocks:
        records: list[dict[str, Any]] = []
        bad: list[tuple[int, str]] = []
        for number, line in enumerate(block.lines, block.first):
            if line is None or not line.strip():
                continue
            record = _json_record(line)
            if record is None:
                bad.append((number, line))
            else:
                records.append({**record, "row": number})
        found |= bool(records)
        columns = list(dict.fromkeys(key for record in records for key in record))
        schema = {key: pl.Int64 if key == "row" else pl.String for key in columns}
        frame = pl.DataFrame(records, schema=schema or {"row": pl.Int64})
        rejected = [(_NO_OBJECT, pl.DataFrame(bad, _BAD, orient="row")), (NOT_UTF8, block.bad)]
        yield Rows(frame, rejected, num_lines=len(records) + len(bad) + block.bad.height)
    if not found:
        raise pl.exceptions.NoDataError("it holds no JSON object")


def _json_record(line: str) -> dict[str, str | None] | None:
    try:
        record = json.loads(line, parse_int=str, parse_float=str, parse_constant=str)
    except (ValueError, RecursionError):
        return None
    return (
        {key: _text(value) for key, value in record.items()} if isinstance(record, dict) else None
    )


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    return json.dumps(value, ensure_ascii=False)
