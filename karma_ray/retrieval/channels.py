"""The channels beside the model: words (BM25), affinity to attributes, and popularity.

A search team serves several lists of candidates. These three need no training, only the items and
the training clicks, and give the lists of the floors `bm25`, `affinity` and
`query_filter_popular`. They are stored beside the index, in its order, as arrays that processes
map into memory.

Legend: I items, M items that match a query, K results of a channel, T steps of a history.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from karma_ray.artifacts import join, read_manifest, read_table, remove, write_manifest, write_table
from karma_ray.baselines.popularity import CLICK_COLUMNS, training_clicks
from karma_ray.data.catalog import Catalog
from karma_ray.data.prepared import Postings, PreparedData, terms
from karma_ray.errors import InputError
from karma_ray.node_cache import complete_folder, local_copy
from karma_ray.retrieval.channel_tastes import Tastes
from karma_ray.retrieval.channel_words import Words
from karma_ray.retrieval.index import check_parent

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Rows = NDArray[np.int64]
    Mask = NDArray[np.bool_]

CHANNELS = ("bm25", "affinity", "popularity")
KIND = "channels"
DEPTH = 200
"""Length of every channel's list."""
_BLOCK = 256


@dataclass(frozen=True)
class Matches:
    """The items that a query matches, as `QueryMatches` says."""

    known: Mapping[str, Rows]
    """Rows of the queries in the truth table, where there is one."""
    postings: Postings

    def rows(self, query: str | None) -> Rows | None:
        """Return the rows [M], ascending; None if all items match."""
        if not query or not query.strip():
            return None
        found = self.known[query] if query in self.known else self.postings.with_all(terms(query))
        return np.asarray(found, np.int64) if len(found) else None


@dataclass(frozen=True)
class Asked:
    """One request, as far as the channels have computed it."""

    history: Rows  # [T] rows of the index, repeated clicks too
    matches: Rows | None  # [M]; None if all items match
    by_query: NDArray[np.float32]  # [I] BM25 of the query
    by_history: NDArray[np.float32]  # [I] BM25 of the history's items
    gains: NDArray[np.float64]
    """What each value of each attribute adds to the affinity."""


@dataclass(frozen=True)
class Channels:
    """Rankers without weights, over the rows of an index."""

    words: Words
    tastes: Tastes
    matches: Matches
    parents: Mapping[str, str]
    """Content hashes of the index and the items that they were made from."""

    @classmethod
    def of(
        cls, data: PreparedData, item_ids: list[str], parents: Mapping[str, str] | None = None
    ) -> Channels:
        """Build the channels of prepared data for the items of an index.

        Raises InputError if the data lack one of these items.
        """
        catalog = data.catalog()
        rows = catalog.rows(item_ids)
        if (rows < 0).any():
            missing = item_ids[int(np.argmin(rows))]
            raise InputError("--data", data.uri, f"lacks items of the index, such as {missing}")
        if not np.array_equal(rows, np.arange(catalog.num_items)):
            catalog = Catalog(catalog.table.take(pa.array(rows)).combine_chunks())
        clicks = training_clicks(data.windows(*CLICK_COLUMNS), catalog)
        matches = data.query_matches(catalog)
        known = {query: matches.rows(query) for query in matches.known_queries}
        return cls(
            Words.of(catalog.each_text()), Tastes.of(catalog.table, clicks),
            Matches(known, catalog.derived(Postings.of)), dict(parents or {}),
        )  # fmt: skip

    @property
    def num_items(self) -> int:
        """I."""
        return self.words.num_items

    def asked(self, query: str | None, history: Rows) -> Asked:
        """Compute what all channels need of a request; `history` [T] has rows of the index."""
        steps = np.sort(history)
        return Asked(
            history, self.matches.rows(query), self.words.scores(self.words.of_query(query)),
            self.words.scores(self.words.of_history(steps)), self.tastes.gains(steps),
        )  # fmt: skip

    def lists(self, asked: Asked, allowed: Mask | None = None, k: int = DEPTH) -> dict[str, Rows]:
        """Return the best rows [K] of every channel, best first, equal ones by row.

        With `allowed` [I] only these items count. A list of words has items with a word only.
        """
        bm25 = asked.by_query + asked.by_history
        if allowed is not None:
            bm25[~allowed] = 0.0
        popular = self._popular(asked.matches, allowed, k)
        affine = popular if not len(asked.history) else self._affine(asked, allowed, k)
        best = top_rows(bm25, k)
        return {"bm25": best[bm25[best] > 0], "affinity": affine, "popularity": popular}

    def _affine(self, asked: Asked, allowed: Mask | None, k: int) -> Rows:
        first = _of(asked.matches, allowed)
        if first is not None:
            first = first[top_rows(self.tastes.affinity(asked.gains, first), k)]
            if len(first) == k:
                return first
        values = self.tastes.affinity(asked.gains)
        k -= 0 if first is None else len(first)
        if allowed is not None:
            values[~allowed] = -np.inf
        if asked.matches is not None:
            values[asked.matches] = -np.inf
        rest = top_rows(values, k)
        rest = rest[values[rest] > -np.inf]
        return rest if first is None else np.concatenate([first, rest])

    def _popular(self, matches: Rows | None, allowed: Mask | None, k: int) -> Rows:
        first = _of(matches, allowed)
        if first is not None:
            first = first[top_rows(self.tastes.clicks[first], k)]
            if len(first) == k:
                return first
        order = self.tastes.order
        if allowed is not None:
            order = order[allowed[order]]
        if matches is None:
            return order[:k].astype(np.int64)
        rest = order[: k + len(matches)]
        rest = rest[~among(rest, matches)]
        return np.concatenate([first, rest])[:k].astype(np.int64)

    def save(self, folder: str, weights: Mapping[str, Any], **facts: Any) -> None:
        """Write arrays, terms and known queries; `weights` says how the channels are blended."""
        with complete_folder(folder) as draft:
            for name, texts in (
                ("words", self.words.numbers), ("terms", self.matches.postings.numbers),
                ("queries", self.matches.known),
            ):  # fmt: skip
                write_table(pa.table({name: pa.array(list(texts), pa.string())}), draft, name)
            for name, values in self._arrays():
                np.save(f"{draft}/{name}.npy", values)
            write_manifest(draft, KIND, parents=self.parents, num_items=self.num_items,
                           depth=DEPTH, weights=dict(weights), **facts)  # fmt: skip
            if "://" in folder:
                remove(folder)  # a store has no folder that could be replaced at once

    def _arrays(self) -> Iterator[tuple[str, NDArray[Any]]]:
        words, tastes, matches = self.words, self.tastes, self.matches
        for name in ("ends", "items", "impact", "text_ends", "text_terms", "text_shares"):
            yield f"words-{name}", getattr(words, name)
        for name in ("clicks", "order", "codes"):
            yield f"tastes-{name}", getattr(tastes, name)
        yield "tastes-base", np.concatenate([np.empty(0), *tastes.base])
        yield "tastes-sizes", np.array([len(base) for base in tastes.base], np.int64)
        yield "matches-ends", matches.postings.ends
        yield "matches-items", matches.postings.items
        sizes = [len(rows) for rows in matches.known.values()]
        yield "known-ends", np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        yield "known-rows", np.concatenate([np.empty(0, np.int64), *matches.known.values()])

    @classmethod
    def load(cls, folder: str, index_hash: str | None = None) -> Channels:
        """Map the arrays of a folder; raises SkewError if they are of another index than
        `index_hash`, and InputError when files are missing or damaged."""
        manifest = read_manifest(folder, KIND)
        if index_hash is not None:
            check_parent(manifest["parents"], "index", index_hash, folder)
        files = local_copy(folder)

        def array(name: str) -> Any:
            try:
                # A view, as slices of a mapped array itself take ten times as long.
                return np.asarray(np.load(join(files, f"{name}.npy"), mmap_mode="r"))
            except (OSError, EOFError, ValueError) as error:
                raise InputError("channels", folder, f"is damaged ({error})") from None

        def numbers(name: str) -> dict[str, int]:
            column = read_table(join(files, f"{name}.parquet")).column(name).to_pylist()
            return {text: number for number, text in enumerate(column)}

        of_words = ("ends", "items", "impact", "text_ends", "text_terms", "text_shares")
        base = np.split(array("tastes-base"), np.cumsum(array("tastes-sizes"))[:-1])
        clicks, order, codes = (array(f"tastes-{name}") for name in ("clicks", "order", "codes"))
        rows = np.split(array("known-rows"), array("known-ends")[1:-1])
        postings = Postings(numbers("terms"), array("matches-ends"), array("matches-items"))
        return cls(
            Words(numbers("words"), *(array(f"words-{name}") for name in of_words)),
            Tastes(clicks, order, codes, base if codes.shape[1] else []),
            Matches(dict(zip(numbers("queries"), rows, strict=False)), postings),
            manifest["parents"],
        )


def top_rows(values: NDArray[Any], k: int) -> Rows:  # [n] -> [min(k, n)]
    """Return the places of the `k` highest values, highest first, equal ones in their order.

    The maxima of blocks bound what is looked at: at least `k` values are as high as the k-th
    highest maximum.
    """
    blocks = len(values) // _BLOCK
    if blocks > k:
        highest = values[: blocks * _BLOCK].reshape(blocks, _BLOCK).max(1)
        places = np.flatnonzero(values >= np.partition(highest, blocks - k)[blocks - k])
    else:
        places = np.arange(len(values))
    if len(places) > 4 * k:  # many are equal, or there are few blocks
        found = values[places]
        bound = np.partition(found, len(found) - k)[len(found) - k]
        equal = places[found == bound]
        above = places[found > bound]
        places = np.sort(np.concatenate([above, equal[: k - len(above)]]))
    order = np.argsort(-values[places], kind="stable")[:k]
    found_rows: Rows = places[order]
    return found_rows


def among(rows: NDArray[Any], known: Rows) -> Mask:  # [n], ascending [M] -> [n]
    """Return which rows are in an ascending list that is not empty."""
    places = np.minimum(np.searchsorted(known, rows), len(known) - 1)
    found: Mask = known[places] == rows
    return found


def _of(matches: Rows | None, allowed: Mask | None) -> Rows | None:
    return matches if matches is None or allowed is None else matches[allowed[matches]]
