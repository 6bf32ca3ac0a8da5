"""Incremental reading: the interest of a request from the stored keys and values of its history.

The history is a prefix that does not depend on the current query (method 1.3), so its keys and
values are computed once. A request whose history is stored runs its query only, and a new click
runs its own slots only. The result is that of `RecallModel.last_interest` up to rounding.

Slots are compact here: in the layouts `query_last` and `items_only` no later slot attends to the
query of a past step, so it gets none. Steps of one group (a result page, or equal times) follow
each other; a slot attends to everything before its group, to itself, and in its own step to what
the layout says. A current query is a group of its own and attends to the whole history.

Legend: B requests, N new slots, P stored slots, L layers, K key/value heads, d head width,
V distinct queries, W slots of a query, I items, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from karma_ray.data.batch import upload
from karma_ray.model.adapters import rms_normalize
from karma_ray.model.backbone import (
    computes_in,
    continue_body,
    key_value_shape,
    token_embeddings,
)
from karma_ray.model.interest import InterestModel

Encode = Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]]
"""Texts -> tokens [V, Lq] and their counts [V]."""


class Step(NamedTuple):
    """One past click."""

    row: int
    """Of the item in the table of embeddings."""
    query: str = ""
    """The query that led to it; empty for none."""
    joined: bool = False
    """Whether it belongs to the group of the step before."""


@dataclass(frozen=True)
class HistoryState:
    """What is stored of a history."""

    steps: tuple[Step, ...]
    memory: Tensor  # [L, 2, K, P, d] keys and values
    last: Tensor  # [D] state of the last slot
    begin: int  # step with which the last group begins
    begin_slot: int  # its slot

    @property
    def num_slots(self) -> int:
        """P."""
        return int(self.memory.shape[3])

    @property
    def num_bytes(self) -> int:
        """Memory that it takes, without small change."""
        return self.memory.numel() * self.memory.element_size() + 200 * len(self.steps)


@dataclass
class _Row:
    """The new slots of one request. Slot s attends to slots below `sees`, and `own` to s."""

    slot: int
    begin: int
    begin_slot: int
    source: list[tuple[int, int]] = field(default_factory=list)  # (query, place) or (-1, item row)
    position: list[int] = field(default_factory=list)
    sees: list[int] = field(default_factory=list)
    own: list[int] = field(default_factory=list)
    kept: int = 0  # new slots that belong to the history

    def add(self, source: tuple[int, int], position: int, sees: int, own: int) -> None:
        self.source.append(source)
        self.position.append(position)
        self.sees.append(sees)
        self.own.append(own)
        self.slot += 1


class IncrementalReader:
    """Reads requests of one model over one table of item embeddings."""

    def __init__(self, interest: InterestModel, items: Tensor, encode: Encode) -> None:
        """`items` [I, D] lie on the model's device."""
        self.interest, self.items, self._encode = interest, items, encode
        self._decoder = interest.user_decoder
        self._layout = self._decoder.config.layout
        self._num_prompt = len(self._decoder.prompt)
        self.empty = self._of_prompt()
        """The state without any step: the prompt."""

    def read(
        self, states: Sequence[HistoryState], new: Sequence[Sequence[Step]], queries: Sequence[str]
    ) -> tuple[Tensor, list[HistoryState]]:
        """Return h [B, D] of requests, and the states of their histories.

        A history is what `states` [B] hold, followed by `new` steps; `queries` are current ones,
        empty for none.
        """
        with torch.inference_mode():
            soft, used, number = self._soft_queries(new, queries)
            rows = [
                self._planned(state, steps, used, number, query)
                for state, steps, query in zip(states, new, queries, strict=True)
            ]
            last, grown = self._advanced(states, new, rows, soft)
            return self._decoder.read(last, self._words(grown)), grown

    def _of_prompt(self) -> HistoryState:
        with torch.inference_mode():
            body, prompt = self._decoder.body, self._decoder.prompt
            layers, heads, width = key_value_shape(body)
            rows = token_embeddings(body)[prompt][None]
            past = rows.new_zeros(layers, 2, 1, heads, 0, width, dtype=computes_in(body))
            visible = torch.ones(1, len(prompt), len(prompt), device=rows.device).tril().bool()
            positions = torch.arange(len(prompt), device=rows.device)[None]
            states, memory = continue_body(body, rows, positions, past, visible)
        return HistoryState((), memory[:, :, 0], states[0, -1], 0, len(prompt))

    def _soft_queries(
        self, new: Sequence[Sequence[Step]], queries: Sequence[str]
    ) -> tuple[Tensor, list[int], dict[str, int]]:
        """Return soft tokens [V, W, D] of the queries that get slots, used slots, and numbers."""
        texts = dict.fromkeys(queries)
        if self._layout == "interleaved":
            texts |= dict.fromkeys(step.query for steps in new for step in steps)
        number = {text: n for n, text in enumerate(texts)}
        tokens, counts = self._encode(list(number))
        device = self.items.device
        on_device = upload(torch.from_numpy(tokens.astype(np.int64)), device)
        sizes = upload(torch.from_numpy(counts.astype(np.int64)), device)
        width = 1
        if self._decoder.config.query_mode == "tokens":
            width = max(1, int(counts.max(initial=0)))
        encoded = self.interest.encoded_queries(on_device, sizes)
        soft, used = self._decoder.soft_queries(on_device, sizes, encoded, width)
        return soft, used.tolist(), number

    def _planned(
        self, state: HistoryState, steps: Sequence[Step], used: list[int],
        number: dict[str, int], query: str,
    ) -> _Row:  # fmt: skip
        row = _Row(state.num_slots, state.begin, state.begin_slot)
        count, prompt = len(state.steps), self._num_prompt
        for step in steps:
            if not step.joined or count == 0:
                row.begin, row.begin_slot = count, row.slot
            if self._layout == "interleaved":
                at = prompt + 2 * row.begin
                row.add((number[step.query], 0), at, row.begin_slot, row.slot)
                row.add((-1, step.row), at + 1, row.begin_slot, row.slot - 1)
            elif self._layout == "query_last":
                row.add((-1, step.row), prompt + row.begin, row.begin_slot, row.slot)
            else:
                row.add((-1, step.row), prompt + count, row.slot, row.slot)
            count += 1
        row.kept = len(row.source)
        if self._layout != "items_only":
            at, everything = prompt + count * (2 if self._layout == "interleaved" else 1), row.slot
            for place in range(used[number[query]]):
                row.add((number[query], place), at + place, everything, everything)
        return row

    def _advanced(
        self, states: Sequence[HistoryState], new: Sequence[Sequence[Step]], rows: list[_Row],
        soft: Tensor,
    ) -> tuple[Tensor, list[HistoryState]]:  # fmt: skip
        """Run the new slots; return the states [B, D] at the read-out slots and of histories."""
        width = max(len(row.source) for row in rows)
        if width == 0:
            return torch.stack([state.last for state in states]), list(states)
        past, stored = _together(states)
        positions, visible = _masks(states, rows, stored, width)
        device = self.items.device
        hidden, memory = continue_body(
            self._decoder.body, self._inputs(rows, soft, width), upload(positions, device), past,
            upload(visible, device),
        )  # fmt: skip
        last, grown = [], []
        for place, (state, steps, row) in enumerate(zip(states, new, rows, strict=True)):
            last.append(hidden[place, len(row.source) - 1] if row.source else state.last)
            if row.kept:
                added = memory[:, :, place, :, : row.kept]
                state = HistoryState(
                    (*state.steps, *steps), torch.cat([state.memory, added], 3),
                    hidden[place, row.kept - 1].clone(), row.begin, row.begin_slot,
                )  # fmt: skip
            grown.append(state)
        return torch.stack(last), grown

    def _inputs(self, rows: list[_Row], soft: Tensor, width: int) -> Tensor:
        """Return the soft tokens [B, N, D] of the new slots; any query where a row has fewer."""
        items = dict.fromkeys(at for row in rows for query, at in row.source if query < 0)
        place = {row: n for n, row in enumerate(items)}
        count, slots = len(place), soft.shape[1]
        # Not an item: one that is not finite would spoil the rows of other requests.
        sources = np.full((len(rows), width), count, np.int64)
        for b, row in enumerate(rows):
            sources[b, : len(row.source)] = [
                place[at] if query < 0 else count + query * slots + at for query, at in row.source
            ]
        chosen = torch.tensor(list(items), dtype=torch.long, device=self.items.device)
        table = torch.cat([self._decoder.projector(self.items[chosen]), soft.flatten(0, 1)])
        return table[upload(torch.from_numpy(sources), self.items.device)]

    def _words(self, states: Sequence[HistoryState]) -> Tensor | None:
        """Return the lexical part [B, K'] of the histories, if items have one."""
        own = self.interest.learned_width
        if self.items.shape[1] == own:
            return None
        blocks = [self.items[[s.row for s in state.steps], own:].sum(0) for state in states]
        return rms_normalize(torch.stack(blocks))


def _together(states: Sequence[HistoryState]) -> tuple[Tensor, int]:
    """Return keys and values [L, 2, B, K, P, d] of several histories, and P, the longest."""
    longest = max(state.num_slots for state in states)
    if all(state.memory is states[0].memory for state in states):
        memory = states[0].memory[:, :, None]
        return memory.expand(-1, -1, len(states), -1, -1, -1), longest
    first = states[0].memory
    layers, two, heads, _, width = first.shape
    past = first.new_zeros(layers, two, len(states), heads, longest, width)
    for place, state in enumerate(states):
        past[:, :, place, :, : state.num_slots] = state.memory
    return past, longest


def _masks(
    states: Sequence[HistoryState], rows: list[_Row], stored: int, width: int
) -> tuple[Tensor, Tensor]:
    """Return positions [B, N] and the attention mask [B, N, P + N] of the new slots."""
    shape = len(rows), width
    positions, sees, own = (np.zeros(shape, np.int64) for _ in range(3))
    slot = np.full(shape, -1, np.int64)  # of rows that have fewer: they attend to nothing
    column = np.full((len(rows), stored + width), np.iinfo(np.int64).max)
    for b, (state, row) in enumerate(zip(states, rows, strict=True)):
        count, before = len(row.source), state.num_slots
        positions[b, :count], sees[b, :count], own[b, :count] = row.position, row.sees, row.own
        slot[b, :count] = np.arange(before, before + count)
        column[b, :before] = np.arange(before)
        column[b, stored : stored + count] = slot[b, :count]
    columns = column[:, None]
    visible = (columns < sees[..., None]) | (columns >= own[..., None]) & (
        columns <= slot[..., None]
    )
    return torch.from_numpy(positions), torch.from_numpy(visible)
