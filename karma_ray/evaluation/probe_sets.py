"""The fixed items and requests that models are compared on: drawn once, from data and a seed.

Nothing here looks at a model, and nothing comes from the test split. Attention maps need inputs of
exactly one length, because alpha_k averages over the rows behind k: longer texts are cut, shorter
ones are not taken.

Legend: N items, L tokens, n vectors, B requests, T steps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from karma_ray.data.batch import Batch
from karma_ray.data.catalog import Catalog
from karma_ray.data.collate import Collator
from karma_ray.data.draws import row_keys
from karma_ray.data.prompts import SpecialIds, Tokenizer
from karma_ray.data.schema import SEQUENCES
from karma_ray.metrics.collapse import words_probe

NUM_ITEMS = 512
"""Items whose attention is looked at (METHOD 1.13)."""
VECTORS_PER_ITEM = 8
"""Further items whose vectors alone are compared, for each of these."""
MOST_DECODED = 256
"""Requests behind the decode gap; their histories are encoded at once."""
MOST_PROBED = 2048
"""Requests whose clicked items' words are read from h by a probe."""
FEWEST_OF_A_WORD = 20
"""Rarer tokens are left out of the probe."""


@dataclass(frozen=True)
class ItemSample:
    """Items, as the item encoder reads them."""

    rows: np.ndarray  # [N] catalogue rows
    tokens: Tensor  # [N, L] of equal length, ending in the end of text
    template: Tensor  # [N, L] separators and special tokens
    num_held_out: int  # how many of them have no click in training

    @property
    def lengths(self) -> Tensor:
        """[N], all L."""
        return torch.full((len(self.rows),), self.tokens.shape[1])


@dataclass(frozen=True)
class VectorSample:
    """Items whose embeddings are compared, as they are in the catalogue."""

    rows: np.ndarray  # [n] catalogue rows
    tokens: np.ndarray  # [n, L]
    lengths: np.ndarray  # [n]
    categories: list[str | None]  # [n]
    contents: list[int]  # [n] equal for items of equal text


@dataclass(frozen=True)
class RequestSample:
    """Valid examples, for the user decoder."""

    requests: Batch  # histories of equal length
    num_history: int
    targets: Batch  # other histories too, with the clicked item at the last step, to be decoded


@dataclass(frozen=True)
class WordSample:
    """Valid examples, for what a probe reads from h of the clicked item's words."""

    chunks: list[Batch]  # R requests in all
    words: np.ndarray  # [R, V] whether the clicked item's text has the token
    queries: np.ndarray  # [R, Q] which query was asked, one-hot: what anybody knows
    users: list[str]  # [R]
    seed: int

    def read_from(self, vectors: Tensor) -> float | None:
        """What a probe reads of the words from vectors [R, d], in percent of their variance."""
        return words_probe(vectors, self.words, self.users, self.seed)

    @cached_property
    def read_from_query(self) -> float | None:
        """The same from the query alone: no model changes it."""
        return self.read_from(torch.from_numpy(self.queries.astype(np.float32)))


def item_sample(
    collator: Collator, catalog: Catalog, warm: np.ndarray, count: int, seed: int
) -> ItemSample:
    """At most `count` items in a seeded order, held-out ones first; `warm` [I] were clicked.

    L is the median length of the catalogue's texts (at least 4 tokens), so that half of the items
    may be drawn whatever the catalogue.
    """
    tokens, lengths = collator.catalog_tokens()
    length = min(max(4, int(np.median(lengths))), int(lengths.max()))
    order = np.random.default_rng(seed).permutation(len(lengths))
    order = order[np.argsort(warm[order], kind="stable")]
    rows = order[lengths[order] >= length][:count]
    cut = torch.from_numpy(tokens[rows, :length].astype(np.int64))
    cut[:, -1] = SpecialIds.of(collator.tokenizer).end_of_text
    template = torch.isin(cut, torch.tensor(sorted(template_tokens(collator.tokenizer))))
    return ItemSample(rows, cut, template, int(np.count_nonzero(~warm[rows])))


def vector_sample(collator: Collator, catalog: Catalog, count: int, seed: int) -> VectorSample:
    """At most `count` items of the whole catalogue, whatever their length."""
    tokens, lengths = collator.catalog_tokens()
    rows = np.sort(np.random.default_rng(seed).permutation(len(lengths))[:count])
    column = catalog.column("category") or [None] * catalog.num_items
    return VectorSample(
        rows=rows,
        tokens=tokens[rows],
        lengths=lengths[rows],
        categories=[column[row] for row in rows],
        contents=catalog.content_ids[rows].tolist(),
    )


def request_sample(
    collator: Collator, examples: pa.Table, count: int, seed: int
) -> RequestSample | None:
    """At most `count` examples whose known history has the median length, longer ones cut to it.

    In a drawn order, so that neighbours, which the decode gap exchanges, are strangers. None where
    there is no example, or most have no history.
    """
    drawn = np.random.default_rng(seed).permutation(examples.num_rows)[: 8 * count]
    table = examples.take(pa.array(drawn))
    if not table.num_rows:
        return None
    sizes = collator.requests(table).step_mask.sum(1).numpy() - 1
    history = int(np.median(sizes))
    if history < 1:
        return None
    chosen = table.take(pa.array(np.flatnonzero(sizes >= history)[:count]))
    exact = _like(collator, max_history=history).requests(chosen)
    rows = _with_targets(table.slice(0, min(count, MOST_DECODED)))
    plain = _like(collator, drop_query=0.0, num_decoded=1)
    targets = plain.training(rows, row_keys(rows.num_rows, seed))
    return RequestSample(exact, history, targets)


def word_sample(collator: Collator, examples: pa.Table, seed: int) -> WordSample | None:
    """At most MOST_PROBED examples in a drawn order; None where too few share a token."""
    drawn = np.random.default_rng(seed).permutation(examples.num_rows)[:MOST_PROBED]
    table = examples.take(pa.array(np.sort(drawn)))
    tokens, lengths = collator.catalog_tokens()
    rows = collator.catalog.rows(table.column("positive_item_id").to_pylist())
    words = np.zeros((len(rows), int(tokens.max()) + 1), dtype=bool)
    for number, row in enumerate(rows):
        words[number, tokens[row, : lengths[row]]] = True
    words[:, sorted(template_tokens(collator.tokenizer))] = False
    count = words.sum(0)
    words = words[:, (count >= FEWEST_OF_A_WORD) & (count <= len(rows) - FEWEST_OF_A_WORD)]
    if not words.shape[1]:
        return None
    asked = [query or "" for query in table.column("query").to_pylist()]
    queries = np.equal(np.array(asked)[:, None], np.unique(asked)[None, :])
    chunks = [
        collator.requests(table.slice(start, MOST_DECODED))
        for start in range(0, table.num_rows, MOST_DECODED)
    ]
    return WordSample(chunks, words, queries, table.column("user_id").to_pylist(), seed)


def template_tokens(tokenizer: Tokenizer) -> set[int]:
    """Tokens that tell nothing of an item: special ones, and the separators of METHOD 1.2's
    template, `|` between its parts and `>` inside a category path."""
    special = SpecialIds.of(tokenizer)
    encoded = tokenizer(["|", " |", " | ", ">", " >", " > "], add_special_tokens=False)["input_ids"]
    separators = {token for ids in encoded for token in ids}
    return separators | {special.end_of_text, special.text_start, special.text_end}


def _like(collator: Collator, **changes: float) -> Collator:
    config = replace(collator.config, **changes)  # type: ignore[arg-type]
    tokens, lengths = collator.catalog_tokens()
    return Collator(collator.catalog, collator.tokenizer, config, tokens, lengths, collator.visual)


def _with_targets(examples: pa.Table) -> pa.Table:
    """`sequences` rows: a history and the clicked item behind it, the only one with a loss."""
    rows = []
    for row in examples.to_pylist():
        items = row["history_item_ids"] or []
        none = [None] * len(items)
        rows.append(
            {
                "user_id": row["user_id"],
                "item_ids": [*items, row["positive_item_id"]],
                "queries": [*(row["history_queries"] or none), row["query"]],
                "timestamps": [*(row["history_timestamps"] or none), row["timestamp"]],
                "page_ids": [*none, row["page_id"]],
                "hard_negative_ids": [[] for _ in (*items, None)],
                "loss_mask": [False] * len(items) + [True],
            }
        )
    return pa.Table.from_pylist(rows, schema=SEQUENCES)
