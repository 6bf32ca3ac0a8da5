"""The data folder an importer writes: tables in parts, rejected rows, manifest, counts."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import asdict
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from karma_ray.artifacts import (
    exists,
    join,
    open_filesystem,
    write_json,
    write_manifest,
    write_table,
)
from karma_ray.data.schema import (
    EVENTS,
    EXAMPLES,
    ITEMS,
    QUARANTINE,
    QUERY_MATCHES,
    SEQUENCES,
    check_columns,
)
from karma_ray.data.sessions import PrepareConfig
from karma_ray.data.table_hash import table_hash
from karma_ray.errors import InputError

_SCHEMAS = {
    "items": ITEMS,
    "events": EVENTS,
    "query_matches": QUERY_MATCHES,
    "quarantine_import": QUARANTINE,
    "sequences": SEQUENCES,
    "examples/split=valid": EXAMPLES,
    "examples/split=test": EXAMPLES,
}
# Everything an import or a later preparation leaves here; an import starts from none of it.
_OWNED = (
    "items", "events", "query_matches", "quarantine_import", "sequences", "examples",
    "quarantine", "truth", "prepared.json", "manifest.json",
)  # fmt: skip


class DataFolder:
    """Writes DATA part by part and counts what goes in."""

    def __init__(self, uri: str) -> None:
        """Empty an earlier data folder at `uri`; raises InputError when it is something else."""
        self.uri = uri
        self.quarantined: Counter[str] = Counter()
        self.rows: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()
        self._parts: Counter[str] = Counter()
        self._users: set[str] = set()
        self._digest = hashlib.sha256()
        _clear(uri)

    def add(self, name: str, table: pl.DataFrame | pa.Table) -> None:
        """Append a part to the table `name`, cast to its schema."""
        arrow = table.to_arrow() if isinstance(table, pl.DataFrame) else table
        if arrow.num_rows == 0 and self._parts[name]:
            return
        arrow = check_columns(arrow, _SCHEMAS[name], f"{name} of {self.uri}")
        write_table(arrow, join(self.uri, name), f"part-{self._parts[name]:05d}")
        if name != "quarantine_import":  # rejected rows name the file that they were read from
            self._digest.update(f"{name} {table_hash(arrow)}".encode())
        self._parts[name] += 1
        self.rows[name] += arrow.num_rows
        if name == "items":
            self._counts["with_image"] += arrow.num_rows - arrow.column("image").null_count
        elif name == "events":
            self._users.update(arrow.column("user_id").unique().to_pylist())
            clicked, exposed = arrow.column("clicked_item_ids"), arrow.column("exposed_item_ids")
            lengths = pc.list_value_length(clicked)
            self._counts["clicks"] += pc.sum(lengths).as_py() or 0
            wider = pc.greater(pc.fill_null(pc.list_value_length(exposed), 0), lengths)
            pages = pc.and_(wider, pc.greater(lengths, 0))
            self._counts["pages_with_negatives"] += pc.sum(pages).as_py() or 0
        elif name == "sequences":
            self._users.update(arrow.column("user_id").unique().to_pylist())
            trained = pc.sum(pc.list_flatten(arrow.column("loss_mask"))).as_py()
            self._counts["training_clicks"] += trained or 0
        elif name.startswith("examples"):
            self._users.update(arrow.column("user_id").unique().to_pylist())

    def reject(self, frame: pl.DataFrame, source_file: str, reason: str) -> None:
        """Quarantine the rows of `frame`; its column `row`, when present, is the row number."""
        if frame.height == 0:
            return
        row = pl.col("row").cast(pl.Int64) if "row" in frame.columns else pl.lit(None, pl.Int64)
        record = pl.struct(pl.exclude("row")).struct.json_encode()
        table = frame.select(
            record.alias("record"),
            pl.lit(source_file).alias("source_file"),
            row.alias("row"),
            pl.lit(reason).alias("reason"),
        )
        self.quarantined[reason] += frame.height
        self.add("quarantine_import", table)

    def finish(
        self,
        *,
        name: str,
        query_source: str,
        negative_source: str,
        licence: str,
        notes: list[str],
        presplit: bool = False,
    ) -> dict[str, Any]:
        """Write the manifest (and `prepared.json` of a pre-split source); return the manifest.

        Its `data_hash` is of the tables' values, the same on every machine: by it records of
        finished runs know their data.
        """
        counts = {"users": len(self._users), "items": self.rows["items"]}
        counts |= {k: self.rows[k] for k in ("events", "sequences") if self._parts[k]}
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
            write_json(prepared, join(self.uri, "prepared.json"))
        return write_manifest(
            self.uri, "data", name=name, **facts, data_hash=self._digest.hexdigest()[:16],
            licence=licence, notes=notes, presplit=presplit,
        )  # fmt: skip


def _clear(uri: str) -> None:
    fs, path = open_filesystem(uri)
    if not exists(uri):
        return
    if not fs.isdir(path):
        raise InputError("OUT", uri, "is a file, not a folder")
    if fs.ls(path) and not exists(join(uri, "manifest.json")):
        raise InputError("OUT", uri, "is not empty and holds no manifest.json of an earlier import")
    for name in _OWNED:
        if fs.exists(f"{path}/{name}"):
            fs.rm(f"{path}/{name}", recursive=True)
