"""Exposures: what each page showed, what was clicked, and the clicks strictly before the page.

A page is as in `prepare` (data/sessions.py), but pages without clicks count too: without them
every click-through rate would be too high. The history ends before the page's time, so neither
the page's own clicks nor those of another page at the same time are in it.

Legend: P pages, C clicks, N shown items, I items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from karma_ray.artifacts import join, read_manifest, write_json, write_table
from karma_ray.data.catalog import Catalog
from karma_ray.data.config import PrepareConfig
from karma_ray.data.event_parts import EventPart
from karma_ray.data.fragments import row_blocks
from karma_ray.data.prepare_work import PrepareWork
from karma_ray.data.schema import STRINGS, TIME
from karma_ray.data.splits import Cutoffs
from karma_ray.data.steps import flattened, list_sizes

if TYPE_CHECKING:
    import polars as pl

KIND = "exposures"
SPLITS = ("train", "valid", "test")
ROWS = pa.list_(pa.int32())
"""Row numbers of the catalogue."""

EXPOSURES = pa.schema(
    [
        pa.field("user_id", pa.string()),
        pa.field("timestamp", TIME),
        pa.field("query", pa.string()),
        pa.field("page_id", pa.string()),
        pa.field("history_rows", ROWS),
        pa.field("history_queries", STRINGS),
        pa.field("history_timestamps", pa.list_(TIME)),
        pa.field("candidate_rows", ROWS),
        pa.field("clicked", pa.list_(pa.bool_())),
        pa.field("later_rows", ROWS),
        pa.field("later_sessions", ROWS),
    ]
)
"""One row per page, path-partitioned by `split=train|valid|test`, in time order in each file.

`later_rows` are the user's next clicks strictly after the page and within its split, and
`later_sessions` the sessions of these: the number of the user's page that began each. No model
that serves may read them; a teacher may.
"""


@dataclass(frozen=True)
class Exposures:
    """A complete folder of exposures; `facts` is its manifest."""

    uri: str
    facts: dict[str, Any]

    @classmethod
    def load(cls, uri: str) -> Exposures:
        """Open a folder; raises InputError when it is not one."""
        return cls(uri, read_manifest(uri, KIND))

    def split(self, name: str) -> str:
        """Return the folder of one split."""
        return join(self.uri, f"split={name}")

    @property
    def num_features(self) -> int:
        """F: how many features the column `features` has for each candidate; 0 without it."""
        return int(self.facts.get("num_features", 0))

    def feature_sample(self, most: int) -> np.ndarray:
        """Return the features [n, F] of at most about `most` training candidates."""
        parts, count = [np.zeros((0, self.num_features), np.float32)], 0
        for rows in row_blocks(self.split("train"), ["features"]):
            values = flattened(rows.column("features")).to_numpy()
            parts.append(values.reshape(-1, self.num_features))
            if (count := count + len(parts[-1])) >= most:
                break
        return np.concatenate(parts)

    def num_pages(self, split: str) -> int:
        """Number of pages of a split."""
        return int(self.facts["counts"][split]["pages"])


@dataclass(frozen=True)
class ExposureBuild:
    """A task: turns the checked events of one partition of users into its files."""

    work: PrepareWork
    parts: Sequence[EventPart]
    num_partitions: int
    cutoffs: Cutoffs
    config: PrepareConfig
    items_uri: str
    max_history: int
    held_out: np.ndarray | None = None
    """Mask [I] of items that training must not know."""

    def __call__(self, partition: int) -> None:
        """Build one partition; its report in the work folder is written last."""
        from karma_ray.data.passes import partition_rows  # polars
        from karma_ray.data.sessions import build_pages
        from karma_ray.data.user_rows import newest

        name, build = f"part-{partition:05d}", self.work.build
        events, _ = partition_rows(
            self.work, self.parts, partition, self.num_partitions, self.config
        )
        pages = build_pages(newest(events, self.config.max_user_events))
        catalog = Catalog.load(self.items_uri)
        tables = build_exposures(pages, self.cutoffs, catalog, self.max_history, self.held_out)
        for split, table in tables.items():
            write_table(table, join(build, f"split={split}"), name)
        counts = {split: counted(table) for split, table in tables.items()}
        report = {"partition": partition, "counts": counts}
        write_json(report, join(build, "reports", f"{name}.json"))


def counted(table: pa.Table) -> dict[str, int]:
    """Return how many pages, candidates and clicks exposures have."""
    clicked = flattened(table.column("clicked"))
    return {"pages": table.num_rows, "candidates": len(clicked), "clicks": clicked.true_count}


def build_exposures(
    pages: pl.DataFrame, cutoffs: Cutoffs, catalog: Catalog, max_history: int,
    held_out: np.ndarray | None = None,
) -> dict[str, pa.Table]:  # fmt: skip
    """Return the exposures of whole users by split, from pages of `build_pages`.

    Pages whose shown items are unknown are left out, though their clicks are in histories. An
    item that was bought without a click on that page is neither a click nor a non-click. The
    items `held_out` (mask [I]) are in no training row.
    """
    split_of = np.searchsorted(
        [cutoffs.valid_start, cutoffs.test_start], pages["time"].to_numpy(), side="right"
    )
    ends = [cutoffs.valid_start, cutoffs.test_start, np.iinfo(np.int64).max]
    tables = {}
    for number, (split, end) in enumerate(zip(SPLITS, ends, strict=True)):
        hidden = held_out if split == "train" else None
        read = _Pages.of(pages, catalog, hidden)
        tables[split] = read.exposures(np.flatnonzero(split_of == number), end, max_history)
    return tables


@dataclass(frozen=True)
class _Lists:
    """A ragged array: the values of page p are `values[offsets[p]:offsets[p + 1]]`."""

    values: np.ndarray
    offsets: np.ndarray  # [P + 1]

    @property
    def page(self) -> np.ndarray:
        """The page of each value."""
        pages: np.ndarray = np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))
        return pages

    @classmethod
    def by_page(cls, page: np.ndarray, values: np.ndarray, num_pages: int) -> _Lists:
        """`page` must be ascending."""
        counts = np.bincount(page, minlength=num_pages)
        return cls(values, np.concatenate([[0], np.cumsum(counts)]))

    @classmethod
    def of(cls, column: pl.Series, catalog: Catalog, hidden: np.ndarray | None) -> _Lists:
        """Read a column of item ids as catalogue rows, without unknown and hidden items."""
        lists = column.to_arrow()
        page = np.repeat(np.arange(len(lists)), list_sizes(lists))
        rows = catalog.rows(flattened(lists).cast(pa.string()))
        kept = rows >= 0
        if hidden is not None:
            kept &= ~hidden[rows]
        return cls.by_page(page[kept], rows[kept], len(lists))


@dataclass(frozen=True)
class _Pages:
    """Pages [P] of whole users by user and time, as arrays."""

    table: pa.Table
    time: np.ndarray  # [P]
    user_start: np.ndarray  # [P] first page of the user
    user_end: np.ndarray  # [P] one past the last
    moment_start: np.ndarray  # [P] first page of the user at that time
    moment_end: np.ndarray  # [P]
    session: np.ndarray  # [P] the user's page, from 0 on, that began the session
    clicks: _Lists
    shown: _Lists
    clicked: np.ndarray  # [N] of `shown`

    @classmethod
    def of(cls, pages: pl.DataFrame, catalog: Catalog, hidden: np.ndarray | None) -> _Pages:
        time, user = pages["time"].to_numpy(), pages["user_id"].rle_id().to_numpy()
        new_user = np.diff(user, prepend=-1) != 0
        new_moment = new_user | (np.diff(time, prepend=0) != 0)
        clicks, shown, bought = (
            _Lists.of(pages[name], catalog, hidden) for name in ("clicked", "exposed", "purchased")
        )
        keys = [lists.page * catalog.num_items + lists.values for lists in (clicks, shown, bought)]
        extra = ~np.isin(keys[0], keys[1]) & (np.diff(shown.offsets) > 0)[clicks.page]
        place = np.argsort(np.concatenate([shown.page, clicks.page[extra]]), kind="stable")
        key = np.concatenate([keys[1], keys[0][extra]])[place]
        clicked = np.isin(key, keys[0])
        kept = clicked | ~np.isin(key, keys[2])
        page, rows = np.divmod(key[kept], catalog.num_items)
        columns = ["user_id", "timestamp", "query", "page_id"]
        of_user, of_moment = _runs(new_user), _runs(new_moment)
        session = pages["session"].to_numpy().astype(np.int64) - of_user[0]
        return cls(
            pages.select(columns).to_arrow().cast(pa.schema([EXPOSURES.field(n) for n in columns])),
            time, *of_user, *of_moment, session, clicks,
            _Lists.by_page(page, rows, len(time)), clicked[kept],
        )  # fmt: skip

    def exposures(self, pages: np.ndarray, end: int, max_history: int) -> pa.Table:
        """Return EXPOSURES of some pages, in time order; later clicks are those before `end`."""
        pages = pages[np.diff(self.shown.offsets)[pages] > 0]
        pages = pages[np.argsort(self.time[pages], kind="stable")]
        before = self.clicks.offsets
        stop = before[self.moment_start[pages]]
        start = np.maximum(before[self.user_start[pages]], stop - max_history)
        # Pages are in time order within a user, so those before `end` come first.
        inside = np.concatenate([[0], np.cumsum(self.time < end)])
        last = self.user_start + inside[self.user_end] - inside[self.user_start]
        after = before[self.moment_end[pages]]
        later = np.minimum(before[np.maximum(last, self.moment_end)[pages]], after + max_history)
        shown = self.shown.offsets[pages], self.shown.offsets[pages + 1]
        of_click = pa.array(self.clicks.page)
        rows = self.table.take(pa.array(pages))
        columns = {
            **{name: rows.column(name) for name in rows.column_names},
            "history_rows": slices(_rows(self.clicks.values), start, stop),
            "history_queries": slices(self.table["query"].take(of_click), start, stop),
            "history_timestamps": slices(self.table["timestamp"].take(of_click), start, stop),
            "candidate_rows": slices(_rows(self.shown.values), *shown),
            "clicked": slices(pa.array(self.clicked), *shown),
            "later_rows": slices(_rows(self.clicks.values), after, later),
            "later_sessions": slices(_rows(self.session[self.clicks.page]), after, later),
        }
        return pa.table(columns, schema=EXPOSURES)


def _rows(values: np.ndarray) -> pa.Array:
    return pa.array(values.astype(np.int32))


def _runs(is_first: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the first place and one past the last of the run that each place is in."""
    first = np.flatnonzero(is_first)
    number = np.cumsum(is_first) - 1
    return first[number], np.append(first[1:], len(is_first))[number]


def slices(values: Any, start: np.ndarray, stop: np.ndarray) -> pa.ListArray:
    """Return the list array of values[start:stop]."""
    from karma_ray.data.steps import places

    sizes = stop - start
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    found = values.take(pa.array(np.repeat(start, sizes) + places(sizes)))
    found = found.combine_chunks() if isinstance(found, pa.ChunkedArray) else found
    return pa.ListArray.from_arrays(pa.array(offsets), found)


def requests_of(rows: pa.Table, item_ids: pa.Array) -> pa.Table:
    """Return pages as requests with item ids, as the retriever and rankers of examples read."""
    history = rows.column("history_rows").combine_chunks()
    named = pa.ListArray.from_arrays(history.offsets, item_ids.take(history.values))
    columns = ["user_id", "timestamp", "query", "page_id", "history_queries", "history_timestamps"]
    return rows.select(columns).append_column("history_item_ids", pa.chunked_array([named]))
