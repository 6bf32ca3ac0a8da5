"""The retriever: (query, history) -> items, used in serving and in the evaluation.

`recall` answers a request through the index; `score` returns the model's scores of the whole
catalogue, by which `recall` sorts unless several lists are blended. Both use `interests`,
`search_vectors` and `index_vectors`.

Legend: B requests, I items, D width, K results.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import numpy as np
import pyarrow as pa
import torch

from karma_ray.artifacts import RunFolder
from karma_ray.data.catalog import Catalog
from karma_ray.data.collate import Collator
from karma_ray.errors import InputError
from karma_ray.model.device import this_device
from karma_ray.retrieval.answers import Recall, RecalledItem, Scores
from karma_ray.retrieval.complete_run import check_run as check_run
from karma_ray.retrieval.complete_run import require_part as require_part
from karma_ray.retrieval.delta import hidden_ids, live_items, with_delta
from karma_ray.retrieval.encode import ItemTable, load_embeddings
from karma_ray.retrieval.export import load_bundle
from karma_ray.retrieval.filters import Filter, filtered_search
from karma_ray.retrieval.finite import check_queries
from karma_ray.retrieval.index import ItemIndex
from karma_ray.retrieval.kinds import IndexKind
from karma_ray.retrieval.parts import delta_of, served
from karma_ray.retrieval.requests import HistoryItem, Request, request_keys, request_table

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from karma_ray.model.recall import RecallModel


class Search(Protocol):
    """What else may answer than the index alone, such as several lists that are blended."""

    def search(
        self, retriever: Retriever, vectors: NDArray[np.float32], requests: Sequence[Request],
        filters: Sequence[Filter], ks: Sequence[int],
    ) -> list[tuple[list[int], list[float]]]:  # fmt: skip
        """Return rows and scores as `filtered_search` does; vectors [B, K, D]."""


class Retriever:
    """A model, an item table and an index that belong together."""

    def __init__(
        self,
        interest: RecallModel,
        collator: Collator,
        table: ItemTable,
        index: ItemIndex,
        model_version: str = "",
    ) -> None:
        """`collator` must use the row numbers of `table`; `index` may use others."""
        self.interest = interest.eval()
        device = next(interest.parameters()).device
        self.collator, self.table, self.index = collator, table, index.on(device)
        self.model_version, self.index_version = model_version, index.content_hash
        self._hidden = hidden_ids(self.index)
        self.blended: Search | None = None  # `with_channels` says what else answers
        self.embeddings = torch.from_numpy(table.embeddings).to(device)  # [I, D]

    @classmethod
    def load(
        cls, run: str | RunFolder, data: str | None = None,
        device: torch.device | str | None = None,
    ) -> Retriever:  # fmt: skip
        """Load a finished run folder; the default device is this process's GPU, if it has one.

        With `data`, rows (and columns of `score`) are in the order of that catalogue, and the model
        has its item encoder, as evaluation needs it; otherwise they are in the order of the index,
        without reading a catalogue. Raises InputError that names a missing part and the command
        that makes it, and SkewError when parts do not fit together.
        """
        folder = served(run)
        check_run(folder)
        # Without a catalogue there is nothing to encode; an evaluation also looks at the encoder.
        bundle = load_bundle(folder.bundle, encodes_items=data is not None)
        interest = bundle.interest.to(this_device(device))
        # An endpoint has several of these on a node; an evaluation has one, in its own order.
        table = load_embeddings(folder.item_embeddings, bundle.content_hash, mapped=data is None)
        index = ItemIndex.load(folder.index, bundle.content_hash)
        if (delta := delta_of(folder)) is not None:
            table = table.in_order(index.item_ids)
            table, index = with_delta(table, index, interest, delta)
            table = table if data is None else live_items(table, index)
        elif data is None:
            table = table.in_order(index.item_ids)
        if data is not None:
            table = table.in_order(Catalog.load(data).item_ids)
        else:  # one list of names is enough
            index = replace(index, item_ids=table.item_ids, titles=table.titles)
        collator = Collator(table, bundle.tokenizer, bundle.collate_config)
        return cls(interest, collator, table, index, bundle.content_hash)

    @classmethod
    def from_model(
        cls,
        interest: RecallModel,
        collator: Collator,
        catalog: Catalog,
        embeddings: NDArray[np.float32],  # [I, D]
        kind: IndexKind | None = None,
    ) -> Retriever:
        """Build a retriever in memory from a model in training and its item embeddings."""
        table = ItemTable(catalog.item_ids, catalog.titles, embeddings, {})
        return cls(interest, collator, table, build_index(interest, table, kind))

    @property
    def width(self) -> int:
        """D."""
        return int(self.embeddings.shape[1])

    @property
    def device(self) -> torch.device:
        """Where the model, the item vectors and the scores are."""
        return self.embeddings.device

    def interests(self, examples: pa.Table) -> Tensor:  # [B, D]
        """Return h_t of every request."""
        with torch.inference_mode():
            batch = self.collator.requests(examples).to(self.embeddings.device)
            return self.interest.last_interest(batch, self.embeddings[batch.item_rows])

    def interests_of(self, requests: Sequence[Request]) -> Tensor:  # [B, D]
        """Return h_t of requests, without rows of `examples`."""
        return self.interests(request_table(requests))

    def keys_of(self, requests: Sequence[Request]) -> NDArray[np.int64]:  # [B]
        """Return the keys of requests, as `keys` does for rows of `examples`."""
        return self.keys(request_table(requests))

    def score(self, examples: pa.Table) -> NDArray[np.float32]:  # [B, I]
        """Return scores of the whole catalogue for rows of `examples`, in the table's order."""
        scores: NDArray[np.float32] = self.score_on_device(examples).cpu().numpy()
        return scores

    def score_on_device(self, examples: pa.Table) -> Tensor:  # [B, I]
        """Return the same scores on the device of the model."""
        with torch.inference_mode():
            queries = self._vectors(examples)  # [B, K, D]
            best = (queries[:, 0] @ self._index_vectors.T).float()
            for other in queries[:, 1:].unbind(1):
                best = torch.maximum(best, (other @ self._index_vectors.T).float())
        return best

    def recall(
        self,
        query: str | None,
        history: Sequence[HistoryItem],
        k: int,
        exclude_history: bool = False,
        only: Filter | None = None,
    ) -> Recall:
        """Return the `k` best items of one request, or of those that `only` allows.

        `exclude_history` omits clicked items.
        """
        filters = None if only is None else [only]
        return self.recall_batch([Request(query, history)], k, exclude_history, filters)[0]

    def recall_batch(
        self,
        requests: Sequence[Request],
        k: int,
        exclude_history: bool = False,
        filters: Sequence[Filter] | None = None,
    ) -> list[Recall]:
        """Apply `recall` to several requests with one pass of the model and one of the index.

        `filters` has one for each request. Raises KarmaRayError if the model's output is not
        finite, InputError on an unknown category.
        """
        if k < 1:
            raise InputError("k", k, "must be at least 1")
        wanted = list(filters or [Filter()] * len(requests))
        if exclude_history:
            wanted = [one.without_history(r) for one, r in zip(wanted, requests, strict=True)]
        vectors = self.vectors_of(request_table(requests))
        return self.best_of(vectors, requests, [k] * len(requests), wanted)

    def best_of(
        self,
        vectors: NDArray[np.float32],  # [B, K, D]
        requests: Sequence[Request],
        ks: Sequence[int],
        filters: Sequence[Filter],
    ) -> list[Recall]:
        """Return what each request of given search vectors recalls, with one pass of the index."""
        if self.blended is None:
            answers = filtered_search(self.index, vectors, filters, ks)
        else:
            answers = self.blended.search(self, vectors, requests, filters, ks)
        return [
            Recall(
                [
                    RecalledItem(self.index.item_ids[row], value, self.index.titles[row])
                    for row, value in zip(rows, scores, strict=True)
                ],
                self._unknown(request),
            )
            for request, (rows, scores) in zip(requests, answers, strict=True)
        ]

    def score_items(
        self, query: str | None, history: Sequence[HistoryItem], item_ids: Sequence[str]
    ) -> Scores:
        """Score given items (pre-ranking), in their order; None for what recall never finds."""
        request = Request(query, history)
        return self.scores_of(self.vectors_of(request_table([request]))[0], request, item_ids)

    def scores_of(
        self, vectors: NDArray[np.float32], request: Request, item_ids: Sequence[str]
    ) -> Scores:
        """Score given items for the search vectors [K, D] of a request."""
        rows = self.candidate_rows(item_ids)
        known = np.flatnonzero(rows >= 0)
        scores: list[float | None] = [None] * len(item_ids)
        with torch.inference_mode():
            items = self.interest.index_vectors(self.embeddings[torch.from_numpy(rows[known])])
            values = items.float().cpu().numpy() @ vectors.T
        for position, value in zip(known.tolist(), values.max(1).tolist(), strict=True):
            scores[position] = value
        return Scores(scores, self._unknown(request))

    def candidate_rows(self, item_ids: Sequence[str]) -> NDArray[np.int64]:  # [n]
        """Return rows of the table; -1 for unknown items, and for those that left the catalogue."""
        rows = self.table.rows(item_ids)
        if self._hidden:
            rows[[i in self._hidden for i in item_ids]] = -1
        return rows

    def keys(self, examples: pa.Table) -> NDArray[np.int64]:  # [B]
        """Return keys for the random draws of requests, hashes of what the model reads."""
        return request_keys(examples, self.table, self.collator.config.max_history)

    def _vectors(self, examples: pa.Table) -> Tensor:  # [B, K, D]
        keys = self.keys(examples) if self.interest.is_random else None
        return self.interest.search_vectors(self.interests(examples), keys)

    @cached_property
    def _index_vectors(self) -> Tensor:  # [I, D]
        held = self.index.exact_vectors(self.table.item_ids)
        if held is not None:
            return held
        with torch.inference_mode():
            return self.interest.index_vectors(self.embeddings)

    def vectors_of(self, examples: pa.Table) -> NDArray[np.float32]:  # [B, K, D]
        """Return what rows of `examples` search with; raises KarmaRayError if not finite."""
        with torch.inference_mode():
            vectors = self._vectors(examples)
        result: NDArray[np.float32] = vectors.float().cpu().numpy()
        check_queries(result)
        return result

    def _unknown(self, request: Request) -> list[str]:
        ids = dict.fromkeys(item.item_id for item in request.history)
        return [item_id for item_id in ids if self.table.row(item_id) < 0]


def build_index(
    interest: RecallModel, table: ItemTable, kind: IndexKind | None = None
) -> ItemIndex:
    """Build an index of a table in memory; it is exact unless told otherwise."""
    vectors = score_vectors(interest, table)
    return ItemIndex.build(vectors, table.item_ids, table.titles, kind, categories=table.categories)


def score_vectors(interest: RecallModel, table: ItemTable) -> NDArray[np.float32]:  # [I, D]
    """Return `index_vectors(e)` of every item of a table."""
    device = next(interest.parameters()).device
    with torch.inference_mode():
        vectors = interest.index_vectors(torch.from_numpy(table.embeddings).to(device))
    result: NDArray[np.float32] = vectors.float().cpu().numpy()
    return result
