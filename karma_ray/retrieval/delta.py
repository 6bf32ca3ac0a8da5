"""What changed in the catalogue since the index was made: new items, and items that are gone.

A delta is a small folder beside the index: the embeddings of new items, and `hidden.json` with the
ids of items that may not be found any more. New items are searched exactly and merged with what
the index finds, so the answer is that of one index over all. An item whose title changed is hidden
and added. A history may still name hidden items, whose embeddings stay.

Legend: I items, E added items, B queries, D width, K results.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from karma_ray.artifacts import RunFolder, join, read_json, read_manifest, remove, write_json
from karma_ray.data.catalog import Catalog
from karma_ray.retrieval.embedding import made_with
from karma_ray.retrieval.encode import ItemTable, load_embeddings, save_embeddings
from karma_ray.retrieval.exact import ExactSearch
from karma_ray.retrieval.index import ItemIndex, check_parent
from karma_ray.retrieval.part_encoder import CatalogEncoder, Contents
from karma_ray.retrieval.parts import delta_of, serve_from, served, to_update

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from karma_ray.model.recall import RecallModel
    from karma_ray.retrieval.engines import Engine
    from karma_ray.retrieval.kinds import IndexKind

    Vectors = NDArray[np.float32]
    Rows = NDArray[np.int64]

HIDDEN = "hidden.json"


@dataclass(frozen=True)
class UpdatedSearch:
    """An engine of search without its hidden rows, and an exact one of what was added."""

    main: Engine
    """Finds the rows 0 to I - 1."""
    num_main: int
    added: Vectors  # [E, D]; rows I to I + E - 1
    hidden: Rows
    """Rows that are never found."""

    @property
    def d(self) -> int:
        """Width D."""
        return int(self.main.d)

    def on(self, device: torch.device) -> UpdatedSearch:
        """Return it with the main engine on a device; what was added stays on the CPU."""
        return dataclasses.replace(self, main=self.main.on(device))

    def tuned(self, kind: IndexKind) -> UpdatedSearch:
        """Return it with other knobs of the main engine."""
        return dataclasses.replace(self, main=self.main.tuned(kind))

    def write(self, folder: Path, stem: str = "") -> None:
        """Raise NotImplementedError: a delta has files of its own."""
        raise NotImplementedError

    def search(
        self, queries: Vectors, k: int, allowed: NDArray[np.bool_] | None = None
    ) -> tuple[Vectors, Rows]:  # [B, D], [I + E] -> [B, K]
        """Return scores and rows of the `k` best, best first, equal ones by row; -1 for none."""
        of_main, of_added = (None, None) if allowed is None else np.split(allowed, [self.num_main])
        depth = min(k + len(self.hidden), self.num_main)
        scores, rows = self.main.search(queries, depth, of_main)
        gone = (rows < 0) | np.isin(rows, self.hidden)
        parts = [(np.where(gone, -np.inf, scores), np.where(gone, -1, rows))]
        if len(self.added):
            engine = ExactSearch(self.added)
            scores, rows = engine.search(queries, min(k, len(self.added)), of_added)
            parts.append((scores, np.where(rows < 0, -1, rows + self.num_main)))
        parts.append((np.full((len(queries), k), -np.inf), np.full((len(queries), k), -1)))
        all_scores, all_rows = (np.concatenate(side, 1) for side in zip(*parts, strict=True))
        order = np.lexsort((all_rows, -all_scores))[:, :k]
        found = np.take_along_axis(all_scores, order, 1).astype(np.float32)
        return found, np.take_along_axis(all_rows, order, 1)


def with_delta(
    table: ItemTable, index: ItemIndex, interest: RecallModel, folder: str
) -> tuple[ItemTable, ItemIndex]:
    """Return table and index with a delta; both must have the same order.

    Raises SkewError when the delta was made for another index.
    """
    delta = load_embeddings(folder)
    check_parent(delta.parents, "index", index.content_hash, folder)
    device = next(interest.parameters()).device
    with torch.inference_mode():
        added = interest.index_vectors(torch.from_numpy(delta.embeddings).to(device))
    gone = set(read_json(join(folder, HIDDEN)))
    engine = UpdatedSearch(
        index.engine, index.num_items, added.float().cpu().numpy(),
        np.array([row for row, i in enumerate(index.item_ids) if i in gone], np.int64),
    )  # fmt: skip
    both = ItemTable(
        [*table.item_ids, *delta.item_ids], [*table.titles, *delta.titles],
        np.concatenate([table.embeddings, delta.embeddings]), table.parents,
        _both(table, delta),
    )  # fmt: skip
    made = read_manifest(folder)["content_hash"]
    index = dataclasses.replace(
        index, engine=engine, item_ids=both.item_ids, titles=both.titles,
        categories=None if index.categories is None else both.categories,
        content_hash=f"{index.content_hash}+{made}",
    )  # fmt: skip
    return both, index


def _both(table: ItemTable, delta: ItemTable) -> list[str | None] | None:
    """Return the categories of all items, if the table has any."""
    if table.categories is None:
        return None
    return [*table.categories, *(delta.categories or [None] * delta.num_items)]


def live_items(table: ItemTable, index: ItemIndex) -> ItemTable:
    """Return a table in the order of an index without the items that are never found."""
    if not isinstance(index.engine, UpdatedSearch):
        return table
    return table.take(np.setdiff1d(np.arange(table.num_items), index.engine.hidden))


def num_live(index: ItemIndex) -> int:
    """Return how many items can be found."""
    hidden = index.engine.hidden if isinstance(index.engine, UpdatedSearch) else ()
    return index.num_items - len(hidden)


def hidden_ids(index: ItemIndex) -> frozenset[str]:
    """Return the ids of items that are never found; one that was added again is found."""
    if not isinstance(index.engine, UpdatedSearch):
        return frozenset()
    gone = {index.item_ids[row] for row in index.engine.hidden}
    return frozenset(gone.difference(index.item_ids[index.engine.num_main :]))


@dataclass(frozen=True)
class Changes:
    """What a delta holds, and what was done for it."""

    added: int
    hidden: int
    encoded: int
    """Items that were encoded now; the others were in the delta before."""
    is_new: bool
    """Whether anything changed since the last delta."""


def update_run(run: str, data: str, precision: str | None = None) -> Changes:
    """Let a run serve the catalogue of `data` as it is now, by a delta; returns what changed.

    Only items that neither the index nor the last delta holds are encoded, in this process, and
    with the precision of the index unless another is given.
    """
    folder = served(run)
    main = load_embeddings(folder.item_embeddings)
    made = read_manifest(folder.item_embeddings).get("made", made_with("float32"))
    precision = precision or made["precision"]
    before, was_hidden = _earlier(folder, main)
    catalog = Catalog.load(data)
    now = _described(catalog, main, Contents.of(folder.bundle, catalog, data))
    read = main.contents is not None
    known, wanted, kept = (_labels(table, read) for table in (main, now, before))
    added = [i for i, label in wanted.items() if known.get(i) != label]
    hidden = [i for i, label in known.items() if wanted.get(i) != label]
    missing = [i for i in added if kept.get(i) != wanted[i]]
    changes = Changes(len(added), len(hidden), len(missing), True)
    if not missing and set(added) == set(kept) and hidden == was_hidden:
        return dataclasses.replace(changes, is_new=False)
    vectors = np.zeros((len(added), main.embeddings.shape[1]), np.float32)
    rows = before.rows(added)
    vectors[rows >= 0] = before.embeddings[rows[rows >= 0]]
    if missing:
        encoder = CatalogEncoder(folder.bundle, data, precision)
        vectors[np.isin(added, missing)] = encoder.encode(catalog.rows(missing)).vectors
    found = dataclasses.replace(now.take(now.rows(added)), embeddings=vectors)
    _write(to_update(run), found, hidden, precision)
    return changes


def _labels(table: ItemTable, read: bool) -> dict[str, tuple[str, str | None, bytes]]:
    """Return what tells of each item that it changed: title, category, and with `read` the hash of
    what is encoded."""
    categories = table.categories or [None] * table.num_items
    hashes = table.contents.tolist() if read and table.contents is not None else None
    labels = zip(table.titles, categories, hashes or [b""] * table.num_items, strict=True)
    return dict(zip(table.item_ids, labels, strict=True))


def _described(catalog: Catalog, main: ItemTable, contents: Contents) -> ItemTable:
    """Return the items of a catalogue without embeddings, described as those of the index are."""
    categories = None if main.categories is None else catalog.categories
    none = np.zeros((catalog.num_items, 0), np.float32)
    hashes = contents.hashes(catalog)
    return ItemTable(catalog.item_ids, catalog.titles, none, {}, categories, hashes)


def _earlier(folder: RunFolder, main: ItemTable) -> tuple[ItemTable, list[str]]:
    """Return the rows and hidden ids of the delta that serves, if there is one."""
    delta = delta_of(folder)
    if delta is None:
        return ItemTable([], [], main.embeddings[:0], {}), []
    return load_embeddings(delta), list(read_json(join(delta, HIDDEN)))


def _write(folder: RunFolder, added: ItemTable, hidden: list[str], precision: str) -> None:
    delta = delta_of(folder)
    assert delta is not None
    remove(delta)
    parents = {
        "bundle": read_manifest(folder.bundle)["content_hash"],
        "item_embeddings": read_manifest(folder.item_embeddings)["content_hash"],
        "index": read_manifest(folder.index)["content_hash"],
    }
    write_json(hidden, join(delta, HIDDEN))
    made = made_with(precision)
    save_embeddings(dataclasses.replace(added, parents=parents), delta, made=made)
    serve_from(folder)
