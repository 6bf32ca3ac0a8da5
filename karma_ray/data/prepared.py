"""Access to prepared data, and to the items that a query matches."""

from __future__ import annotations

import re
import shlex
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from karma_ray.artifacts import (
    data_files,
    exists,
    join,
    open_filesystem,
    read_json,
    read_table,
    value_hash,
)
from karma_ray.data.catalog import Catalog
from karma_ray.data.config import PrepareConfig
from karma_ray.data.fragments import row_blocks
from karma_ray.data.held_out import held_out_categories, held_out_rows
from karma_ray.data.schema import EXAMPLES, QUERY_MATCHES, SEQUENCES, check_columns
from karma_ray.errors import InputError

SPLITS = ("valid", "test")
CACHED_ROWS = 2**24
"""Rows that are kept of the queries asked last, 128 MiB."""
PREPARE_VERSION = 3
"""Raised when the code of `prepare` changes its output, so that data are prepared again."""


@dataclass(frozen=True)
class PreparedData:
    """A folder with sequences/, examples/ and prepared.json, whose content is `facts`."""

    uri: str
    facts: dict[str, Any]

    @classmethod
    def load(cls, uri: str) -> PreparedData:
        """Open prepared data; raises InputError when the folder is missing or not prepared."""
        require_data(uri)
        if not exists(join(uri, "prepared.json")):
            how = f"make it with: python jobs/prepare.py --data {shlex.quote(uri)}"
            raise InputError("--data", uri, f"is not prepared: it has no prepared.json; {how}")
        return cls(uri, read_json(join(uri, "prepared.json")))

    @property
    def items_uri(self) -> str:
        """The data folder with items/; it differs from `uri` if `prepare` wrote elsewhere."""
        return str(self.facts.get("data") or self.uri)

    def sequences(self) -> pa.Table:
        """Read all training windows (SEQUENCES) into memory; see `windows`."""
        table = read_table(join(self.uri, "sequences"))
        return check_columns(table, SEQUENCES, "sequences").select(SEQUENCES.names)

    def windows(self, *columns: str) -> Iterator[pa.Table]:
        """Yield the training windows in order, some thousand at a time; default: all columns."""
        names = list(columns) or SEQUENCES.names
        schema = pa.schema([SEQUENCES.field(name) for name in names])
        for rows in row_blocks(join(self.uri, "sequences"), names):
            yield check_columns(rows, schema, "sequences").select(names)

    def first_windows(self, count: int) -> pa.Table:
        """Return the first `count` training windows; raises InputError when there is none."""
        parts: list[pa.Table] = []
        for part in self.windows():
            parts.append(part)
            if sum(table.num_rows for table in parts) >= count:
                break
        if not parts:
            raise InputError("training data", join(self.uri, "sequences"), "holds no rows")
        return pa.concat_tables(parts).slice(0, count)

    def examples(self, split: str) -> pa.Table:
        """Read the examples (EXAMPLES) of `valid` or `test`, one per click."""
        if split not in SPLITS:
            raise InputError("split", split, choices=SPLITS)
        table = read_table(join(self.uri, "examples", f"split={split}"))
        return check_columns(table, EXAMPLES, "examples").select(EXAMPLES.names)

    def catalog(self) -> Catalog:
        """Load the catalogue of these data."""
        return Catalog.load(self.items_uri)

    def query_matches(self, catalog: Catalog | None = None) -> QueryMatches:
        """Return the matches of queries in `catalog` (loaded if not given)."""
        folder = join(self.items_uri, "query_matches")
        truth = None
        if exists(folder):
            truth = check_columns(read_table(folder), QUERY_MATCHES, "query_matches")
        return QueryMatches(catalog or self.catalog(), truth)

    def held_out(self, catalog: Catalog) -> np.ndarray | None:
        """Return the mask [I] of items that `prepare.hold_out` kept out of training, or None."""
        made_with = self.facts.get("prepare") or {}
        if not made_with.get("hold_out"):
            return None
        categories = catalog.column("category") or []
        share, seed = made_with["hold_out"], made_with["seed"]
        return held_out_rows(categories, held_out_categories(categories, share, seed))


def require_data(uri: str) -> None:
    """Raise InputError when there is no data folder at `uri`."""
    if not exists(uri):
        raise InputError("--data", uri, "does not exist")


def fingerprint(uri: str) -> str:
    """Return a cheap hash of the input: the manifest's content hash, names and sizes of the files
    in events/ and items/, and PREPARE_VERSION."""
    fs, root = open_filesystem(uri)
    sizes = []
    for table in ("events", "items"):
        if exists(join(uri, table)):
            names = data_files(join(uri, table), (".parquet",))
            sizes += [(name[len(root) :], fs.size(name)) for name in names]
    return value_hash([PREPARE_VERSION, read_data_manifest(uri).get("content_hash"), sizes])


def read_data_manifest(uri: str) -> dict[str, Any]:
    """Read DATA/manifest.json, or return {} if there is none."""
    path = join(uri, "manifest.json")
    return dict(read_json(path)) if exists(path) else {}


def differences(facts: Mapping[str, Any], config: PrepareConfig) -> dict[str, tuple[Any, Any]]:
    """Return the fields in which `facts` and `config` differ: name -> (there, wanted).

    `num_partitions` is ignored, as it does not change any row. Data that were prepared before a
    field existed are as with its default.
    """
    newer = {name: getattr(PrepareConfig, name) for name in ("hold_out", "max_user_events")}
    made_with = {**newer, **(facts.get("prepare") or {})}
    wanted = {name: value for name, value in asdict(config).items() if name != "num_partitions"}
    return {
        name: (made_with.get(name), value)
        for name, value in wanted.items()
        if made_with.get(name) != value
    }


_WORD = re.compile(r"[^\W_]+")
_CJK = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]")


def terms(text: str) -> set[str]:
    """Return the lower-cased words of a text; jieba segments Chinese and Japanese."""
    text = text.lower()
    if not _CJK.search(text):
        return set(_WORD.findall(text))
    import jieba  # loaded only if needed, because its dictionary takes a second

    return {word for piece in jieba.cut_for_search(text) for word in _WORD.findall(piece)}


class QueryMatches:
    """The catalogue rows that match a query.

    If the truth table has the query, these are its items; otherwise the items whose title, brand,
    category and text contain every term of it. An empty query, or one that matches nothing,
    matches all rows.
    """

    def __init__(self, catalog: Catalog, truth: pa.Table | None = None) -> None:
        self._catalog = catalog
        self._all = np.arange(catalog.num_items, dtype=np.int64)
        self._cache: dict[str, np.ndarray] = {}
        self._room = CACHED_ROWS
        self._truth: dict[str, list[str]] = {}
        if truth is not None:
            rows = truth.select(QUERY_MATCHES.names).drop_null().to_pylist()
            for query, item_ids in (row.values() for row in rows):
                self._truth.setdefault(query, []).extend(item_ids)

    def rows(self, query: str | None) -> np.ndarray:
        """Return the rows [m] int64, ascending, of the items that `query` matches."""
        if not query or not query.strip():
            return self._all
        if query not in self._cache:
            found = self._find(query)
            self._room -= len(found)
            if self._room < 0:  # begin again rather than keep a list for every query of a log
                self._cache, self._room = {}, CACHED_ROWS - len(found)
            self._cache[query] = found
        return self._cache[query]

    def _find(self, query: str) -> np.ndarray:
        if query in self._truth:
            found = np.unique(self._catalog.rows(self._truth[query]))
            found = found[found >= 0]
        else:
            found = self._lexical(query)
        return found if found.size else self._all

    def _lexical(self, query: str) -> np.ndarray:
        return self._catalog.derived(Postings.of).with_all(terms(query))

    @property
    def known_queries(self) -> list[str]:
        """The queries whose items the truth table says."""
        return list(self._truth)


@dataclass(frozen=True)
class Postings:
    """The rows of the items whose text has a term, for every term."""

    numbers: dict[str, int]
    ends: np.ndarray  # [V + 1]
    items: np.ndarray  # [n] ascending for each term

    @classmethod
    def of(cls, catalog: Catalog) -> Postings:
        """Read all texts of a catalogue."""
        numbers: dict[str, int] = {}
        found, sizes = array("i"), array("i")
        for text in catalog.each_text():
            there = terms(text)
            found.extend(numbers.setdefault(term, len(numbers)) for term in there)
            sizes.append(len(there))
        term, counts = np.array(found), np.array(sizes)
        owner = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        ends = np.zeros(len(numbers) + 1, np.int64)
        np.cumsum(np.bincount(term, minlength=len(numbers)), out=ends[1:])
        return cls(numbers, ends, owner[np.argsort(term, kind="stable")])

    def rows(self, term: str) -> np.ndarray:
        """Return the rows [m] int64 of a term, ascending."""
        return self._rows(term).astype(np.int64)

    def with_all(self, wanted: set[str]) -> np.ndarray:
        """Return the rows [m] int64, ascending, of the items with every term; none for no term."""
        lists = sorted((self._rows(term) for term in wanted), key=len)
        found = lists[0] if lists else self.items[:0]
        for rows in lists[1:]:
            if not len(found):
                break
            places = np.minimum(np.searchsorted(rows, found), len(rows) - 1)
            found = found[rows[places] == found]
        return found.astype(np.int64)

    def _rows(self, term: str) -> np.ndarray:
        number = self.numbers.get(term)
        if number is None:
            return self.items[:0]
        return self.items[self.ends[number] : self.ends[number + 1]]
