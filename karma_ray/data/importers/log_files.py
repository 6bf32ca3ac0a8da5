"""Reading files of a log or an item table into one frame, with the lines that cannot be read."""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import polars as pl

from karma_ray.artifacts import data_files, exists, open_filesystem
from karma_ray.data.fragments import folder_columns
from karma_ray.data.importers.delimited import QUOTES, read_delimited, separator_of
from karma_ray.data.importers.source import with_ids
from karma_ray.errors import InputError

_KINDS = (".csv", ".tsv", ".parquet", ".jsonl", ".ndjson")
_ENDINGS = (*_KINDS, *(f"{kind}.gz" for kind in _KINDS if kind != ".parquet"))
_OTHER_COUNT = "not as many fields as the header"
_NO_OBJECT = "not a JSON object"
_RECORDS_AT_ONCE = 100_000


@dataclass(frozen=True)
class TextFormat:
    """How text files are to be read, where the files do not say it."""

    quotes: str = "auto"
    """One of delimited.QUOTES."""
    encoding: str | None = None
    """Name of the encoding; default UTF-8, or UTF-16 if the first bytes show it."""

    def check(self) -> None:
        """Raise InputError on unknown names."""
        if self.quotes not in QUOTES:
            raise InputError("--quotes", self.quotes, choices=QUOTES)
        try:
            codecs.lookup(self.encoding or "utf-8")
        except LookupError:
            raise InputError("--encoding", self.encoding, "is not a known encoding") from None

    def decode(self, content: bytes) -> str:
        """Decode the content of a file; raises UnicodeDecodeError."""
        if self.encoding:
            return content.decode(self.encoding).removeprefix("\ufeff")
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return content.decode("utf-16")
        if b"\0" in content[:2]:
            return content.decode("utf-16-be" if content[:1] == b"\0" else "utf-16-le")
        return content.decode("utf-8-sig")


@dataclass(frozen=True)
class ReadRows:
    """The rows of one or several files of the same kind."""

    frame: pl.DataFrame
    """The columns of the files, `row` (the number below the header) and `source_file`."""
    rejected: list[tuple[str, str, pl.DataFrame]]
    """File, reason, and a frame with `row` and `line` of what could not be read as a row."""
    notes: list[str]
    """Notes for the manifest on how the files were read."""


def read_files(
    uri: str,
    field: str,
    *,
    ids: Iterable[str] = (),
    needed: Iterable[str] = (),
    form: TextFormat | None = None,
) -> ReadRows:
    """Read a file, or a folder of files of one kind; CSV, TSV and JSON values stay strings.

    The columns `ids` become text in each file, because a type common to all files would round
    them. Columns may be in any order, and folders may name some (`dt=2024-05-01/`). Columns that
    are not `needed` may be missing in some files. Raises InputError, which names `field`, when
    there is no such file, when it cannot be read, and on ids that are already rounded.
    """
    if not exists(uri):
        raise InputError(field, uri, "does not exist")
    fs, root = open_filesystem(uri)
    files = data_files(uri, _ENDINGS)
    if not files:
        raise InputError(field, uri, "is no such file nor a folder of them", choices=_ENDINGS)
    parts: list[ReadRows] = []
    sources: list[str] = []
    for name in files:
        with fs.open(name, "rb") as source:
            content = source.read()
        if not content and len(files) > 1:  # written by a worker without rows
            continue
        part = _open(name, content, form or TextFormat(), field)
        columns = folder_columns(name, root) if name != root else {}
        further = [pl.lit(v).alias(c) for c, v in columns.items() if c not in part.frame.columns]
        frame = part.frame.with_columns(*further, pl.lit(name).alias("source_file"))
        parts.append(replace(part, frame=with_ids(frame, ids, name)))
        sources.append(name)
    if not parts:
        raise InputError(field, uri, "has only empty files")
    _check_same(parts, sources, list(needed), field)
    try:
        frame = pl.concat([part.frame for part in parts], how="diagonal_relaxed")
    except pl.exceptions.PolarsError as error:
        raise InputError(field, uri, f"has files with different columns ({error})") from None
    rejected = [one for part in parts for one in part.rejected]
    return ReadRows(frame, rejected, [f"{field}: {n}" for part in parts for n in part.notes])


def _check_same(parts: list[ReadRows], files: list[str], needed: list[str], field: str) -> None:
    """Raise InputError if a needed column is in one file but not in another.

    JSON lines omit keys without a value, so files of this kind may lack some.
    """
    for column in needed:
        have = [name for name, part in zip(files, parts, strict=True) if column in part.frame]
        for name, part in zip(files, parts, strict=True):
            if have and column not in part.frame and ".json" not in name and ".ndjson" not in name:
                raise InputError(
                    field, name, f"lacks the column {column!r}, which {have[0]} has; columns",
                    [c for c in part.frame.columns if c not in ("row", "source_file")],
                )  # fmt: skip


def _open(name: str, content: bytes, form: TextFormat, field: str) -> ReadRows:
    kind = name.lower().removesuffix(".gz")
    try:
        if name.lower().endswith(".gz"):
            content = gzip.decompress(content)
        if kind.endswith(".parquet"):
            frame = pl.read_parquet(content)
            return ReadRows(frame.with_columns(_row_numbers()), [], [])
        text = form.decode(content)
        if kind.endswith((".jsonl", ".ndjson")):
            return _read_json(name, text)
        return _read_delimited(name, text, "\t" if kind.endswith(".tsv") else ",", form.quotes)
    except UnicodeError as error:
        problem = f"cannot be read ({error}); --encoding names another one, such as latin-1"
        raise InputError(field, name, problem) from None
    except (pl.exceptions.PolarsError, OSError, EOFError, zlib.error) as error:
        raise InputError(field, name, f"cannot be read ({error})") from None


def _row_numbers() -> pl.Expr:
    return pl.int_range(pl.len(), dtype=pl.Int64).alias("row")


def _read_delimited(name: str, text: str, separator: str, quotes: str) -> ReadRows:
    header = text.lstrip("\r\n").split("\n", 1)[0]
    table = read_delimited(text, separator_of(header, separator), quotes)
    notes = []
    if table.joined:
        notes.append(f"{table.joined} rows of {name} have a quoted field of several lines")
    if table.literal:
        notes.append(
            f"{table.literal} rows of {name} have quotes that enclose no field, which were kept "
            "unchanged; --quotes can change this"
        )
    rejected = [(name, _OTHER_COUNT, table.rejected)] if table.rejected.height else []
    return ReadRows(table.frame, rejected, notes)


def _read_json(name: str, text: str) -> ReadRows:
    """Read JSON lines with strings as values, since a double would lose digits of numbers."""
    frames: list[pl.DataFrame] = []
    records: list[dict[str, str | None]] = []
    bad: list[tuple[int, str]] = []

    def flush() -> None:
        columns = list(dict.fromkeys(key for record in records for key in record))
        schema = {key: pl.Int64 if key == "row" else pl.String for key in columns}
        frames.append(pl.DataFrame(records, schema=schema))
        records.clear()

    for number, line in enumerate(text.split("\n")):
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
