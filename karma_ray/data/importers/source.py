"""Reading what a source folder holds, with messages that name what is missing."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from karma_ray.artifacts import exists, join, open_filesystem
from karma_ray.data.identifiers import id_text
from karma_ray.errors import InputError


def find_file(src: str, *names: str) -> str:
    """The first of `names` that lies in the folder `src`; raises InputError naming them all."""
    if not exists(src):
        raise InputError("SRC", src, "does not exist")
    for name in names:
        if exists(join(src, name)):
            return join(src, name)
    raise InputError("SRC", src, "does not hold the expected file", choices=names)


def find_files(src: str, start: str, end: str) -> list[str]:
    """Sorted paths of the files `start*end` in the folder `src`; may be empty."""
    fs, path = open_filesystem(src)
    return [str(fs.unstrip_protocol(name)) for name in sorted(fs.glob(f"{path}/{start}*{end}"))]


def check_names(found: Iterable[str], required: Iterable[str], source: str) -> None:
    """Raise InputError naming the first required column that `source` does not have."""
    names = list(found)
    for name in required:
        if name not in names:
            raise InputError("column", name, f"is missing in {source}", choices=names)


def read_parquet(uri: str, required: Iterable[str], ids: Iterable[str]) -> pl.DataFrame:
    """A Parquet file's required columns; those that are `ids` as text, whatever their type."""
    names = list(required)
    fs, path = open_filesystem(uri)
    with fs.open(path, "rb") as source:
        file = _open_parquet(source, uri, names)
        frame = pl.from_arrow(file.read(columns=names))
    assert isinstance(frame, pl.DataFrame)
    return with_ids(frame, ids, uri)


def with_ids(frame: pl.DataFrame, ids: Iterable[str], source: str) -> pl.DataFrame:
    """`frame` with those of its columns that are `ids` as text; raises as `id_text` does."""
    texts = [id_text(frame[c], f"{source}: column {c}") for c in ids if c in frame.columns]
    return frame.with_columns(texts)


def stream_parquet(
    uri: str, required: Iterable[str], ids: Iterable[str], num_rows: int
) -> Iterator[pl.DataFrame]:
    """`read_parquet` in batches of at most `num_rows`: images stay bounded."""
    names = list(required)
    fs, path = open_filesystem(uri)
    with fs.open(path, "rb") as source:
        file = _open_parquet(source, uri, names)
        for batch in file.iter_batches(batch_size=num_rows, columns=names):
            frame = pl.from_arrow(pa.Table.from_batches([batch]))
            assert isinstance(frame, pl.DataFrame)
            yield with_ids(frame, ids, uri)


def _open_parquet(source: Any, uri: str, names: list[str]) -> Any:
    try:
        file = pq.ParquetFile(source)
    except pa.ArrowInvalid as error:
        raise InputError("file", uri, f"is not Parquet ({error})") from None
    check_names(file.schema_arrow.names, names, uri)
    return file


def stream_lines(uri: str) -> Iterator[tuple[int, str]]:
    """Row numbers from 0 and lines of a text file, without the line end; empty lines left out."""
    fs, path = open_filesystem(uri)
    # newline="\n": str.splitlines would also split at control characters that JDsearch uses.
    with fs.open(path, "r", encoding="utf-8", newline="\n") as source:
        for row, line in enumerate(source):
            if text := line.rstrip("\r\n"):
                yield row, text


def stream_json(
    uri: str, required: Iterable[str]
) -> Iterator[tuple[int, str, dict[str, Any] | None]]:
    """Row number, line and record of a JSON-lines file; the record is None when it is no object.

    The first readable record must hold all `required` keys, or InputError names what is missing.
    """
    checked = False
    for row, line in stream_lines(uri):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            record = None
        if not isinstance(record, dict):
            yield row, line, None
            continue
        if not checked:
            check_names(record, required, uri)
            checked = True
        yield row, line, record
