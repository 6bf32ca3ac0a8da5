"""The catalogue: id, title and text of every item, memory-mapped once per node.

Examples contain ids without texts; the collator looks the ids up here. Rows are in the order of
`DATA/items`, without invalid ones (no id, no title, or a repeated id after its first row), so that
a row number has the same meaning in every process. A process holds no item: texts are read from
the mapped copy; the table of ids (item_lookup.py) and the content ids are mapped too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from karma_ray.artifacts import new_file
from karma_ray.data.contents import FORMAT, fill_content_ids
from karma_ray.data.fragments import items_folder, list_fragments, read_fragment
from karma_ray.data.identifiers import MISSING
from karma_ray.data.item_lookup import ItemLookup
from karma_ray.data.memory_map import mapped_array
from karma_ray.data.schema import ITEMS, check_columns
from karma_ray.errors import InputError
from karma_ray.node_cache import known_hash
from karma_ray.node_disk import kept, node_folder

T = TypeVar("T")
CHUNK = 65_536
"""Items whose texts are in memory at once."""


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
        self._content_ids: np.ndarray | None = None
        self._derived: dict[Callable[[Catalog], Any], Any] = {}

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
        return _opened(path)

    def with_contents(self, ids: np.ndarray) -> Catalog:
        """Return the catalogue with other content ids [I], for which more items are duplicates."""
        other = Catalog(self.table, self.copy)
        other._content_ids, other._derived = ids, self._derived
        return other

    def derived(self, make: Callable[[Catalog], T]) -> T:
        """Return what `make` computes of ids and texts, once for all who ask in this process."""
        if make not in self._derived:
            self._derived[make] = make(self)
        return cast(T, self._derived[make])

    @property
    def num_items(self) -> int:
        """Number of items I."""
        return int(self.table.num_rows)

    @cached_property
    def item_ids(self) -> list[str]:
        """The id of every item. This process alone holds the list: gigabytes for 10^7 items."""
        return list(self.table.column("item_id").to_pylist())

    @cached_property
    def titles(self) -> list[str]:
        """The title of every item, held as `item_ids` are."""
        return list(self.table.column("title").to_pylist())

    @cached_property
    def _lookup(self) -> ItemLookup:
        return ItemLookup(self.table.column("item_id"), self.copy)

    def rows(self, ids: Sequence[str] | pa.Array) -> np.ndarray:
        """Return the row numbers [n] int64 of item ids; -1 for unknown ones."""
        return self._lookup.rows(ids if isinstance(ids, pa.Array) else pa.array(ids, pa.string()))

    def column(self, name: str) -> list[Any] | None:
        """Return a column as a list, or None if the catalogue does not have it."""
        return self.table.column(name).to_pylist() if name in self.table.column_names else None

    @property
    def has_categories(self) -> bool:
        """Whether any item has a category."""
        if "category" not in self.table.column_names:
            return False
        sizes = pc.binary_length(self.table.column("category").cast(pa.string()))
        return bool(pc.any(pc.greater(sizes, 0)).as_py())

    @property
    def categories(self) -> list[str | None] | None:
        """The category of every item, or None if no item has one; held as `item_ids` are."""
        return self.column("category") if self.has_categories else None

    def texts(self, start: int = 0, stop: int | None = None, step: int = 1) -> list[str]:
        """Return `title | brand | category | text` of every item, or of a slice of the rows.

        Empty parts are left out.
        """
        rows = self.table[start:stop:step]
        columns = [rows.column(name).to_pylist() for name in _TEXT_COLUMNS]
        return [" | ".join(part for part in parts if part) for parts in zip(*columns, strict=True)]

    def each_text(self) -> Iterator[str]:
        """Yield the texts of all items without holding them."""
        for start in range(0, self.num_items, CHUNK):
            yield from self.texts(start, start + CHUNK)

    def each(self, name: str) -> Iterator[Any]:
        """Yield a column without holding it: `item_id` or `title`, say."""
        for start in range(0, self.num_items, CHUNK):
            yield from self.table.column(name)[start : start + CHUNK].to_pylist()

    @property
    def content_ids(self) -> np.ndarray:
        """Ids [I] int64, equal for duplicates: items with equal normalised texts, unless others
        were given (`with_contents`). The processes of a node share them."""
        if self._content_ids is None:
            self._content_ids = self._contents()
        return self._content_ids

    def _contents(self) -> np.ndarray:
        def fill(numbers: np.ndarray) -> None:
            starts = range(0, self.num_items, CHUNK)
            fill_content_ids(numbers, (self.texts(start, start + CHUNK) for start in starts))

        if self.copy is None:
            fill(numbers := np.empty(self.num_items, np.int64))
            return numbers
        path = self.copy.with_name(f"{self.copy.stem}-{FORMAT}.contents.npy")
        return mapped_array(path, np.int64, (self.num_items,), fill)


@lru_cache(maxsize=2)
def _opened(path: Path) -> Catalog:
    """Open a copy once per process; its name is the hash of its content."""
    return Catalog(pa.ipc.open_file(pa.memory_map(str(path))).read_all(), path)


_TEXT_COLUMNS = ("title", "brand", "category", "text")


def _write_arrow(source: str, path: Path) -> None:
    table = _read_items(source)
    table = table.filter(pa.array(usable_items(table))).combine_chunks()
    with new_file(str(path)) as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


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
