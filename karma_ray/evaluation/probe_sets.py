"""Probe sets: the fixed items and requests that models are compared on, drawn with a seed.

They do not depend on a model or on the test split. Attention maps need inputs of equal length,
because alpha_k averages over the rows after k: longer texts are cut, shorter ones are not used.

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
"""Number of items whose attention is measured (method 1.13)."""
VECTORS_PER_ITEM = 8
"""Number of further items, for each of these, whose vectors are compared."""
MOST_DECODED = 256
"""Largest number of requests for the decode gap, whose histories are encoded at once."""
MOST_PROBED = 2048
"""Largest number of requests for the probe that predicts the clicked item's words from h."""
FEWEST_OF_A_WORD = 20
"""Smallest number of requests with a token; rarer tokens are left out of the probe."""


@dataclass(frozen=True)
class ItemSample:
    """Items in the form that the item encoder reads."""

    rows: np.ndarray  # [N] catalogue rows
    tokens: Tensor  # [N, L] of equal length, with an end of text
    template: Tensor  # [N, L] True for separators and special tokens
    num_held_out: int  # number of items without a training click

    @property
    def lengths(self) -> Tensor:
        """[N] lengths, all equal to L."""
        return torch.full((len(self.rows),), self.tokens.shape[1])


@dataclass(frozen=True)
class VectorSample:
    """Items whose embeddings are compared, with their full texts."""

    rows: np.ndarray  # [n] catalogue rows
    tokens: np.ndarray  # [n, L]
    lengths: np.ndarray  # [n]
    categories: list[str | None]  # [n]
    contents: list[int]  # [n] equal for items with equal texts


@dataclass(frozen=True)
class RequestSample:
    """Validation examples for the user decoder."""

    requests: Batch  # histories of equal length
    num_history: int
    targets: Batch  # for decoding: uncut histories, with the clicked item as the last step


@dataclass(frozen=True)
class WordSample:
    """Validation examples for the probe that predicts the clicked item's words from h."""

    chunks: list[Batch]  # R requests in total
    words: np.ndarray  # [R, V] whether the clicked item's text contains the token
    queries: np.ndarray  # [R, Q] the query, one-hot: the reference without any history
    users: list[str]  # [R]
    seed: int

    def read_from(self, vectors: Tensor) -> float | None:
        """Return the share of the words' variance predicted from vectors [R, d], in percent."""
        return words_probe(vectors, self.words, self.users, self.seed)

    @cached_property
    def read_from_query(self) -> float | None:
        """Return the same for the query alone, which is independent of the model."""
        return self.read_from(torch.from_numpy(self.queries.astype(np.float32)))


def item_sample(
    collator: Collator, catalog: Catalog, warm: np.ndarray, count: int, seed: int
) -> ItemSample:
    """Draw at most `count` items, those without clicks first; `warm` [I] marks clicked items.

    L is the median length of the catalogue's texts (at least 4 tokens), so that half of the items
    qualify in any catalogue.
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
    """Draw at most `count` items of any length from the whole catalogue."""
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
    """Draw at most `count` examples with the median history length; longer histories are cut.

    The order is random, so that neighbours, which the decode gap exchanges, are different users.
    None if there is no example, or if most have no history.
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
    """Draw at most MOST_PROBED examples; None if no token occurs in enough of them."""
    drawn = np.random.default_rng(seed).permutation(examples.num_rows)[:MOST_PROBED]
    table = examples.take(pa.array(np.sort(drawn)))
    tokens, lengths = collator.catalog_tokens()
    rows = collator.catalog.rows(table.column("positive_item_id").combine_chunks())
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
    """Return tokens without information on an item: special ones, and separators of method 1.2's
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
    """Build `sequences` rows: a history and the clicked item, the only step with a loss."""
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
