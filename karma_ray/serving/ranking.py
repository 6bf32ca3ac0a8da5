"""The ranker of an endpoint: click-through rates of what recall found, or of given candidates.

Features are computed by the functions that computed those of training, and the model reads the
same batch, so a page that is asked for gets the rates it would get offline.

Legend: R requests, N candidates of all of them, T history, F features.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from karma_ray.artifacts import exists, join, read_manifest, read_table
from karma_ray.errors import InputError, KarmaRayError
from karma_ray.ranking.batch import FIELDS, CtrBatch
from karma_ray.ranking.features import similarity_features
from karma_ray.ranking.load import KIND, Ranker
from karma_ray.ranking.mari import with_request_side
from karma_ray.ranking.vectors import page_cosines
from karma_ray.retrieval.filters import Filter
from karma_ray.retrieval.requests import Request
from karma_ray.retrieval.similarity import unit
from karma_ray.serving.histories import in_time

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from karma_ray.artifacts import RunFolder
    from karma_ray.retrieval.retriever import Retriever
    from karma_ray.serving import schemas

LOG = logging.getLogger(__name__)
REQUEST_INPUTS = ("history", "query")
"""Inputs of a CTR model with a row per request."""
ALONE = 64
"""Candidates from which on a request is rated by itself: one request needs no copies of its side.
"""
LEAST_KNOWN = 0.5
"""Share of the endpoint's items that a ranker must know."""


class NotRanked(KarmaRayError):
    """The endpoint has no ranker."""

    def __init__(self) -> None:
        super().__init__(
            "this endpoint has no ranker: start it with `python jobs/serve.py RUN --ranker RUN2`, "
            "where RUN2 is a finished run of a ctr_ recipe"
        )


@dataclass(frozen=True)
class RankCall:
    """Click-through rates are wanted: of `item_ids`, or of the k best items."""

    request: Request
    item_ids: Sequence[str] | None = None
    k: int = 100
    filter: Filter = field(default_factory=Filter)


@dataclass(frozen=True)
class Candidates:
    """What is to be ranked for a request."""

    request: Request
    rows: NDArray[np.int64]
    """[n] rows of the endpoint's table."""
    scores: NDArray[np.float32]
    """[n] those of recall."""
    interests: NDArray[np.float32]
    """[n] h_t . e, which differs where recall blends several lists."""


@dataclass(frozen=True)
class Ranked:
    """Candidates by falling click-through rate."""

    items: list[schemas.RankedItem]
    ignored_item_ids: list[str]
    seconds: dict[str, float]
    """What each stage took, for all requests of the batch together."""


class ServedRanker:
    """A CTR model beside the retriever whose candidates it rates. For one thread."""

    def __init__(self, ranker: Ranker, retriever: Retriever, mari: bool = True) -> None:
        """Without `mari` the model stays as it was trained, to measure what that costs.

        Raises InputError on a model that reads more than a request and the catalogue have.
        """
        names: tuple[str, ...] = ranker.model.inputs  # type: ignore[assignment]
        if unknown := [name for name in names if name not in FIELDS]:
            problem = f"reads {', '.join(unknown)}, which no request has"
            raise InputError("--ranker", ranker.config.family, problem)
        self._rows = ranker.rows(retriever.table.item_ids)  # [I] of the ranker, -1 for new items
        self._retriever, self._limit = retriever, ranker.config.max_history
        self.version = str(ranker.manifest.get("content_hash", ""))
        self.reason = "it was not asked for"
        """Why the request's side is computed for every candidate; empty if it is not."""
        if mari:
            ranker, self.reason = _with_request_side(ranker)
        self._ranker = ranker

    @property
    def reads_interest(self) -> bool:
        """Whether h_t . e is one of its features."""
        return self._ranker.config.interest

    def rank(
        self, asked: Sequence[Candidates]
    ) -> tuple[list[list[schemas.RankedItem]], dict[str, float]]:
        """Return the candidates of each request, best first, and the seconds of both stages."""
        begin = time.perf_counter()
        histories = [self._history(one.request) for one in asked]
        features = [self._features(one, rows) for one, rows in zip(asked, histories, strict=True)]
        between = time.perf_counter()
        answers: list[list[schemas.RankedItem]] = [[] for _ in asked]
        for some in _groups([len(one.rows) for one in asked]):
            batch = self._batch(
                [asked[n] for n in some], [histories[n] for n in some], [features[n] for n in some]
            )
            ends = np.cumsum([len(asked[n].rows) for n in some])
            rates = np.split(self._ranker.probabilities(batch), ends[:-1])
            for n, ctr in zip(some, rates, strict=True):
                answers[n] = self._named(asked[n], ctr)
        done = time.perf_counter()
        return answers, {"features": between - begin, "rank": done - between}

    def _history(self, request: Request) -> NDArray[np.int64]:  # [T]
        """Return table rows of the clicks that the ranker reads, newest last."""
        rows = self._retriever.table.rows([click.item_id for click in in_time(request.history)])
        rows = rows[rows >= 0]
        rows = rows[self._rows[rows] >= 0]
        return rows[max(0, len(rows) - self._limit) :]

    def _features(
        self, one: Candidates, history: NDArray[np.int64]
    ) -> NDArray[np.float32]:  # [T] -> [n, F]
        count, num_features = len(one.rows), self._ranker.num_features
        if not count or not num_features:
            return np.zeros((count, num_features), np.float32)
        table = self._retriever.table.embeddings
        vectors = unit(table[np.concatenate([one.rows, history])])
        places = count + np.arange(len(history)) if len(history) else np.full(1, -1)
        cosines = page_cosines(vectors, places[None], np.arange(count), np.array([count]))
        there = np.broadcast_to(places >= 0, cosines.shape)
        scores = self._interest_scores(one) if self._ranker.config.interest else None
        return similarity_features(cosines, there, scores)

    def _interest_scores(self, one: Candidates) -> NDArray[np.float32]:  # [n]
        """Return h_t . e of no more clicks than h_t had in training."""
        table, clicks = self._retriever.table, in_time(one.request.history)
        clicks = [click for click in clicks if table.row(click.item_id) >= 0]
        if len(clicks) <= min(self._limit, self._retriever.collator.config.max_history):
            return one.interests
        ids = [table.item_ids[row] for row in one.rows]
        clicks = clicks[len(clicks) - self._limit :]
        found = self._retriever.score_items(one.request.query, clicks, ids)
        return np.array(found.scores, np.float32)

    def _batch(
        self, asked: Sequence[Candidates], histories: Sequence[NDArray[np.int64]],
        features: Sequence[NDArray[np.float32]],
    ) -> CtrBatch:  # fmt: skip
        width = max(1, max(len(rows) for rows in histories))
        history = np.full((len(asked), width), -1, np.int64)
        for row, known in zip(history, histories, strict=True):
            row[width - len(known) :] = self._rows[known]
        sizes = [len(one.rows) for one in asked]
        return CtrBatch(
            history=torch.from_numpy(history),
            query=self._ranker.collator.queries([one.request.query for one in asked]),
            request=torch.from_numpy(np.repeat(np.arange(len(asked)), sizes)),
            candidate=torch.from_numpy(self._rows[np.concatenate([one.rows for one in asked])]),
            features=torch.from_numpy(np.concatenate(features)),
            clicked=torch.zeros(sum(sizes)),
        )

    def _named(self, one: Candidates, ctr: NDArray[np.float32]) -> list[schemas.RankedItem]:
        """Raises KarmaRayError when the model's output is not finite."""
        if not np.isfinite(ctr).all():
            raise KarmaRayError("the ranker's click-through rates are not finite")
        table = self._retriever.table
        order = np.argsort(-ctr, kind="stable")
        return [
            {
                "item_id": table.item_ids[row], "ctr": rate, "score": score,
                "title": table.titles[row],
            }
            for row, rate, score in zip(
                one.rows[order].tolist(), ctr[order].tolist(), one.scores[order].tolist(),
                strict=True,
            )
        ]  # fmt: skip


def check_ranker(run: str, folder: RunFolder) -> None:
    """Raise InputError unless a run has a ranker for the items and vectors of `folder`."""
    path = join(run, KIND)
    if not exists(join(path, "manifest.json")):
        raise InputError(
            "--ranker", run, "has no finished ranker/; `python jobs/train.py --recipe ctr_din`, "
            "or another ctr_ recipe, makes one",
        )  # fmt: skip
    wanted = read_manifest(path, KIND)["parents"].get("item_embeddings")
    if wanted and wanted != read_manifest(folder.item_embeddings)["content_hash"]:
        raise InputError(
            "--ranker", run, f"reads the item vectors of another model than {folder.root} serves: "
            f"train it with `--vectors {folder.root}`, or serve the run that it was trained with",
        )  # fmt: skip
    known = pc.is_in(_ids(folder.item_embeddings), value_set=_ids(join(path, "item_ids")))
    if (share := float(np.mean(known.to_numpy()))) < LEAST_KNOWN:
        raise InputError(
            "--ranker", run, f"knows {share:.0%} of the items that {folder.root} serves: it was "
            "trained on another catalogue",
        )  # fmt: skip


def _ids(folder: str) -> pa.ChunkedArray:
    return read_table(folder, columns=["item_id"]).column("item_id")


def _with_request_side(ranker: Ranker) -> tuple[Ranker, str]:
    """Return it with its request's side computed once, or as it is and why."""
    names: tuple[str, ...] = ranker.model.inputs  # type: ignore[assignment]
    example = _example(ranker).named(names)
    model, report = with_request_side(
        ranker.model, example, request_inputs=[name for name in REQUEST_INPUTS if name in names]
    )
    if report.reason is not None:
        LOG.warning("the ranker computes a request's side for every candidate: %s", report.reason)
        return ranker, report.reason
    model.inputs = names  # type: ignore[assignment]
    return replace(ranker, model=model), ""


def _example(ranker: Ranker) -> CtrBatch:
    """Return a drawn batch of three requests, on which both models must agree."""
    draw = np.random.default_rng(0)
    requests, count, steps = 3, 12, max(2, ranker.config.max_history)
    device = next(ranker.model.parameters()).device
    last = max(1, len(ranker.item_ids))
    return CtrBatch(
        history=torch.from_numpy(draw.integers(-1, last, (requests, steps))),
        query=torch.from_numpy(draw.integers(0, ranker.config.query_buckets, (requests, 4))),
        request=torch.arange(requests).repeat_interleave(count // requests),
        candidate=torch.from_numpy(draw.integers(-1, last, count)),
        features=torch.from_numpy(draw.random((count, ranker.num_features), np.float32)),
        clicked=torch.zeros(count),
    ).to(device)


def _groups(sizes: Sequence[int]) -> list[list[int]]:
    """Return which requests are rated together: those with few candidates."""
    few = [n for n, size in enumerate(sizes) if size < ALONE]
    return [*([few] if few else []), *([n] for n, size in enumerate(sizes) if size >= ALONE)]
