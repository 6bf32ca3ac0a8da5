"""The data folder that an importer writes: tables in parts, rejected rows, manifest and counts.

New tables are written to `DATA/import-work/` and replace the old ones when all are complete, so a
failed import leaves the old data. The old manifest is removed first and the new one is put in place
last, so a half-replaced folder is never taken for a complete one.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from karma_ray.artifacts import (
    exists,
    join,
    move,
    open_filesystem,
    write_json,
    write_manifest,
    write_table,
)
from karma_ray.data.config import PrepareConfig
from karma_ray.data.schema import (
    EVENTS,
    EXAMPLES,
    ITEMS,
    QUARANTINE,
    QUERY_MATCHES,
    SEQUENCES,
    check_columns,
)
from karma_ray.data.table_hash import table_hash
from karma_ray.data.validation import named_ids
from karma_ray.data.work_folder import remove_work
from karma_ray.errors import InputError, TooManyBadRows

_SCHEMAS = {
    "items": ITEMS,
    "other_items": ITEMS,
    "events": EVENTS,
    "query_matches": QUERY_MATCHES,
    "quarantine_import": QUARANTINE,
    "sequences": SEQUENCES,
    "examples/split=valid": EXAMPLES,
    "examples/split=test": EXAMPLES,
}
# Files of an import or of a later preparation, all of which a new import replaces.
_OWNED = (
    "items", "other_items", "events", "query_matches", "quarantine_import", "sequences", "examples",
    "quarantine", "truth", "description.html", "description.json", "prepared.json",
    "manifest.json",
)  # fmt: skip

ROWS_PER_PART = 1_000_000

_WORK = "import-work"


class DataFolder:
    """Writes DATA in parts and counts rows; used in a `with` block, completed by `finish`."""

    def __init__(
        self, uri: str, *, count_users: bool = True, goes_on_with: Collection[str] = ()
    ) -> None:
        """Raise InputError if `uri` contains anything but data of an earlier import.

        Without `count_users` the users are not held in memory, and `finish` is told their number.
        What a killed import has left is removed, but not the folders `goes_on_with` in `work`.
        """
        self.uri, self.work = uri, join(uri, _WORK)
        self.quarantined: Counter[str] = Counter()
        self.rows: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()
        self._parts: Counter[str] = Counter()
        self._pending: dict[str, list[pa.Table]] = {}
        self._count_users = count_users
        self._users: set[str] = set()
        self._item_ids: list[pa.Array] = []
        self._digest = hashlib.sha256()
        self._goes_on_with = goes_on_with
        _check_ours(uri)

    def __enter__(self) -> DataFolder:
        fs, path = open_filesystem(self.work)
        fs.invalidate_cache()
        for name in fs.ls(path, detail=False) if fs.isdir(path) else ():
            if name.rsplit("/", 1)[-1] not in self._goes_on_with:
                fs.rm(name, recursive=True)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        refused = isinstance(error, InputError | TooManyBadRows)
        if self._goes_on_with and error is not None and not refused:
            return  # the next attempt goes on with what is finished
        for name in self._goes_on_with:
            remove_work(join(self.work, name))
        _remove(self.uri, _WORK)
        fs, path = open_filesystem(self.uri)
        if fs.isdir(path) and not fs.ls(path):
            fs.rmdir(path)

    def add(self, name: str, table: pl.DataFrame | pa.Table) -> None:
        """Append a part to the table `name`, cast to its schema."""
        arrow = table.to_arrow() if isinstance(table, pl.DataFrame) else table
        if arrow.num_rows == 0 and self._parts[name]:
            return
        arrow = check_columns(arrow, _SCHEMAS[name], f"{name} of {self.uri}")
        write_table(arrow, join(self.work, name), f"part-{self._parts[name]:05d}")
        # Rejected rows contain the path of their file, and other items are no part of any run.
        if name not in ("quarantine_import", "other_items"):
            self._digest.update(f"{name} {table_hash(arrow)}".encode())
        self._parts[name] += 1
        self.rows[name] += arrow.num_rows
        if name == "items":
            self._item_ids.append(arrow.column("item_id"))
            self._counts["with_image"] += arrow.num_rows - arrow.column("image").null_count
        elif name == "events":
            if self._count_users:
                self._users.update(arrow.column("user_id").unique().to_pylist())
            self._counts.update(event_counts(arrow, self.item_ids))
        elif name == "sequences":
            self._users.update(arrow.column("user_id").unique().to_pylist())
            trained = pc.sum(pc.list_flatten(arrow.column("loss_mask"))).as_py()
            self._counts["training_clicks"] += trained or 0
        elif name.startswith("examples"):
            self._users.update(arrow.column("user_id").unique().to_pylist())

    def append(self, name: str, table: pl.DataFrame | pa.Table) -> None:
        """Append rows to the table `name`, in parts whose size does not depend on the calls.

        Call `finish` after it, which writes the last part.
        """
        arrow = table.to_arrow() if isinstance(table, pl.DataFrame) else table
        arrow = check_columns(arrow, _SCHEMAS[name], f"{name} of {self.uri}")
        pending = self._pending.setdefault(name, [])
        pending.append(arrow)
        size = ROWS_PER_PART if name == "events" else ROWS_PER_PART // 10
        if sum(part.num_rows for part in pending) >= size:
            whole = pa.concat_tables(pending)
            stop = whole.num_rows - whole.num_rows % size
            for start in range(0, stop, size):
                self.add(name, whole.slice(start, size))
            self._pending[name] = [whole.slice(stop)]

    def flush(self) -> None:
        """Write what `append` keeps."""
        for name, pending in self._pending.items():
            self.add(name, pa.concat_tables(pending))
        self._pending.clear()

    def count(self, name: str, num_rows: int, of_rows: str, counts: Mapping[str, int]) -> None:
        """Count a part of the table `name` that a task has written to `work`.

        `of_rows` is its `table_hash`, and `counts` are its `event_counts`.
        """
        self._digest.update(f"{name} {of_rows}".encode())
        self._parts[name] += 1
        self.rows[name] += num_rows
        self._counts.update(counts)

    @property
    def item_ids(self) -> pa.Array:
        """The ids of the items so far."""
        chunks = [part for ids in self._item_ids for part in ids.chunks]
        return pa.concat_arrays([pa.array([], pa.string()), *chunks])

    def reject(self, frame: pl.DataFrame, source_file: str, reason: str) -> None:
        """Quarantine the rows of `frame`; its column `row`, if present, is the row number."""
        self.quarantine(rejected_rows(frame, source_file, reason))

    def quarantine(self, rows: pl.DataFrame) -> None:
        """Quarantine `rejected_rows`, and count their reasons."""
        if rows.height:
            self.quarantined.update(Counter(rows["reason"].to_list()))
            self.append("quarantine_import", rows)

    def finish(
        self,
        *,
        name: str,
        query_source: str,
        negative_source: str,
        licence: str,
        notes: list[str],
        presplit: bool = False,
        cutoffs: Mapping[str, str] | None = None,
        num_users: int | None = None,
    ) -> dict[str, Any]:
        """Write the manifest (and `prepared.json` of a pre-split source); returns the manifest.

        Its `data_hash` is computed from the values of the tables, so it is the same on every
        machine; records of finished runs identify their data by it. `cutoffs` are those that a
        preparation takes (Cutoffs.iso).
        """
        self.flush()
        users = len(self._users) if num_users is None else num_users
        counts = {"users": users, "items": self.rows["items"]}
        counts |= {
            k: self.rows[k] for k in ("other_items", "events", "sequences") if self._parts[k]
        }
        for split in ("valid", "test"):
            if self._parts[f"examples/split={split}"]:
                counts[f"{split}_examples"] = self.rows[f"examples/split={split}"]
        counts |= dict(self._counts)
        facts: dict[str, Any] = {
            "query_source": query_source,
            "negative_source": negative_source,
            "counts": counts,
            "quarantined": dict(self.quarantined),
        }
        if presplit:
            times = {"valid_start": None, "test_start": None}
            prepared = {"prepare": asdict(PrepareConfig()), "presplit": True, **times, **facts}
            write_json(prepared, join(self.work, "prepared.json"))
        manifest = write_manifest(
            self.work, "data", name=name, **facts, data_hash=self._digest.hexdigest()[:16],
            licence=licence, notes=notes, presplit=presplit, **dict[str, Any](cutoffs or {}),
        )  # fmt: skip
        self.publish()
        return manifest

    @property
    def num_pages_with_negatives(self) -> int:
        """Number of pages so far with a click and an item that was shown but not clicked."""
        return self._counts["pages_with_negatives"]

    def publish(self) -> None:
        """Replace an earlier import by the new tables."""
        for name in reversed(_OWNED):
            _remove(self.uri, name)
        for name in _OWNED:
            if exists(new := join(self.work, name)):
                move(new, join(self.uri, name))


def event_counts(events: pa.Table, item_ids: pa.Array) -> dict[str, int]:
    """Count clicks and pages of EVENTS, and those that preparation will quarantine, if any."""
    clicked, exposed = events.column("clicked_item_ids"), events.column("exposed_item_ids")
    lengths = pc.list_value_length(clicked)
    wider = pc.greater(pc.fill_null(pc.list_value_length(exposed), 0), lengths)
    pages = pc.and_(wider, pc.greater(lengths, 0))
    counts = {
        "clicks": pc.sum(lengths).as_py() or 0, "pages_with_negatives": pc.sum(pages).as_py() or 0,
    }  # fmt: skip
    clicks = pc.list_flatten(clicked)
    unknown = pc.invert(pc.is_in(clicks, value_set=named_ids(clicks, item_ids)))
    if count := pc.sum(unknown).as_py() or 0:
        pages = pc.list_parent_indices(clicked).filter(unknown)
        counts["clicks_on_unknown_items"] = count
        counts["pages_with_unknown_clicks"] = pc.count_distinct(pages).as_py()
    return counts


NO_ROWS = pl.DataFrame(
    schema={"record": pl.String, "source_file": pl.String, "row": pl.Int64, "reason": pl.String}
)
"""The QUARANTINE of nothing."""


def rejected_rows(frame: pl.DataFrame, source_file: str, reason: str) -> pl.DataFrame:
    """Return the QUARANTINE of the rows of `frame`; its column `row` is the row number."""
    if frame.is_empty():
        return NO_ROWS
    row = pl.col("row").cast(pl.Int64) if "row" in frame.columns else pl.lit(None, pl.Int64)
    return frame.select(
        pl.struct(pl.exclude("row")).struct.json_encode().alias("record"),
        pl.lit(source_file).alias("source_file"),
        row.alias("row"),
        pl.lit(reason).alias("reason"),
    )


def _check_ours(uri: str) -> None:
    fs, path = open_filesystem(uri)
    if not exists(uri):
        return
    if not fs.isdir(path):
        raise InputError("OUT", uri, "is a file, not a folder")
    ours = exists(join(uri, "manifest.json")) or exists(join(uri, _WORK))
    if fs.ls(path) and not ours:
        raise InputError("OUT", uri, "is not empty and holds no manifest.json of an earlier import")


def _remove(uri: str, name: str) -> None:
    fs, path = open_filesystem(join(uri, name))
    if fs.exists(path):
        fs.rm(path, recursive=True)
