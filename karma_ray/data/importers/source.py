"""Reading the files of a source folder, with errors that name what is missing."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from karma_ray.artifacts import exists, join, open_filesystem
from karma_ray.data.identifiers import id_text
from karma_ray.data.reading import DAMAGE, require_damage, said
from karma_ray.errors import InputError


def find_file(src: str, *names: str) -> str:
    """Return the first of `names` that exists in `src`; raises InputError that names them all."""
    if not exists(src):
        raise InputError("SRC", src, "does not exist")
    for name in names:
        if exists(join(src, name)):
            return join(src, name)
    raise InputError("SRC", src, "does not hold the expected file", choices=names)


def find_files(src: str, start: str, end: str) -> list[str]:
    """Return the sorted paths of the files `start*end` in the folder `src`; may be empty."""
    fs, path = open_filesystem(src)
    return [str(fs.unstrip_protocol(name)) for name in sorted(fs.glob(f"{path}/{start}*{end}"))]


def check_names(found: Iterable[str], required: Iterable[str], source: str) -> None:
    """Raise InputError that names the first required column which `source` lacks."""
    names = list(found)
    for name in required:
        if name not in names:
            raise InputError("column", name, f"is missing in {source}", choices=names)


def read_parquet(uri: str, required: Iterable[str], ids: Iterable[str]) -> pl.DataFrame:
    """Read the required columns of a Parquet file; the columns `ids` become text."""
    names = list(required)
    fs, path = open_filesystem(uri)
    with fs.open(path, "rb") as source:
        file = _open_parquet(source, uri, names)
        try:
            frame = pl.from_arrow(file.read(columns=names))
        except DAMAGE as error:
            require_damage(error)
            raise InputError("file", uri, f"cannot be read ({said(error)})") from None
    assert isinstance(frame, pl.DataFrame)
    return with_ids(frame, ids, uri)


def with_ids(frame: pl.DataFrame, ids: Iterable[str], source: str) -> pl.DataFrame:
    """Return `frame` with the columns `ids` as text; raises as `id_text` does."""
    texts = [id_text(frame[c], f"{source}: column {c}") for c in ids if c in frame.columns]
    return frame.with_columns(texts)


def stream_parquet(
    uri: str, required: Iterable[str], ids: Iterable[str], num_rows: int
) -> Iterator[pl.DataFrame]:
    """Yield `read_parquet` in batches of at most `num_rows`, to bound the memory for images."""
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
    """Yield row numbers from 0 and the non-empty lines of a text file, without line ends.

    Bytes that are not UTF-8 are written as `\\xff`, which no JSON has.
    """
    fs, path = open_filesystem(uri)
    # As bytes: str.splitlines would also split at control characters that JDsearch uses.
    with fs.open(path, "rb") as source:
        for row, line in enumerate(source):
            if text := line.rstrip(b"\r\n").decode(errors="backslashreplace"):
                yield row, text


def stream_json(
    uri: str, required: Iterable[str]
) -> Iterator[tuple[int, str, dict[str, Any] | None]]:
    """Yield row number, line and record of a JSON-lines file; None if it is not an object.

    The first readable record must have all `required` keys, otherwise InputError names one.
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
