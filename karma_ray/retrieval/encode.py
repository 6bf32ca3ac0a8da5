"""Item embeddings: encoding them in this process, and the table that stores them.

The Ray job and the evaluation call the same `encode_catalog`. Where a history item only needs its
row and its vector, the table replaces the catalogue.
Legend: I items, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pyarrow as pa
import torch
from torch import nn
from tqdm import tqdm

from karma_ray.artifacts import read_manifest, read_table, write_manifest, write_table
from karma_ray.data.batch import upload
from karma_ray.data.vectors import mapped_vectors, vectors_of
from karma_ray.errors import SkewError
from karma_ray.retrieval.finite import check_finite
from karma_ray.retrieval.index import check_parent
from karma_ray.retrieval.known_vectors import COLUMN, Hashes, hash_column, hashes_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from karma_ray.model.recall import RecallModel

MANIFEST_KIND = "item_embeddings"
CPU_BATCH = 256
"""Items that a CPU encodes at once."""
GPU_SLOTS = 32_768
"""Slots of a padded batch that a GPU encodes at once."""
PADDING = 0.04
"""Largest share of padding in a batch of more than a few items."""
WAITING = 2**26
"""Numbers that wait on a GPU, a quarter of a gigabyte, before they are moved."""


def encode_catalog(
    model: nn.Module,
    tokens: NDArray[Any],  # [I, L]
    lengths: NDArray[Any],  # [I]
    batch_size: int | None = None,
    precision: str = "float32",
    rows: NDArray[np.int64] | None = None,  # [I]
    encode: Callable[..., torch.Tensor] | None = None,
    progress: bool = False,
    slots: int | None = None,
) -> NDArray[np.float32]:  # [I, D]
    """Encode every item, in the given order, on the model's device. Its mode is restored.

    `encode` is a function of the model with the arguments of a RecallModel's `encode_items`, which
    is the default. With `progress` a terminal shows how far it is.

    `rows` are catalogue rows for multimodal encoders (default: 0 to I - 1). Batches have items of
    similar length, so there is little padding. Apart from rounding the result does not depend on
    the batch of an item; `item_batches` says what they are by default.
    """
    device = next(model.parameters()).device
    encode = encode or cast("RecallModel", model).encode_items
    was_training = model.training
    model.eval()
    order = np.argsort(lengths, kind="stable")
    of_catalog = np.arange(len(lengths)) if rows is None else rows
    moved: list[NDArray[np.float32]] = []
    parts: list[torch.Tensor] = []  # not waited for, so that a GPU is not idle between batches
    bar = tqdm(total=len(order), unit="text", disable=None if progress else True, leave=False)
    with bar, torch.inference_mode(), autocast(device, precision):
        for some in item_batches(order, lengths, device, batch_size, slots):
            width = max(1, int(lengths[some].max()))
            batch = upload(torch.from_numpy(tokens[some, :width].astype(np.int64)), device)
            sizes = upload(torch.from_numpy(lengths[some].astype(np.int64)), device)
            places = torch.from_numpy(of_catalog[some])
            parts.append(encode(batch, sizes, places).float())
            if device.type == "cpu" or sum(part.numel() for part in parts) > WAITING:
                moved, parts = [*moved, *(part.cpu().numpy() for part in parts)], []
            bar.update(len(some))
    moved += [part.cpu().numpy() for part in parts]
    model.train(was_training)
    if not moved:
        return np.zeros((0, 0), np.float32)
    result = np.empty((len(order), moved[0].shape[1]), np.float32)
    result[order] = np.concatenate(moved)
    return result


def item_batches(
    order: NDArray[np.int64], lengths: NDArray[Any], device: torch.device, size: int | None,
    slots: int | None = None,
) -> Iterator[NDArray[np.int64]]:  # fmt: skip
    """Yield the items of each batch; `order` is by rising lengths.

    A batch has `size` items, or as many as fit into `slots` when they are padded; if more than
    PADDING of it would be padding, it is smaller, down to an eighth. Without either these are
    CPU_BATCH items on a CPU, and GPU_SLOTS slots, however padded, elsewhere.
    """
    most = 1.0 if slots is None else PADDING
    if size is None and slots is None:
        size, slots = (CPU_BATCH, None) if device.type == "cpu" else (None, GPU_SLOTS)
    start = 0
    while start < len(order):
        count = size or 1
        if slots is not None:
            some = np.maximum(lengths[order[start : start + slots]].astype(np.int64), 1)
            padded = some * np.arange(1, len(some) + 1)  # of a batch that ends with this item
            dense = (padded - some.cumsum() <= most * padded) | (padded <= slots // 8)
            fitting = np.flatnonzero(dense & (padded <= slots))
            count = int(fitting[-1]) + 1 if len(fitting) else 1
        yield order[start : start + count]
        start += count


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return a bfloat16 autocast if asked for, otherwise a context that does nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


@dataclass(frozen=True)
class ItemTable:
    """Ids, titles and embeddings of the items by row; an `ItemRows` for the collator."""

    item_ids: list[str]
    titles: list[str]
    embeddings: NDArray[np.float32]  # [I, D]
    parents: Mapping[str, str]
    categories: list[str | None] | None = None
    """The category of every item, if the catalogue has categories."""
    contents: Hashes | None = None
    """Hashes [I] of what was encoded, if they are known."""

    @cached_property
    def _row_of(self) -> dict[str, int]:
        return {item_id: row for row, item_id in enumerate(self.item_ids)}

    @property
    def num_items(self) -> int:
        """Number of items I."""
        return len(self.item_ids)

    @cached_property
    def content_ids(self) -> NDArray[np.int64]:
        """Every item has its own content, since requests compare no negatives."""
        return np.arange(self.num_items, dtype=np.int64)

    def row(self, item_id: str) -> int:
        """Return the row number of an item, -1 for an unknown one."""
        return self._row_of.get(item_id, -1)

    def rows(self, ids: Sequence[str]) -> NDArray[np.int64]:
        """Return the row numbers [n] of item ids; -1 for unknown ones."""
        return np.fromiter((self._row_of.get(i, -1) for i in ids), dtype=np.int64, count=len(ids))

    def in_order(self, item_ids: Sequence[str]) -> ItemTable:
        """Return the same table with its rows in the order of `item_ids`.

        Raises SkewError unless both have the same items.
        """
        rows = self.rows(item_ids)
        missing = [i for i, row in zip(item_ids, rows, strict=True) if row < 0]
        if missing or len(item_ids) != self.num_items:
            raise SkewError(
                f"the item embeddings hold {self.num_items} items, {len(item_ids)} were expected, "
                f"{len(missing)} of them have no embedding (for example {missing[:3]}); "
                "run jobs/embed.py and jobs/index.py again"
            )
        if np.array_equal(rows, np.arange(self.num_items)):
            return self
        return self.take(rows)

    def take(self, rows: NDArray[np.int64]) -> ItemTable:
        """Return some rows of the table."""
        return ItemTable(
            [self.item_ids[row] for row in rows],
            [self.titles[row] for row in rows],
            self.embeddings[rows],
            self.parents,
            None if self.categories is None else [self.categories[row] for row in rows],
            None if self.contents is None else self.contents[rows],
        )

    def to_arrow(self) -> pa.Table:
        """Return the columns of the table on disk."""
        return embedding_rows(
            self.item_ids, self.titles, self.embeddings, self.categories, self.contents
        )


def embedding_rows(
    item_ids: Sequence[str],
    titles: Sequence[str],
    embeddings: NDArray[np.float32],
    categories: Sequence[str | None] | None = None,
    contents: Hashes | None = None,
) -> pa.Table:
    """Return one `item_embeddings` row per item.

    Titles, and categories if the catalogue has any, make it possible to build and serve an index
    without it. Raises KarmaRayError on embeddings that are not finite, as no search would find
    those items.
    """
    check_finite(item_ids, embeddings)
    values = pa.array(np.ascontiguousarray(embeddings).reshape(-1), pa.float32())
    columns = {
        "item_id": pa.array(list(item_ids), pa.string()),
        "embedding": pa.FixedSizeListArray.from_arrays(values, embeddings.shape[1]),
        "title": pa.array(list(titles), pa.string()),
    }
    if categories is not None:
        columns["category"] = pa.array(list(categories), pa.string())
    if contents is not None:
        columns[COLUMN] = hash_column(contents)
    return pa.table(columns)


def save_embeddings(table: ItemTable, folder: str, **facts: Any) -> dict[str, Any]:
    """Write `table` as one Parquet file with its manifest and `facts`; returns the manifest."""
    write_table(table.to_arrow(), folder)
    return write_embedding_manifest(folder, table.parents, *table.embeddings.shape, **facts)


def write_embedding_manifest(
    folder: str, parents: Mapping[str, str], num_items: int, width: int, **facts: Any
) -> dict[str, Any]:
    """Write the manifest last, as it marks the folder complete."""
    return write_manifest(
        folder, MANIFEST_KIND, parents=parents, num_items=num_items, width=width, **facts
    )


def load_embeddings(
    folder: str, bundle_hash: str | None = None, *, mapped: bool = False
) -> ItemTable:
    """Read item embeddings, or with `mapped` map the node's copy, which its processes share.

    Raises InputError when they are missing or unfinished, KarmaRayError when they are not finite,
    and SkewError when they were not made by the bundle with `bundle_hash`, if given.
    """
    facts = read_manifest(folder, MANIFEST_KIND)
    parents = facts["parents"]
    if bundle_hash is not None:
        check_parent(parents, "bundle", bundle_hash, folder)
    table = read_table(folder, without=["embedding", COLUMN] if mapped else [])
    if mapped:
        embeddings = mapped_vectors(folder)
    else:
        embeddings = vectors_of(table.column("embedding").combine_chunks())
    item_ids = table.column("item_id").to_pylist()
    check_finite(item_ids, embeddings, folder)
    titles = table.column("title").to_pylist()
    has_categories = "category" in table.column_names
    categories = table.column("category").to_pylist() if has_categories else None
    return ItemTable(item_ids, titles, embeddings, parents, categories, hashes_of(table))
