"""Conversion of list columns to padded arrays of steps, vectorised over all windows.

Legend: B windows, T steps, N list elements of all windows, K of them that became steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from karma_ray.data.catalog import Catalog


class ItemRows(Protocol):
    """The used part of a catalogue; in serving, an embedding table takes its place."""

    @property
    def content_ids(self) -> np.ndarray: ...

    def rows(self, ids: Sequence[str]) -> np.ndarray: ...


@dataclass(frozen=True)
class StepColumns:
    """Names of the list columns that hold the steps of a window."""

    items: str
    queries: str
    times: str
    pages: str | None = None
    current: str | None = None  # column of the query after the last step, if there is one


TRAINING = StepColumns("item_ids", "queries", "timestamps", pages="page_ids")
REQUEST = StepColumns("history_item_ids", "history_queries", "history_timestamps", current="query")


@dataclass(frozen=True)
class Steps:
    """Padded arrays of steps, and the list element that each step comes from."""

    items: np.ndarray  # [B, T] catalogue rows, 0 at padding
    item_mask: np.ndarray  # [B, T]
    step_mask: np.ndarray  # [B, T]
    group: np.ndarray  # [B, T] equal for steps of one page or time, -1 for padding
    query: np.ndarray  # [B, T] into `texts`; 0: none
    texts: list[str]  # the distinct queries; the first is empty
    sizes: np.ndarray  # [B] list elements of each window
    kept: np.ndarray  # [K] indices of the list elements that became steps
    window: np.ndarray  # [K]
    step: np.ndarray  # [K]

    @classmethod
    def of(cls, rows: pa.Table, columns: StepColumns, catalog: ItemRows, limit: int) -> Steps:
        """Return the last `limit` steps of each window whose items are in the catalogue.

        A current query becomes one more step, without an item. Raises ValueError when the lists
        of a row differ in length.
        """
        sizes = list_sizes(rows.column(columns.items))
        ids = elements(rows.column(columns.items), sizes)
        found = catalog_rows(catalog, ids)
        kept = np.flatnonzero(found >= 0)
        window = np.repeat(np.arange(len(sizes)), sizes)[kept]
        counts = np.bincount(window, minlength=len(sizes))
        step = places(counts) - np.maximum(counts - limit, 0)[window]
        kept, window, step = kept[step >= 0], window[step >= 0], step[step >= 0]
        # A training batch without any known item still has one step, which is padding.
        fewest = 1 if columns.current is None else 0
        shape = (len(sizes), max(fewest, int(step.max(initial=-1)) + 1))

        def padded(values: np.ndarray, fill: Any) -> np.ndarray:
            result = np.full(shape, fill, values.dtype)
            result[window, step] = values[kept]
            return result

        queries = elements(rows.column(columns.queries), sizes)
        current = rows.column(columns.current).combine_chunks() if columns.current else None
        codes, texts = _coded(queries, current)
        mask = padded(np.ones(len(found), bool), False)
        steps = cls(
            items=padded(found, 0),
            item_mask=mask,
            step_mask=mask.copy(),
            group=padded(_groups(rows, columns, sizes), -1),
            query=padded(codes[: len(queries)], 0),
            texts=texts,
            sizes=sizes,
            kept=kept,
            window=window,
            step=step,
        )
        return steps if current is None else steps._followed_by(codes[len(queries) :])

    def _followed_by(self, query: np.ndarray) -> Steps:
        """Add one step at the end of each window, in its own group."""

        def grown(values: np.ndarray, fill: Any) -> np.ndarray:
            return np.pad(values, ((0, 0), (0, 1)), constant_values=fill)

        at = np.arange(len(self.sizes)), self.step_mask.sum(1)
        longer = replace(
            self,
            items=grown(self.items, 0),
            item_mask=grown(self.item_mask, False),
            step_mask=grown(self.step_mask, False),
            group=grown(self.group, -1),
            query=grown(self.query, 0),
        )
        longer.step_mask[at] = True
        # Group numbers have gaps where steps are left out, and may exceed the number of steps.
        longer.group[at] = longer.group.max(initial=-1) + 1
        longer.query[at] = query
        return longer


def list_sizes(column: Any) -> np.ndarray:
    """Return the lengths [B] int64 of the lists of a column; 0 for a missing list."""
    sizes = pc.fill_null(pc.list_value_length(column), 0)
    return np.asarray(sizes.to_numpy(zero_copy_only=False), np.int64)


def flattened(column: Any) -> pa.Array:
    """Return the elements [N] of all lists of a column, concatenated."""
    values = pc.list_flatten(column)
    return values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values


def elements(column: Any, sizes: np.ndarray) -> pa.Array:
    """Return the elements [N] of a column with `sizes` [B]; null for windows without a list.

    Raises ValueError when a list is neither empty nor as long as its window.
    """
    there = list_sizes(column)
    values = flattened(column)
    if np.array_equal(there, sizes):
        return values
    if np.any((there != sizes) & (there > 0)):
        raise ValueError("the lists of a row differ in length")
    has = np.repeat(there > 0, sizes)
    return values.take(pa.array(np.cumsum(has) - 1, mask=~has))


def places(counts: np.ndarray) -> np.ndarray:
    """Return 0, 1, .. counts[0] - 1, 0, 1, .. counts[1] - 1, ..."""
    before = np.cumsum(counts) - counts
    numbers: np.ndarray = np.arange(counts.sum()) - np.repeat(before, counts)
    return numbers


def catalog_rows(catalog: ItemRows, ids: pa.Array) -> np.ndarray:
    """Return the catalogue rows [N] int64 of ids, -1 for unknown ones; looks up distinct ids."""
    coded = ids.dictionary_encode()
    # A catalogue reads Arrow; an embedding table holds a dictionary of Python strings.
    known = isinstance(catalog, Catalog)
    found = catalog.rows(coded.dictionary if known else coded.dictionary.to_pylist())
    found = np.append(found, -1)
    rows: np.ndarray = found[pc.fill_null(coded.indices, len(found) - 1).to_numpy()]
    return rows


def _coded(queries: pa.Array, current: Any) -> tuple[np.ndarray, list[str]]:
    """Return numbers of the queries and current queries, and the texts they refer to."""
    if current is not None:
        queries = pa.concat_arrays([queries, current.cast(queries.type)])
    coded = queries.dictionary_encode()
    texts: list[str] = coded.dictionary.to_pylist()
    number = np.array([index if text else 0 for index, text in enumerate(texts, 1)] + [0], np.int64)
    return number[pc.fill_null(coded.indices, len(texts)).to_numpy()], ["", *texts]


def _groups(rows: pa.Table, columns: StepColumns, sizes: np.ndarray) -> np.ndarray:
    """Give equal numbers [N] to consecutive steps of one page or time, which the mask separates."""
    place = places(sizes)
    same = _repeats(elements(rows.column(columns.times), sizes))
    if columns.pages is not None:
        same |= _repeats(elements(rows.column(columns.pages), sizes))
    at = np.arange(len(place))
    begin = np.maximum.accumulate(np.where(same & (place > 0), 0, at))
    numbers: np.ndarray = begin - (at - place)
    return numbers


def _repeats(values: pa.Array) -> np.ndarray:
    """Whether each element [N] equals the previous one; null equals nothing."""
    same = np.zeros(len(values), bool)
    if len(values) > 1:
        equal = pc.fill_null(pc.equal(values[1:], values[:-1]), False)
        same[1:] = equal.to_numpy(zero_copy_only=False)
    return same
