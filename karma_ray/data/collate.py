"""Collation of rows into batches with a table of unique items, so that each is encoded once.

Legend: B windows, T steps, U unique items, V unique queries, H hard negatives, L tokens,
M decoded positions per window, N_v tokens of width d_v of an image. Everything except the token
tables is an index into them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from karma_ray.data.batch import Batch as Batch
from karma_ray.data.draws import DECODED, DROP, HARD, hashed, uniform
from karma_ray.data.prompts import TextMemory, Tokenizer
from karma_ray.data.steps import (
    REQUEST,
    TRAINING,
    ItemRows,
    Steps,
    catalog_rows,
    elements,
    flattened,
    list_sizes,
    places,
)
from karma_ray.data.visual import VisualFeatures
from karma_ray.ranges import Count, CountOrZero, Share


@dataclass(frozen=True)
class CollateConfig:
    """Sizes of a batch, and its random parts."""

    max_history: CountOrZero = 20
    """Largest number of history steps before the current query."""
    max_item_tokens: Count = 24
    """Tokens that are read of an item's text, including the end token; a run prints how long the
    texts are."""
    max_query_tokens: Count = 12
    """Tokens that are read of a query."""
    num_hard_negatives: CountOrZero = 2
    """Hard negatives per step, drawn again in every epoch."""
    drop_query: Share = 0.1
    """Share of the training queries that are replaced by the learned `no_query` vector."""
    num_decoded: CountOrZero = 2
    """Positions per window that are decoded into text: the last and random others; 0: all."""
    visual_features: str = ""
    """Folder written by `jobs/features.py`, for runs with `objective.lambda_img`; empty:
    `visual_features` in the data folder."""


class Collator:
    """Builds batches from training windows, and from requests (evaluation and serving)."""

    def __init__(
        self,
        catalog: ItemRows,
        tokenizer: Tokenizer,
        config: CollateConfig,
        item_tokens: np.ndarray | None = None,
        item_lengths: np.ndarray | None = None,
        visual: VisualFeatures | None = None,
    ) -> None:
        """`item_tokens` [I, L] and `item_lengths` [I] are needed for training batches only, and
        `visual` for runs with a visual term."""
        self.catalog, self.tokenizer, self.config = catalog, tokenizer, config
        self.item_tokens, self.item_lengths = item_tokens, item_lengths
        self.visual = visual
        self._queries = TextMemory(tokenizer, config.max_query_tokens)

    def catalog_tokens(self) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens [I, L] and lengths [I] of the catalogue; not available in serving."""
        assert self.item_tokens is not None and self.item_lengths is not None
        return self.item_tokens, self.item_lengths

    def encode_queries(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens [V, Lq] and token counts [V] of queries."""
        return self._queries.encode(texts)

    def training(self, rows: pa.Table, keys: np.ndarray) -> Batch:
        """Build a batch from `sequences` rows and a key [B] for the random draws of each row.

        Hard negatives, dropped queries and decoded positions have independent draws, so variants
        that ignore one of them get the same batches otherwise.
        """
        # The newest step of a window has a full history before it, as a request has.
        steps = Steps.of(rows, TRAINING, self.catalog, self.config.max_history + 1)
        wanted = elements(rows.column("loss_mask"), steps.sizes).fill_null(False)
        loss_mask = np.zeros_like(steps.step_mask)
        loss_mask[steps.window, steps.step] = wanted.to_numpy(zero_copy_only=False)[steps.kept]
        hard, hard_mask = self._hard_negatives(rows, steps, keys)
        dropped = uniform(keys[:, None], DROP, np.arange(steps.query.shape[1]))
        query = np.where(dropped < self.config.drop_query, 0, steps.query)
        decode_step, decode_mask = _decoded(loss_mask, self.config.num_decoded, keys)
        return self._assemble(
            steps, query, loss_mask, hard, hard_mask, decode_step, decode_mask, keys
        )

    def requests(self, examples: pa.Table) -> Batch:
        """Build a batch whose last step is the current query, without an item.

        Needs `query`, `history_queries`, `history_item_ids` and `history_timestamps`. History
        items that are not in the catalogue are left out.
        """
        steps = Steps.of(examples, REQUEST, self.catalog, self.config.max_history)
        empty = np.zeros((*steps.step_mask.shape, 0))
        none = np.zeros((len(steps.sizes), 0))
        loss_mask = np.zeros_like(steps.step_mask)
        keys = np.zeros(len(steps.sizes), np.int64)
        return self._assemble(
            steps, steps.query, loss_mask, empty, empty.astype(bool), none, none.astype(bool), keys
        )

    def _hard_negatives(
        self, rows: pa.Table, steps: Steps, keys: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        count = self.config.num_hard_negatives
        chosen = np.zeros((*steps.step_mask.shape, count), np.int64)
        mask = np.zeros(chosen.shape, bool)
        exposed = elements(rows.column("hard_negative_ids"), steps.sizes)
        if len(steps.kept) < len(exposed):
            exposed = exposed.take(pa.array(steps.kept))
        owner = np.repeat(np.arange(len(exposed)), list_sizes(exposed))  # into the K steps
        found = catalog_rows(self.catalog, flattened(exposed))
        # An exposed item that this user clicks elsewhere in the window is not a negative.
        content, span = self.catalog.content_ids, len(self.catalog.content_ids) + 1
        clicked = steps.window * span + content[steps.items[steps.window, steps.step]]
        pairs = steps.window[owner] * span + content[found]
        among_clicks = pc.is_in(pa.array(pairs), value_set=pa.array(clicked))
        free = (found >= 0) & ~among_clicks.to_numpy(zero_copy_only=False)
        owner, found = owner[free], found[free]
        window, step = steps.window[owner], steps.step[owner]
        order = np.lexsort((hashed(keys[window], HARD, step, found), owner))
        window, step, found = window[order], step[order], found[order]
        place = places(np.bincount(owner, minlength=1))
        kept = place < count
        chosen[window[kept], step[kept], place[kept]] = found[kept]
        mask[window[kept], step[kept], place[kept]] = True
        return chosen, mask

    def _assemble(
        self,
        steps: Steps,
        query: np.ndarray,
        loss_mask: np.ndarray,
        hard: np.ndarray,
        hard_mask: np.ndarray,
        decode_step: np.ndarray,
        decode_mask: np.ndarray,
        keys: np.ndarray,
    ) -> Batch:
        visual, has_image = self._images(steps, decode_step, decode_mask)
        used = np.concatenate([steps.items[steps.item_mask], hard[hard_mask]]).astype(np.int64)
        unique = np.unique(used) if len(used) else np.zeros(1, np.int64)
        tokens = lengths = np.zeros((len(unique), 0), np.int64)
        if self.item_tokens is not None and self.item_lengths is not None:
            lengths = self.item_lengths[unique]
            tokens = self.item_tokens[unique][:, : int(lengths.max())]
        asked = np.unique(np.append(query, 0))
        query_tokens, query_lengths = self._queries.encode([steps.texts[i] for i in asked])

        def local(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
            return np.where(mask, np.searchsorted(unique, values), 0)

        arrays = {
            "item_rows": unique,
            "item_tokens": tokens,
            "item_lengths": lengths if lengths.ndim == 1 else np.zeros(len(unique), np.int64),
            "item_content": self.catalog.content_ids[unique],
            "query_tokens": query_tokens,
            "query_lengths": query_lengths,
            "query_index": np.searchsorted(asked, query),
            "item_index": local(steps.items, steps.item_mask),
            "item_mask": steps.item_mask,
            "step_mask": steps.step_mask,
            "group": steps.group,
            "loss_mask": loss_mask,
            "hard_index": local(hard, hard_mask),
            "hard_mask": hard_mask,
            "decode_step": decode_step,
            "decode_mask": decode_mask,
            "row_key": keys,
            "visual_feature": visual,
            "visual_mask": has_image,
        }
        return Batch(**{name: _tensor(value) for name, value in arrays.items()})

    def _images(
        self, steps: Steps, decode_step: np.ndarray, decode_mask: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return features [B, M, N_v, d_v] of the decoded items, or zeros, and a mask [B, M]."""
        shape = decode_step.shape
        if self.visual is None:
            return np.zeros((*shape, 0, 0), np.float32), np.zeros(shape, bool)
        found = np.zeros((*shape, self.visual.num_tokens, self.visual.width), np.float32)
        mask = np.zeros(shape, bool)
        items = np.take_along_axis(steps.items, decode_step.astype(np.int64), 1)
        decoded = decode_mask.astype(bool)
        found[decoded], mask[decoded] = self.visual.gather(items[decoded].astype(np.int64))
        return found, mask


def _tensor(value: np.ndarray) -> Tensor:
    dtype = value.dtype if value.dtype in (bool, np.float32) else np.int64
    return torch.from_numpy(np.ascontiguousarray(value, dtype))


def _decoded(loss_mask: np.ndarray, count: int, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Choose the last loss step and random others [B, M]; M = `count`, or all steps if 0."""
    total = loss_mask.sum(1)
    width = count or max(1, int(total.max(initial=0)))
    order = np.arange(loss_mask.shape[1])
    last = np.where(loss_mask, order, -1).max(1, initial=-1)
    drawn = uniform(keys[:, None], DECODED, order)
    drawn = np.where(order == last[:, None], -1.0, drawn)  # the last one is always chosen
    drawn = np.where(loss_mask, drawn, 2.0)
    taken = np.minimum(total, width)
    chosen = np.argsort(drawn, axis=1, kind="stable")[:, :width]
    mask = np.arange(width) < taken[:, None]
    chosen = np.pad(chosen, ((0, 0), (0, width - chosen.shape[1])))
    beyond = loss_mask.shape[1]
    steps = np.sort(np.where(mask, chosen, beyond), axis=1)
    return np.where(mask, steps, 0).astype(np.int64), mask
