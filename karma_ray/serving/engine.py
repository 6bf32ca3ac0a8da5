"""Answers batches of calls with one model and one index.

Legend: B calls, K vectors of a request, D width.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from karma_ray.errors import KarmaRayError
from karma_ray.model.incremental import IncrementalReader, Step
from karma_ray.model.interest import InterestModel
from karma_ray.retrieval.filters import Filter
from karma_ray.retrieval.finite import check_queries
from karma_ray.retrieval.requests import Request
from karma_ray.retrieval.similarity import Similarity, unit
from karma_ray.serving.histories import steps_of
from karma_ray.serving.precision import lower
from karma_ray.serving.prefix_cache import PrefixCache
from karma_ray.serving.ranking import Candidates, RankCall, Ranked, ServedRanker

if TYPE_CHECKING:
    from torch import Tensor

    from karma_ray.retrieval.answers import Recall, Scores
    from karma_ray.retrieval.retriever import Retriever


@dataclass(frozen=True)
class RecallCall:
    """The k best items are wanted."""

    request: Request
    k: int = 10
    filter: Filter = field(default_factory=Filter)


@dataclass(frozen=True)
class ScoreCall:
    """Scores of given items are wanted."""

    request: Request
    item_ids: Sequence[str] = ()


@dataclass(frozen=True)
class FeaturesCall(ScoreCall):
    """Similarities of given items to the history are wanted, beside their scores."""


@dataclass(frozen=True)
class RememberCall:
    """Nothing is wanted, but the history's keys and values should be stored."""

    request: Request


Call = RecallCall | ScoreCall | FeaturesCall | RankCall | RememberCall
CANDIDATES_PER_SLOT = 4
"""Candidates that a ranker rates in about the time of a slot of the user decoder."""


@dataclass(frozen=True)
class CandidateFeatures:
    """Scores and similarities of candidates; None for what recall never finds."""

    scores: Scores
    features: list[dict[str, Any] | None] = field(default_factory=list)


class Engine:
    """A retriever, and the stored histories of its model. For one thread."""

    def __init__(
        self, retriever: Retriever, cache_bytes: int, precision: str = "float32",
        run: str | None = None, ranker: ServedRanker | None = None,
    ) -> None:  # fmt: skip
        """`cache_bytes` bound the stored keys and values; 0 stores none.

        The decoder of `retriever` computes in `precision` from then on. `run` is the folder that it
        was loaded from. Without `ranker` it answers no RankCall.
        """
        self.retriever, self.run, self.ranker = retriever, run, ranker
        self.precision = lower(retriever, precision)
        self.limit = retriever.collator.config.max_history
        self.version = {
            "model_version": retriever.model_version,
            "index_version": retriever.index_version,
        }
        self.cache: PrefixCache | None = None
        self._reader: IncrementalReader | None = None
        if isinstance(retriever.interest, InterestModel):
            self._reader = IncrementalReader(
                retriever.interest, retriever.embeddings, retriever.collator.encode_queries
            )
            self.cache = PrefixCache(self._reader.empty, cache_bytes)

    def weight(self, call: Call) -> int:
        """Return an upper bound of the slots that a call runs, for the size of a batch."""
        slots = 2 * min(len(call.request.history), self.limit) + 2
        if isinstance(call, RankCall):
            count = call.k if call.item_ids is None else len(call.item_ids)
            slots += count // CANDIDATES_PER_SLOT
        return slots

    def answer(self, calls: Sequence[Call]) -> list[Any]:
        """Return the answer to each call: Recall, Scores, CandidateFeatures, Ranked or None.

        A call whose vectors are not finite gets a KarmaRayError, the others their answers.
        """
        begin = time.perf_counter()
        with torch.inference_mode():
            interests, steps = self._interests([call.request for call in calls])
            vectors = self._vectors(interests, calls)
        answers: list[Any] = [None] * len(calls)
        recalls = []
        for place, found in vectors.items():
            call = calls[place]
            try:
                check_queries(found[None])
                self._check(call)
            except KarmaRayError as error:
                answers[place] = error
                continue
            if isinstance(call, RecallCall) or (
                isinstance(call, RankCall) and call.item_ids is None
            ):
                recalls.append(place)
            elif isinstance(call, FeaturesCall):
                answers[place] = self._features(call, found, steps[place])
            elif isinstance(call, ScoreCall | RankCall):
                answers[place] = self.retriever.scores_of(found, call.request, call.item_ids or ())
        if recalls:
            best = self.retriever.best_of(
                np.stack([vectors[place] for place in recalls]),
                [calls[place].request for place in recalls],
                [calls[place].k for place in recalls],  # type: ignore[union-attr]
                [calls[place].filter for place in recalls],  # type: ignore[union-attr]
            )  # fmt: skip
            for place, answer in zip(recalls, best, strict=True):
                answers[place] = answer
        self._rank(calls, answers, vectors, begin)
        return answers

    def _rank(
        self, calls: Sequence[Call], answers: list[Any], vectors: dict[int, np.ndarray],
        begin: float,
    ) -> None:  # fmt: skip
        """Replace what recall answered to each RankCall by its ranking."""
        places = [
            place for place, call in enumerate(calls)
            if isinstance(call, RankCall) and not isinstance(answers[place], Exception)
        ]  # fmt: skip
        if not places:
            return
        assert self.ranker is not None, "the service asks an engine with a ranker"
        asked, ignored = [], []
        for place in places:
            call, found = calls[place], answers[place]
            assert isinstance(call, RankCall)
            asked.append(self._candidates(call, found, vectors[place]))
            unknown = [] if call.item_ids is None else [
                item_id
                for item_id, score in zip(call.item_ids, found.scores, strict=True)
                if score is None
            ]  # fmt: skip
            ignored.append([*dict.fromkeys([*found.ignored_item_ids, *unknown])])
        recall_s = time.perf_counter() - begin
        try:
            ranked, seconds = self.ranker.rank(asked)
        except KarmaRayError as error:  # what else the batch holds is answered
            for place in places:
                answers[place] = error
            return
        seconds = {"recall": recall_s, **seconds}
        for place, items, unknown in zip(places, ranked, ignored, strict=True):
            answers[place] = Ranked(items, unknown, seconds)

    def _candidates(
        self, call: RankCall, found: Recall | Scores, vectors: np.ndarray
    ) -> Candidates:  # [K, D]
        """Return what is to be ranked: each known item once."""
        assert self.ranker is not None
        if call.item_ids is None:
            scores = {item.item_id: item.score for item in found.items}  # type: ignore[union-attr]
        else:
            known = zip(call.item_ids, found.scores, strict=True)  # type: ignore[union-attr]
            scores = {item_id: score for item_id, score in known if score is not None}
        rows = self.retriever.table.rows(list(scores))
        values = np.array(list(scores.values()), np.float32)
        interests = values
        is_blended = call.item_ids is None and self.retriever.blended is not None
        if is_blended and self.ranker.reads_interest:
            found = self.retriever.scores_of(vectors, call.request, list(scores))
            interests = np.array(found.scores, np.float32)
        return Candidates(call.request, rows, values, interests)

    def _check(self, call: Call) -> None:
        """Raise InputError on an unknown category, which would spoil the batch."""
        if isinstance(call, RecallCall | RankCall) and call.filter.category is not None:
            self.retriever.index.of_category(call.filter.category)

    def _interests(self, requests: Sequence[Request]) -> tuple[Tensor, list[list[Step]]]:
        """Return h [B, D] of requests and the steps of their histories."""
        table = self.retriever.table
        steps = [steps_of(request.history, table, self.limit) for request in requests]
        if self._reader is None or self.cache is None:
            return self.retriever.interests_of(requests), steps
        found = [self.cache.longest(history) for history in steps]
        states, keys = [state for state, _ in found], [keys for _, keys in found]
        missing = [
            history[len(state.steps) :] for history, state in zip(steps, states, strict=True)
        ]
        interests = torch.empty(len(requests), self.retriever.width, device=self.retriever.device)
        for some in _alike([len(new) for new in missing]):
            interests[some], grown = self._reader.read(
                [states[n] for n in some], [missing[n] for n in some],
                [requests[n].query or "" for n in some],
            )  # fmt: skip
            for n, state in zip(some, grown, strict=True):
                if missing[n]:
                    self.cache.put(state, keys[n])
        return interests, steps

    def _vectors(self, interests: Tensor, calls: Sequence[Call]) -> dict[int, np.ndarray]:
        """Return the search vectors [K, D] of the calls that need them, by their place."""
        places = [n for n, call in enumerate(calls) if not isinstance(call, RememberCall)]
        if not places:
            return {}
        keys = None
        if self.retriever.interest.is_random:
            keys = self.retriever.keys_of([calls[place].request for place in places])
        found = self.retriever.interest.search_vectors(interests[places], keys)
        return dict(zip(places, found.float().cpu().numpy(), strict=True))

    def _features(
        self, call: FeaturesCall, vectors: np.ndarray, steps: Sequence[Step]
    ) -> CandidateFeatures:
        """`vectors` [K, D]."""
        scores = self.retriever.scores_of(vectors, call.request, call.item_ids)
        rows = self.retriever.candidate_rows(call.item_ids)
        known = np.flatnonzero(rows >= 0)
        table = self.retriever.table.embeddings
        cosines = unit(table[rows[known]]) @ unit(table[[step.row for step in steps]]).T
        features: list[dict[str, Any] | None] = [None] * len(rows)
        for place, values in zip(known, _similarities(cosines), strict=True):
            features[place] = {"score": scores.scores[place], **values}
        return CandidateFeatures(scores, features)


def _similarities(cosines: np.ndarray) -> list[dict[str, Any]]:
    """Return the features of each candidate from its cosines [n, T] to the history."""
    found = Similarity.of(cosines)
    shares = found.counts / max(1, cosines.shape[1])
    return [
        {
            "max": float(found.max[n]), "mean": float(found.mean[n]),
            "top5_mean": float(found.top5[n]), "tiers": shares[n].tolist(),
        }
        for n in range(len(cosines))
    ]  # fmt: skip


def _alike(sizes: Sequence[int]) -> list[list[int]]:
    """Split calls into passes of similar numbers of new steps, so that little is padding."""
    order = sorted(range(len(sizes)), key=lambda n: sizes[n])
    passes: list[list[int]] = []
    for n in order:
        if passes and sizes[n] <= 2 * sizes[passes[-1][0]] + 4:
            passes[-1].append(n)
        else:
            passes.append([n])
    return passes
