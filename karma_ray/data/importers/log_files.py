"""Files of a log or of an item table -> one frame, and what in them is no row."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import polars as pl

from karma_ray.artifacts import data_files, exists, open_filesystem
from karma_ray.data.importers.delimited import read_delimited
from karma_ray.data.importers.source import with_ids
from karma_ray.errors import InputError

_ENDINGS = (".csv", ".tsv", ".parquet", ".jsonl", ".ndjson")
_OTHER_COUNT = "not as many fields as the header"
_NO_OBJECT = "not a JSON object"
_RECORDS_AT_ONCE = 100_000


@dataclass(frozen=True)
class ReadRows:
    """The rows of files of one kind."""

    frame: pl.DataFrame
    """The files' columns, `row` (its number below the header) and `source_file`."""
    rejected: list[tuple[str, str, pl.DataFrame]]
    """File, reason, and `row` and `line` of what could not be read as a row."""
    notes: list[str]
    """What a reader of the manifest should know about how they were read."""


def read_files(uri: str, field: str, *, ids: Iterable[str] = (), quotes: str = "auto") -> ReadRows:
    """A file or a folder of one kind; cells of CSV, TSV and JSON lines stay strings.

    The columns `ids` become text file by file: a type common to all files would round them.
    Raises InputError naming `field` when there is no such file or it cannot be read, and on ids
    that are rounded already.
    """
    if not exists(uri):
        raise InputError(field, uri, "does not exist")
    fs, _ = open_filesystem(uri)
    files = data_files(uri, _ENDINGS)
    if not files:
        raise InputError(field, uri, "is no such file nor a folder of them", choices=_ENDINGS)
    parts = []
    for name in files:
        with fs.open(name, "rb") as source:
            try:
                part = _read(name, source.read(), quotes)
            except (pl.exceptions.PolarsError, UnicodeDecodeError) as error:
                raise InputError(field, name, f"cannot be read ({error})") from None
        parts.append(replace(part, frame=with_ids(part.frame, ids, name)))
    try:
        frame = pl.concat([part.frame for part in parts], how="vertical_relaxed")
    except pl.exceptions.PolarsError as error:
        raise InputError(field, uri, f"holds files of different columns ({error})") from None
    rejected = [one for part in parts for one in part.rejected]
    return ReadRows(frame, rejected, [f"{field}: {n}" for part in parts for n in part.notes])


def _read(name: str, content: bytes, quotes: str) -> ReadRows:
    lower = name.lower()
    if lower.endswith(".parquet"):
        frame = pl.read_parquet(content)
        rows = ReadRows(frame.with_columns(_row_numbers()), [], [])
    elif lower.endswith((".jsonl", ".ndjson")):
        rows = _read_json(name, content)
    else:
        rows = _read_delimited(name, content, "\t" if lower.endswith(".tsv") else ",", quotes)
    return replace(rows, frame=rows.frame.with_columns(pl.lit(name).alias("source_file")))


def _row_numbers() -> pl.Expr:
    return pl.int_range(pl.len(), dtype=pl.Int64).alias("row")


def _read_delimited(name: str, content: bytes, separator: str, quotes: str) -> ReadRows:
    table = read_delimited(content.decode("utf-8-sig"), separator, quotes)
    notes = []
    if table.joined:
        notes.append(f"{table.joined} rows of {name} hold a quoted field of several lines")
    if table.literal:
        notes.append(
            f"{table.literal} rows of {name} hold quotes that enclose no field and were kept as "
            "they stand; --quotes says otherwise"
        )
    rejected = [(name, _OTHER_COUNT, table.rejected)] if table.rejected.height else []
    return ReadRows(table.frame, rejected, notes)


def _read_json(name: str, content: bytes) -> ReadRows:
    """Strings as in CSV: a number keeps its digits, which a double would not."""
    frames: list[pl.DataFrame] = []
    records: list[dict[str, str | None]] = []
    bad: list[tuple[int, str]] = []

    def flush() -> None:
        columns = list(dict.fromkeys(key for record in records for key in record))
        schema = {key: pl.Int64 if key == "row" else pl.String for key in columns}
        frames.append(pl.DataFrame(records, schema=schema))
        records.clear()

    for number, line in enumerate(content.decode("utf-8-sig").split("\n")):
        if not line.strip():
            continue
        record = _json_record(line)
        if record is None:
            bad.append((number, line))
            continue
        records.append({**record, "row": number})  # type: ignore[dict-item]
        if len(records) == _RECORDS_AT_ONCE:
            flush()
    flush()
    rejected = pl.DataFrame(bad, {"row": pl.Int64, "line": pl.String}, orient="row")
    frame = pl.concat(frames, how="diagonal")
    if "row" not in frame.columns:
        raise pl.exceptions.NoDataError("it holds no JSON object")
    return ReadRows(frame, [(name, _NO_OBJECT, rejected)] if bad else [], [])


def _json_record(line: str) -> dict[str, str | None] | None:
    try:
        record = json.loads(line, parse_int=str, parse_float=str, parse_constant=str)
    except json.JSONDecodeError:
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
