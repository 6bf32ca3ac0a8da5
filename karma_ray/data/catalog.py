"""The catalogue: id, title and text of every item, memory-mapped once per node.

Examples contain ids without texts; the collator looks the ids up here. Rows are in the order of
`DATA/items`, without invalid ones (no id, no title, or a repeated id after its first row), so that
a row number has the same meaning in every process.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from karma_ray.data.fragments import items_folder, list_fragments, read_fragment
from karma_ray.data.identifiers import MISSING
from karma_ray.data.schema import ITEMS, check_columns
from karma_ray.errors import InputError
from karma_ray.node_cache import known_hash
from karma_ray.node_disk import kept, node_folder


def usable_items(table: pa.Table) -> np.ndarray:
    """Return the mask [rows] of items with id and title, for the first occurrence of each id."""
    ids = table.column("item_id")
    titled = pc.greater(pc.utf8_length(pc.utf8_trim_whitespace(table.column("title"))), 0)
    named = pc.invert(pc.is_in(pc.utf8_trim_whitespace(ids), value_set=pa.array([None, *MISSING])))
    usable = pc.fill_null(pc.and_(titled, named), False).to_numpy(zero_copy_only=False).copy()
    candidates = np.flatnonzero(usable)
    codes = pc.dictionary_encode(ids.take(candidates)).combine_chunks().indices.to_numpy()
    _, first = np.unique(codes, return_index=True)
    keep = np.zeros(len(usable), dtype=bool)
    keep[candidates[first]] = True
    return keep


class Catalog:
    """The items by row number. It never reads images."""

    def __init__(self, table: pa.Table, copy: Path | None = None) -> None:
        """`copy` is the Arrow file that the table is mapped from, if there is one."""
        if table.num_rows == 0:
            raise InputError("items", 0, "rows: the catalogue is empty")
        self.table, self.copy = table, copy
        self.item_ids: list[str] = table.column("item_id").to_pylist()
        self.titles: list[str] = table.column("title").to_pylist()
        self._row_of = {item_id: row for row, item_id in enumerate(self.item_ids)}
        self._content_ids: np.ndarray | None = None

    @classmethod
    def load(cls, data_uri: str, cache_dir: str | None = None) -> Catalog:
        """Memory-map the catalogue of a data folder.

        The Arrow copy is kept in `cache_dir` (default: the node's folder) under the content hash
        of the items, so all workers of a node share its pages. One of them hashes and reads them.
        """
        source = items_folder(data_uri)
        folder = Path(cache_dir) if cache_dir else node_folder()
        path = folder / f"{known_hash(source)}.arrow"
        kept(path, lambda: _write_arrow(source, path))
        return cls(pa.ipc.open_file(pa.memory_map(str(path))).read_all(), path)

    def with_contents(self, ids: np.ndarray) -> Catalog:
        """Return the catalogue with other content ids [I], for which more items are duplicates."""
        other = Catalog(self.table, self.copy)
        other._content_ids = ids
        return other

    @property
    def num_items(self) -> int:
        """Number of items I."""
        return len(self.item_ids)

    def rows(self, ids: Sequence[str]) -> np.ndarray:
        """Return the row numbers [n] int64 of item ids; -1 for unknown ones."""
        return np.fromiter(map(self._row_of.get, ids, repeat(-1)), dtype=np.int64, count=len(ids))

    def column(self, name: str) -> list[Any] | None:
        """Return a column as a list, or None if the catalogue does not have it."""
        return self.table.column(name).to_pylist() if name in self.table.column_names else None

    @property
    def categories(self) -> list[str | None] | None:
        """The category of every item, or None if no item has one."""
        found = self.column("category")
        return found if found is not None and any(found) else None

    def texts(self, start: int = 0, stop: int | None = None, step: int = 1) -> list[str]:
        """Return `title | brand | category | text` of every item, or of a slice of the rows.

        Empty parts are left out.
        """
        rows = self.table[start:stop:step]
        columns = [rows.column(name).to_pylist() for name in _TEXT_COLUMNS]
        return [" | ".join(part for part in parts if part) for parts in zip(*columns, strict=True)]

    @property
    def content_ids(self) -> np.ndarray:
        """Ids [I] int64, equal for duplicates: items with equal normalised texts, unless others
        were given (`with_contents`)."""
        if self._content_ids is None:
            seen: dict[str, int] = {}
            normal = (" ".join(text.lower().split()) for text in self.texts())
            self._content_ids = np.array([seen.setdefault(t, len(seen)) for t in normal], np.int64)
        return self._content_ids


_TEXT_COLUMNS = ("title", "brand", "category", "text")


def _write_arrow(source: str, path: Path) -> None:
    table = _read_items(source)
    table = table.filter(pa.array(usable_items(table))).combine_chunks()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    os.replace(temporary, path)


def _read_items(folder: str) -> pa.Table:
    """Read all item rows without images. The files may have different types of ids."""
    fragments, schemas = list_fragments(folder)
    names = list(dict.fromkeys(name for _, schema in schemas for name in schema.names))
    wanted = [name for name in names if name != "image"]
    tables = [check_columns(ITEMS.empty_table(), ITEMS, folder)]
    for fragment in fragments:
        rows = read_fragment(folder, fragment.path, fragment.row_group, wanted)
        tables.append(check_columns(rows, ITEMS, fragment.path))
    try:
        table = pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowTypeError as error:
        raise InputError("items", folder, f"has files with different columns ({error})") from None
    return table.drop_columns(["image"])
