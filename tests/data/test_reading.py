"""Damaged Parquet files: what can be read is, and what cannot is told with file, row and reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from karma_ray.data.fragments import list_fragments, read_fragment
from karma_ray.data.reading import (
    NO_FILE,
    NO_GROUP,
    Lost,
    check_lost,
    quarantine_of,
    require_damage,
    stream_rows,
)
from karma_ray.errors import InputError, TooManyBadRows
from tests.data.damage import spoil

ROWS = pa.table({"n": list(range(3_000)), "text": [f"row {n}" for n in range(3_000)]})


def write(folder: Path, name: str = "a.parquet", table: pa.Table = ROWS) -> Path:
    folder.mkdir(exist_ok=True)
    pq.write_table(table, folder / name, row_group_size=1_000, compression="zstd")
    return folder / name


def read(file: Path, columns: list[str] | None = None) -> tuple[pa.Table | None, pa.Table]:
    """The rows of a file that can be read, if any, and the quarantine of the others."""
    found = list(stream_rows(str(file), columns))
    tables = [part[1] for part in found if not isinstance(part, Lost)]
    rows = pa.concat_tables(tables) if tables else None
    return rows, quarantine_of(part for part in found if isinstance(part, Lost))


def test_a_sound_file_is_read_whole(tmp_path: Path) -> None:
    table, quarantine = read(write(tmp_path))
    assert table is not None and table.equals(ROWS) and quarantine.num_rows == 0
    starts = [part[0] for part in stream_rows(str(tmp_path / "a.parquet"), batch_rows=700)
              if not isinstance(part, Lost)]  # fmt: skip
    assert starts == [0, 700, 1000, 1700, 2000, 2700]
    table, _ = read(tmp_path / "a.parquet", ["n", "not there"])
    assert table is not None and table.column_names == ["n"]
    middle = [part[0] for part in stream_rows(str(tmp_path / "a.parquet"), groups=(1, 2))
              if not isinstance(part, Lost)]  # fmt: skip
    assert middle == [1000]


def test_a_damaged_row_group_costs_its_rows_alone(tmp_path: Path) -> None:
    file = write(tmp_path)
    spoil(file, 1)
    table, quarantine = read(file)
    assert table is not None
    assert table["n"].to_pylist() == [*range(1_000), *range(2_000, 3_000)]
    (row,) = quarantine.to_pylist()
    assert (row["source_file"], row["row"], row["reason"]) == (str(file), 1_000, NO_GROUP)
    assert '"rows": 1000' in row["record"]
    fragments, _ = list_fragments(str(tmp_path))
    with pytest.raises(InputError, match=r"a\.parquet.* is damaged in row group 1"):
        read_fragment(str(tmp_path), fragments[1].path, fragments[1].row_group)


def test_a_file_that_was_cut_is_lost_whole(tmp_path: Path) -> None:
    file = write(tmp_path)
    write(tmp_path, "b.parquet")
    file.write_bytes(file.read_bytes()[:-9])
    table, quarantine = read(file)
    assert table is None
    assert [(r["row"], r["reason"]) for r in quarantine.to_pylist()] == [(None, NO_FILE)]
    with pytest.raises(InputError, match="is not Parquet"):
        list_fragments(str(tmp_path))


def test_text_that_is_not_utf8_is_damage(tmp_path: Path) -> None:
    content = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(np.array([0, 2], np.int32)), pa.py_buffer(b"\xff\xfe")]
    )
    file = write(tmp_path, "a.parquet", pa.table({"text": content}))
    table, quarantine = read(file)
    assert quarantine["reason"].to_pylist() == [NO_GROUP]
    assert table is None


def test_too_large_a_share_of_the_bytes_is_refused() -> None:
    lost = [Lost("a", None, None, 1.0, "cut"), Lost("b", 0, 5, 0.5, "spoilt")]
    sizes = {"a": 100, "b": 100, "c": 800}
    check_lost(lost, sizes, 0.2, "events")
    with pytest.raises(TooManyBadRows, match=r"events: 2 of 3 files .* 15% of the bytes"):
        check_lost(lost, sizes, 0.1, "events")
    check_lost([], {}, 0.0, "events")
    assert quarantine_of(lost)["row"].to_pylist() == [None, 0]


def test_an_error_of_the_store_is_no_damage(tmp_path: Path) -> None:
    require_damage(OSError("Corrupt snappy compressed data."))
    for error in (PermissionError("no"), OSError(5, "Input/output error"), TimeoutError()):
        with pytest.raises(OSError):
            require_damage(error)
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "gone.parquet")
