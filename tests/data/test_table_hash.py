"""What a table's hash follows, and what it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from karma_ray.data.table_hash import table_hash

COLUMNS: dict[str, tuple[pa.DataType, list[Any]]] = {
    "text": (pa.string(), ["a", None, "", "b\u00e4r"]),
    "bytes": (pa.binary(), [b"\x00", None, b"", b"xy"]),
    "ids": (pa.list_(pa.string()), [["a", "b"], [], None, [None, "c"]]),
    "nested": (pa.list_(pa.list_(pa.string())), [[["a"], []], None, [], [None]]),
    "time": (pa.timestamp("us", "UTC"), [1, None, 3, 4]),
    "count": (pa.int32(), [1, None, -3, 4]),
    "flag": (pa.bool_(), [True, False, None, False]),
    "share": (pa.float32(), [0.5, None, -1.0, 2.0]),
    "vector": (pa.list_(pa.float32(), 2), [[1.0, 2.0], [3.0, 4.0], None, [5.0, 6.0]]),
    "record": (pa.struct([("a", pa.int64())]), [{"a": 1}, None, {"a": None}, {"a": 2}]),
}


def table() -> pa.Table:
    return pa.table({name: pa.array(rows, kind) for name, (kind, rows) in COLUMNS.items()})


def test_how_a_table_is_stored_does_not_change_its_hash(tmp_path: Path) -> None:
    whole = table()
    expected = table_hash(whole)
    longer = pa.concat_tables([whole.slice(2), whole, whole.slice(0, 1)])
    assert table_hash(pa.concat_tables([whole.slice(0, 1), whole.slice(1)])) == expected
    assert table_hash(longer.slice(2, 4)) == expected
    written = whole.drop_columns(["vector"])  # older writers know no null of a fixed length
    for options in ({"compression": "zstd"}, {"compression": "none", "row_group_size": 1}):
        pq.write_table(written, tmp_path / "table.parquet", **options)
        assert table_hash(pq.read_table(tmp_path / "table.parquet")) == table_hash(written)
    text = whole.select(["text"])
    assert table_hash(text) == table_hash(pl.from_arrow(text).to_arrow())  # type: ignore[union-attr]
    coded = pa.table({"text": text.column("text").dictionary_encode()})
    assert table_hash(text) == table_hash(coded)


def test_bytes_under_a_null_do_not_count() -> None:
    values = pa.array(["a", "hidden", "c"])
    present = np.packbits([True, False, True], bitorder="little").tobytes()
    buffers = [pa.py_buffer(present), *values.buffers()[1:]]
    hiding = pa.Array.from_buffers(pa.string(), 3, buffers)
    assert hiding.to_pylist() == ["a", None, "c"]
    assert table_hash(pa.table({"x": hiding})) == table_hash(pa.table({"x": ["a", None, "c"]}))


@pytest.mark.parametrize("name", COLUMNS)
def test_every_value_counts(name: str) -> None:
    kind, rows = COLUMNS[name]
    hashes = {table_hash(pa.table({name: pa.array(rows, kind)}))}
    for place in range(len(rows)):
        other = rows[(place + 1) % len(rows)]
        changed = [*rows[:place], other, *rows[place + 1 :]]
        hashes.add(table_hash(pa.table({name: pa.array(changed, kind)})))
    assert len(hashes) == len(rows) + 1


def test_names_order_and_boundaries_count() -> None:
    tables = [
        {"a": ["x", "y"], "b": ["x", "y"]},
        {"b": ["x", "y"], "a": ["x", "y"]},
        {"a": ["y", "x"], "b": ["x", "y"]},
        {"a": ["xy", ""], "b": ["x", "y"]},
        {"a": [["x"], ["y"]], "b": ["x", "y"]},
        {"a": [["x", "y"], []], "b": ["x", "y"]},
    ]
    assert len({table_hash(pa.table(columns)) for columns in tables}) == len(tables)
    assert table_hash(pa.table({"a": pa.array([], pa.string())})) != table_hash(pa.table({}))
