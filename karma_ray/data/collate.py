"""Rows -> batches with a batch-local table of unique items: one encoder call per step.

Legend: B windows, T steps, U unique items, V unique queries, H hard negatives, L tokens,
M decoded positions per window. Everything but the tables of tokens is an index into them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from karma_ray.data.batch import Batch as Batch
from karma_ray.data.draws import hashed, uniform
from karma_ray.data.prompts import Tokenizer, encode_texts

HARD, DROP, DECODED = range(3)
"""Purposes of a draw."""


@dataclass(frozen=True)
class CollateConfig:
    """Sizes of a batch."""

    max_history: int = 20
    """History steps in front of the current query."""
    max_item_tokens: int = 24
    """Tokens of an item's text."""
    max_query_tokens: int = 12
    """Tokens of a query."""
    num_hard_negatives: int = 2
    """Hard negatives per step, drawn anew each epoch."""
    drop_query: float = 0.1
    """Share of the training queries replaced by the learned `no_query` vector."""
    num_decoded: int = 2
    """Positions per window decoded into text: the last and random others; 0: all of them."""


class ItemRows(Protocol):
    """What the collator needs of a catalogue; an embedding table satisfies it at serving."""

    @property
    def content_ids(self) -> np.ndarray: ...

    def rows(self, ids: Sequence[str]) -> np.ndarray: ...


@dataclass
class _Steps:
    """Padded [B, T] arrays before they are made batch-local."""

    items: np.ndarray  # catalogue rows, 0 at padding
    item_mask: np.ndarray
    step_mask: np.ndarray
    group: np.ndarray
    queries: list[list[str]]
    kept: list[np.ndarray]  # positions of the row's lists that became steps


class Collator:
    """Builds batches of training windows, and of requests (evaluation and serving)."""

    def __init__(
        self,
        catalog: ItemRows,
        tokenizer: Tokenizer,
        config: CollateConfig,
        item_tokens: np.ndarray | None = None,
        item_lengths: np.ndarray | None = None,
    ) -> None:
        """`item_tokens` [I, L] and `item_lengths` [I] are needed for training batches only."""
        self.catalog, self.tokenizer, self.config = catalog, tokenizer, config
        self.item_tokens, self.item_lengths = item_tokens, item_lengths

    def catalog_tokens(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [I, L] and lengths [I] of the whole catalogue; not there at serving."""
        assert self.item_tokens is not None and self.item_lengths is not None
        return self.item_tokens, self.item_lengths

    def training(self, rows: pa.Table, keys: np.ndarray) -> Batch:
        """A batch from `sequences` rows and a key [B] for the random draws of each.

        Hard negatives, dropped queries and decoded positions are drawn apart, so that variants
        which ignore one of them still see the same batches.
        """
        steps = self._steps(rows, "item_ids", "queries", "timestamps", pages=True)
        wanted = rows.column("loss_mask").to_pylist()
        wanted = [[row[i] for i in kept] for row, kept in zip(wanted, steps.kept, strict=True)]
        loss_mask = _pad(wanted, steps.step_mask.shape, False, bool)
        hard, hard_mask = self._hard_negatives(rows, steps, keys)
        queries = _drop(steps.queries, self.config.drop_query, keys)
        decode_step, decode_mask = _decoded(loss_mask, self.config.num_decoded, keys)
        return self._assemble(
            steps, queries, loss_mask, hard, hard_mask, decode_step, decode_mask, keys
        )

    def requests(self, examples: pa.Table) -> Batch:
        """A batch whose last step is the current query; its item is not part of the input.

        Needs `query`, `history_queries`, `history_item_ids` and `history_timestamps`. History
        items unknown to the catalogue are left out.
        """
        steps = self._steps(
            examples, "history_item_ids", "history_queries", "history_timestamps", pages=False
        )
        length = steps.step_mask.sum(1)
        current = _pad_axis(steps, extra=1)
        rows = np.arange(len(length))
        current.step_mask[rows, length] = True
        # group numbers have gaps (steps left out) and may pass the number of steps
        current.group[rows, length] = current.group.max(initial=-1) + 1
        for queries, query in zip(
            current.queries, examples.column("query").to_pylist(), strict=True
        ):
            queries.append(query or "")
        empty = np.zeros((*current.step_mask.shape, 0))
        none = np.zeros((len(rows), 0))
        loss_mask = np.zeros_like(current.step_mask)
        return self._assemble(
            current, current.queries, loss_mask, empty, empty.astype(bool), none, none.astype(bool),
            np.zeros(len(rows), np.int64),
        )  # fmt: skip

    def _steps(self, rows: pa.Table, items: str, queries: str, times: str, pages: bool) -> _Steps:
        # The newest step of a training window has a full history behind it, as a request has.
        limit = self.config.max_history + int(pages)
        table: list[tuple[list[Any], list[Any], list[Any]]] = []
        kept: list[np.ndarray] = []
        page_lists = rows.column("page_ids").to_pylist() if pages else [None] * rows.num_rows
        for ids, texts, stamps, page_ids in zip(
            rows.column(items).to_pylist(),
            rows.column(queries).to_pylist(),
            rows.column(times).cast(pa.list_(pa.int64())).to_pylist(),
            page_lists,
            strict=True,
        ):
            ids = ids or []
            found = self.catalog.rows(ids)
            stamps = stamps or [None] * len(ids)
            groups = _groups(stamps, page_ids or list(range(len(ids))))
            known = np.flatnonzero(found >= 0)[-limit:]
            kept.append(known)
            table.append(
                (
                    found[known].tolist(),
                    [(texts[i] or "") if texts else "" for i in known],
                    [groups[i] for i in known],
                )
            )
        shape = (len(table), max([len(row[0]) for row in table], default=0))
        mask = _pad([[True] * len(row[0]) for row in table], shape, False, bool)
        return _Steps(
            items=_pad([row[0] for row in table], shape, 0, np.int64),
            item_mask=mask,
            step_mask=mask.copy(),
            group=_pad([row[2] for row in table], shape, -1, np.int64),
            queries=[list(row[1]) for row in table],
            kept=kept,
        )

    def _hard_negatives(
        self, rows: pa.Table, steps: _Steps, keys: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        count = self.config.num_hard_negatives
        chosen = np.zeros((*steps.step_mask.shape, count), np.int64)
        mask = np.zeros(chosen.shape, bool)
        ids: list[str] = []
        places: list[tuple[int, int, int]] = []  # window, step, exposed items
        for b, window in enumerate(rows.column("hard_negative_ids").to_pylist()):
            for t, position in enumerate(steps.kept[b] if window else []):
                exposed = window[position] or []
                places.append((b, t, len(exposed)))
                ids += exposed
        if not ids:
            return chosen, mask
        window, step, sizes = np.array(places).T
        window, step = np.repeat(window, sizes), np.repeat(step, sizes)
        found = self.catalog.rows(ids)
        # an exposed item that this user clicks elsewhere in the window is no negative
        content, span = self.catalog.content_ids, len(self.catalog.content_ids) + 1
        owner, _ = steps.item_mask.nonzero()
        clicked = owner * span + content[steps.items[steps.item_mask]]
        free = (found >= 0) & ~np.isin(window * span + content[found], clicked)
        window, step, found = window[free], step[free], found[free]
        order = np.lexsort((hashed(keys[window], HARD, step, found), step, window))
        window, step, found = window[order], step[order], found[order]
        group = window * steps.step_mask.shape[1] + step
        place = np.arange(len(group)) - np.searchsorted(group, group)
        kept = place < count
        chosen[window[kept], step[kept], place[kept]] = found[kept]
        mask[window[kept], step[kept], place[kept]] = True
        return chosen, mask

    def _assemble(
        self,
        steps: _Steps,
        queries: list[list[str]],
        loss_mask: np.ndarray,
        hard: np.ndarray,
        hard_mask: np.ndarray,
        decode_step: np.ndarray,
        decode_mask: np.ndarray,
        keys: np.ndarray,
    ) -> Batch:
        used = np.concatenate([steps.items[steps.item_mask], hard[hard_mask]]).astype(np.int64)
        unique = np.unique(used) if len(used) else np.zeros(1, np.int64)
        tokens = lengths = np.zeros((len(unique), 0), np.int64)
        if self.item_tokens is not None and self.item_lengths is not None:
            lengths = self.item_lengths[unique]
            tokens = self.item_tokens[unique][:, : int(lengths.max())]
        distinct = {"": 0} | {q: 1 for row in queries for q in row if q}
        position = {text: index for index, text in enumerate(distinct)}
        query_tokens, query_lengths = encode_texts(
            self.tokenizer, list(distinct), self.config.max_query_tokens, end=False
        )
        query_index = [[position[text] for text in row] for row in queries]

        def local(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
            return np.where(mask, np.searchsorted(unique, values), 0)

        arrays = {
            "item_rows": unique,
            "item_tokens": tokens,
            "item_lengths": lengths if lengths.ndim == 1 else np.zeros(len(unique), np.int64),
            "item_content": self.catalog.content_ids[unique],
            "query_tokens": query_tokens,
            "query_lengths": query_lengths,
            "query_index": _pad(query_index, steps.step_mask.shape, 0, np.int64),
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
        }
        return Batch(**{name: _tensor(value) for name, value in arrays.items()})


def _tensor(value: np.ndarray) -> Tensor:
    return torch.from_numpy(
        np.ascontiguousarray(value if value.dtype == bool else value.astype(np.int64))
    )


def _pad(rows: list[list[Any]], shape: tuple[int, ...], fill: Any, dtype: Any) -> np.ndarray:
    result = np.full(shape, fill, dtype)
    for row, values in enumerate(rows):
        kept = values[-shape[1] :] if shape[1] else []
        result[row, : len(kept)] = kept
    return result


def _pad_axis(steps: _Steps, extra: int) -> _Steps:
    def grow(value: np.ndarray, fill: Any) -> np.ndarray:
        return np.pad(value, ((0, 0), (0, extra)), constant_values=fill)

    return _Steps(
        grow(steps.items, 0), grow(steps.item_mask, False), grow(steps.step_mask, False),
        grow(steps.group, -1), steps.queries, steps.kept,
    )  # fmt: skip


def _groups(stamps: list[Any], pages: list[Any]) -> list[int]:
    """Number consecutive steps of one page or one instant alike: they cannot see each other."""
    groups: list[int] = []
    for index, (stamp, page) in enumerate(zip(stamps, pages, strict=True)):
        same = index > 0 and (
            page == pages[index - 1] or (stamp is not None and stamp == stamps[index - 1])
        )
        groups.append(groups[-1] if same else len(groups))
    return groups


def _drop(queries: list[list[str]], share: float, keys: np.ndarray) -> list[list[str]]:
    width = max([len(row) for row in queries], default=0)
    dropped = uniform(keys[:, None], DROP, np.arange(width)) < share
    return [
        ["" if lost else text for text, lost in zip(row, dropped[b], strict=False)]
        for b, row in enumerate(queries)
    ]


def _decoded(loss_mask: np.ndarray, count: int, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The last loss step and random others [B, M]; M = `count`, or all steps when it is 0."""
    total = loss_mask.sum(1)
    width = count or max(1, int(total.max(initial=0)))
    order = np.arange(loss_mask.shape[1])
    last = np.where(loss_mask, order, -1).max(1, initial=-1)
    drawn = uniform(keys[:, None], DECODED, order)
    drawn = np.where(order == last[:, None], -1.0, drawn)  # the last one is always taken
    drawn = np.where(loss_mask, drawn, 2.0)
    taken = np.minimum(total, width)
    chosen = np.argsort(drawn, axis=1, kind="stable")[:, :width]
    mask = np.arange(width) < taken[:, None]
    chosen = np.pad(chosen, ((0, 0), (0, width - chosen.shape[1])))
    beyond = loss_mask.shape[1]
    steps = np.sort(np.where(mask, chosen, beyond), axis=1)
    return np.where(mask, steps, 0).astype(np.int64), mask
