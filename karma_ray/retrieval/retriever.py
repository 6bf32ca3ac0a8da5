"""The retriever: (query, history) -> items, used in serving and in the evaluation.

`recall` answers a request through the index; `score` returns the same scores for the whole
catalogue. Both use `interests`, `search_vectors` and `index_vectors`.

Legend: B requests, I items, D width, K results.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import torch

from karma_ray.artifacts import RunFolder, exists, read_manifest
from karma_ray.data.catalog import Catalog
from karma_ray.data.collate import Collator
from karma_ray.errors import InputError
from karma_ray.model.device import this_device
from karma_ray.retrieval.answers import Recall, RecalledItem, Scores
from karma_ray.retrieval.delta import live_items, with_delta
from karma_ray.retrieval.encode import ItemTable, load_embeddings
from karma_ray.retrieval.export import load_bundle
from karma_ray.retrieval.finite import check_queries
from karma_ray.retrieval.index import IndexKind, ItemIndex, check_parent, merged
from karma_ray.retrieval.parts import serve_from, served, to_index
from karma_ray.retrieval.requests import HistoryItem, Request, request_keys, request_table

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from karma_ray.model.recall import RecallModel


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
        self.embeddings = torch.from_numpy(table.embeddings).to(device)  # [I, D]

    @classmethod
    def load(
        cls, run: str | RunFolder, data: str | None = None,
        device: torch.device | str | None = None,
    ) -> Retriever:  # fmt: skip
        """Load a finished run folder; the default device is this process's GPU, if it has one.

        With `data`, rows (and columns of `score`) are in the order of that catalogue; otherwise in
        the order of the index, without reading a catalogue. Raises InputError that names a
        missing part and the command that makes it, and SkewError when parts do not fit together.
        """
        folder = served(run)
        check_run(folder)
        bundle = load_bundle(folder.bundle, encodes_items=False)
        interest = bundle.interest.to(this_device(device))
        table = load_embeddings(folder.item_embeddings, bundle.content_hash)
        index = ItemIndex.load(folder.index, bundle.content_hash)
        table = table.in_order(index.item_ids)
        if folder.delta is not None:
            table, index = with_delta(table, index, interest, folder.delta)
        if data is not None:
            table = live_items(table, index).in_order(Catalog.load(data).item_ids)
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
    ) -> Recall:
        """Return the `k` best items of one request; `exclude_history` omits clicked items."""
        return self.recall_batch([Request(query, history)], k, exclude_history)[0]

    def recall_batch(
        self, requests: Sequence[Request], k: int, exclude_history: bool = False
    ) -> list[Recall]:
        """Apply `recall` to several requests with one pass of the model and one of the index.

        Raises KarmaRayError if the model's output is not finite.
        """
        if k < 1:
            raise InputError("k", k, "must be at least 1")
        vectors = self._search_vectors(requests)
        return self.best_of(
            vectors, requests, [k] * len(requests), [exclude_history] * len(requests)
        )

    def best_of(
        self,
        vectors: NDArray[np.float32],  # [B, K, D]
        requests: Sequence[Request],
        ks: Sequence[int],
        excludes: Sequence[bool],
    ) -> list[Recall]:
        """Return what each request of given search vectors recalls, with one pass of the index."""
        clicked = [
            {item.item_id for item in request.history} if exclude else set()
            for request, exclude in zip(requests, excludes, strict=True)
        ]
        deepest = max(k + len(seen) for k, seen in zip(ks, clicked, strict=True))
        rows, scores = self._search(vectors, deepest)
        answers = []
        for place, (request, seen, k) in enumerate(zip(requests, clicked, ks, strict=True)):
            wanted = k + len(seen)
            found, values = rows[place, :wanted].tolist(), scores[place, :wanted].tolist()
            items = [
                RecalledItem(self.index.item_ids[row], value, self.index.titles[row])
                for row, value in zip(found, values, strict=True)
                if row >= 0 and self.index.item_ids[row] not in seen
            ]
            answers.append(Recall(items[:k], self._unknown(request)))
        return answers

    def score_items(
        self, query: str | None, history: Sequence[HistoryItem], item_ids: Sequence[str]
    ) -> Scores:
        """Score given items (pre-ranking), in their order; None for unknown items."""
        request = Request(query, history)
        return self.scores_of(self._search_vectors([request])[0], request, item_ids)

    def scores_of(
        self, vectors: NDArray[np.float32], request: Request, item_ids: Sequence[str]
    ) -> Scores:
        """Score given items for the search vectors [K, D] of a request."""
        rows = self.table.rows(item_ids)
        known = np.flatnonzero(rows >= 0)
        scores: list[float | None] = [None] * len(item_ids)
        with torch.inference_mode():
            items = self.interest.index_vectors(self.embeddings[torch.from_numpy(rows[known])])
            values = items.float().cpu().numpy() @ vectors.T
        for position, value in zip(known, values, strict=True):
            scores[position] = float(value.max())
        return Scores(scores, self._unknown(request))

    def keys(self, examples: pa.Table) -> NDArray[np.int64]:  # [B]
        """Return keys for the random draws of requests, hashes of what the model reads."""
        return request_keys(examples, self.table, self.collator.config.max_history)

    def _vectors(self, examples: pa.Table) -> Tensor:  # [B, K, D]
        keys = self.keys(examples) if self.interest.is_random else None
        return self.interest.search_vectors(self.interests(examples), keys)

    @cached_property
    def _index_vectors(self) -> Tensor:  # [I, D]
        with torch.inference_mode():
            return self.interest.index_vectors(self.embeddings)

    def _search_vectors(self, requests: Sequence[Request]) -> NDArray[np.float32]:  # [B, K, D]
        with torch.inference_mode():
            vectors = self._vectors(request_table(requests))
        result: NDArray[np.float32] = vectors.float().cpu().numpy()
        check_queries(result)
        return result

    def _search(
        self, queries: NDArray[np.float32], k: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return the k best rows of each request and their scores [B, k]; queries [B, K, D].

        An item in several of the K lists counts once, with its best score.
        """
        count, lists, _ = queries.shape
        rows, scores = self.index.search(queries.reshape(count * lists, -1), k)
        if lists == 1:
            return rows, scores
        return merged(rows.reshape(count, -1), scores.reshape(count, -1), k)

    def _unknown(self, request: Request) -> list[str]:
        ids = dict.fromkeys(item.item_id for item in request.history)
        return [item_id for item_id in ids if self.table.row(item_id) < 0]


def build_index(
    interest: RecallModel, table: ItemTable, kind: IndexKind | None = None, **parents: str
) -> ItemIndex:
    """Build an index of `index_vectors(e)` of a table."""
    device = next(interest.parameters()).device
    with torch.inference_mode():
        vectors = interest.index_vectors(torch.from_numpy(table.embeddings).to(device))
    return ItemIndex.build(
        vectors.float().cpu().numpy(), table.item_ids, table.titles, kind, parents
    )


def index_run(
    run: str, kind: IndexKind | None = None, device: torch.device | str | None = None
) -> ItemIndex:
    """Build and save the index of a run's newest embeddings, which then serve together."""
    folder = to_index(run)
    require_part(run, folder.bundle, "jobs/train.py --out RUN")
    require_part(run, folder.item_embeddings, "jobs/embed.py RUN")
    bundle = load_bundle(folder.bundle)
    table = load_embeddings(folder.item_embeddings, bundle.content_hash)
    made = read_manifest(folder.item_embeddings)["content_hash"]
    interest = bundle.interest.to(this_device(device))
    index = build_index(interest, table, kind, bundle=bundle.content_hash, item_embeddings=made)
    saved = index.save(folder.index)
    serve_from(folder)
    return saved


def check_run(run: str | RunFolder) -> None:
    """Raise InputError or SkewError if a run cannot be served; reads manifests only."""
    folder = served(run)
    run = folder.root
    require_part(run, folder.bundle, "jobs/train.py --out RUN")
    require_part(run, folder.item_embeddings, "jobs/embed.py RUN")
    require_part(run, folder.index, "jobs/index.py RUN")
    bundle = read_manifest(folder.bundle, "bundle")
    embeddings = read_manifest(folder.item_embeddings, "item_embeddings")
    index = read_manifest(folder.index, "index")
    made = bundle["content_hash"]
    check_parent(embeddings["parents"], "bundle", made, folder.item_embeddings)
    check_parent(index["parents"], "bundle", made, folder.index)
    made = embeddings["content_hash"]
    check_parent(index["parents"], "item_embeddings", made, folder.index)
    if folder.delta is not None:
        delta = read_manifest(folder.delta, "item_embeddings")
        check_parent(delta["parents"], "index", index["content_hash"], folder.delta)


def require_part(run: str, part: str, command: str) -> None:
    """Raise InputError unless `part` of `run` is complete (its manifest is written last)."""
    if not exists(run):
        raise InputError("RUN", run, "does not exist; `python jobs/train.py --out RUN` makes one")
    if not exists(f"{part}/manifest.json"):
        name = part.rsplit("/", 1)[-1]
        raise InputError("RUN", run, f"has no finished {name}/; `python {command}` makes it")
