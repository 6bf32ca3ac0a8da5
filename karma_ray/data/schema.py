"""Schemas of the tables on disk.

Legend: `events` and `items` are input, `sequences` trains, `examples` evaluates.
"""

from __future__ import annotations

import pyarrow as pa

from karma_ray.data.identifiers import id_text
from karma_ray.errors import InputError

TIME = pa.timestamp("us", tz="UTC")
STRINGS = pa.list_(pa.string())

EVENTS = pa.schema(
    [
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("timestamp", TIME, nullable=False),
        pa.field("query", pa.string()),
        pa.field("exposed_item_ids", STRINGS),
        pa.field("clicked_item_ids", STRINGS, nullable=False),
        pa.field("purchased_item_ids", STRINGS),
        pa.field("session_id", pa.string()),
    ]
)
"""One row per result page; `exposed_item_ids` may be empty if unknown."""

ITEMS = pa.schema(
    [
        pa.field("item_id", pa.string(), nullable=False),
        pa.field("title", pa.string(), nullable=False),
        pa.field("text", pa.string()),
        pa.field("brand", pa.string()),
        pa.field("category", pa.string()),
        pa.field("image", pa.binary()),
    ]
)
"""One row per item; further columns are kept. `image` may be text that names files instead."""

SEQUENCES = pa.schema(
    [
        pa.field("user_id", pa.string()),
        pa.field("queries", STRINGS),
        pa.field("item_ids", STRINGS),
        pa.field("timestamps", pa.list_(TIME)),
        pa.field("page_ids", STRINGS),
        pa.field("hard_negative_ids", pa.list_(STRINGS)),
        pa.field("loss_mask", pa.list_(pa.bool_())),
    ]
)
"""One row per window of a user; each training click has `loss_mask` true in exactly one row."""

EXAMPLES = pa.schema(
    [
        pa.field("user_id", pa.string()),
        pa.field("timestamp", TIME),
        pa.field("query", pa.string()),
        pa.field("page_id", pa.string()),
        pa.field("page_positive_ids", STRINGS),
        pa.field("history_queries", STRINGS),
        pa.field("history_item_ids", STRINGS),
        pa.field("history_timestamps", pa.list_(TIME)),
        pa.field("positive_item_id", pa.string()),
        pa.field("hard_negative_ids", STRINGS),
    ]
)
"""One row per click, path-partitioned by `split=valid|test`."""

QUERY_MATCHES = pa.schema([pa.field("query", pa.string()), pa.field("item_ids", STRINGS)])
"""Optional truth: the items that a query names. Written by the toy shop and by importers that
derive queries; otherwise a query matches the items whose text contains all its terms."""

QUARANTINE = pa.schema(
    [
        pa.field("record", pa.string()),
        pa.field("source_file", pa.string()),
        pa.field("row", pa.int64()),
        pa.field("reason", pa.string()),
    ]
)
"""Rejected rows as JSON text, with their origin and the reason."""


def check_columns(table: pa.Table, schema: pa.Schema, source: str) -> pa.Table:
    """Cast `table` to `schema`; further columns are kept after its columns.

    Missing nullable columns are filled with nulls. Text stays text where bytes are expected, as it
    names the file that has them (data/picture_files.py). Floats in a text column are read as ids
    (`identifiers.id_text`): NaN is null and 7.0 is 7. Raises InputError that names the column,
    its type and the expected one when a required column is missing or cannot be cast.
    """
    columns: dict[str, pa.ChunkedArray] = {}
    for field in schema:
        if field.name not in table.column_names:
            if not field.nullable:
                raise InputError(
                    f"{source}: column", field.name, "is missing", choices=table.column_names
                )
            columns[field.name] = pa.chunked_array([pa.nulls(table.num_rows, field.type)])
            continue
        column = table.column(field.name)
        if _of_floats(column.type) and field.type in (pa.string(), STRINGS):
            import polars as pl

            text = id_text(pl.Series(values=column), f"{source}: column {field.name}")
            column = pa.chunked_array([text.to_arrow()])
        named = field.type == pa.binary() and is_text(column.type)
        try:
            columns[field.name] = column.cast(pa.string() if named else field.type)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise InputError(
                f"{source}: column {field.name}",
                str(column.type),
                f"cannot be read as {field.type} ({error})",
            ) from None
    for name in table.column_names:
        columns.setdefault(name, table.column(name))
    return pa.table(columns)


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds strings."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(kind in (pa.string(), pa.large_string(), pa.string_view()))


def _of_floats(kind: pa.DataType) -> bool:
    return bool(pa.types.is_floating(kind.value_type if pa.types.is_list(kind) else kind))
