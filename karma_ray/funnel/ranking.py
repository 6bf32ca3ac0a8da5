"""The ranking stage: what similarities of the item vectors add to a CTR model (method 1.13).

A DIN over ids is trained on exposures with the same seed and the same batches three times: without
KARMA, with similarity features of KARMA's vectors, and with those of action-only training. One
more arm of each run has h_t . e as a feature too. AUC and gAUC are over the test exposures.

Legend: n shown items.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from karma_ray import recipes
from karma_ray.artifacts import RunFolder, exists, join, read_json, value_hash
from karma_ray.config import Config, from_dict, override
from karma_ray.data.prepared import PreparedData
from karma_ray.funnel.opened import NONE, OpenedRun
from karma_ray.funnel.outcomes import UserSums
from karma_ray.metrics.ranking import group_auc
from karma_ray.ranking.judged import Judged
from karma_ray.runs.executor import HERE, Executor
from karma_ray.runs.pipeline import train_run

LOG = logging.getLogger(__name__)
PLAIN, SIMILAR = "ctr_din", "ctr_simtier"
WHOLE = "training.checkpoint_every=0"
"""A CTR model of a report whose training is cut off begins again."""
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class RankingRuns:
    """The CTR models of a report, in OUT/ranking; finished ones are not trained again."""

    source: PreparedData
    out: str
    cache: str
    settings: tuple[str, ...] = ()
    """Assignments of their configuration, the same for all."""
    executor: Executor = HERE
    """Trains them: this process, or a worker that it starts."""

    def without(self, like: OpenedRun) -> tuple[UserSums, dict[str, Any]]:
        """Measure DIN without KARMA, with the seed of a run."""
        judged, facts = self._judged(f"{NONE}-seed{like.seed}", self._config(PLAIN, like))
        return sums_of(judged), facts

    def beside(self, run: OpenedRun, like: OpenedRun) -> tuple[UserSums, dict[str, Any]]:
        """Measure DIN with similarities of a run's vectors, without and with h_t . e.

        The seed is that of `like`: models that are compared begin alike and see the same batches.
        """
        sums: dict[str, tuple[Floats, Floats]] = {}
        facts: dict[str, Any] = {}
        for name, interest in (("", False), ("interest_", True)):
            config = self._config(SIMILAR, like)
            ranking = replace(config.ranking, vectors=run.run, interest=interest)
            stem = f"{run.arm}-{name.replace('_', '-')}seed{like.seed}-{value_hash(run.parts)}"
            judged, found = self._judged(stem, replace(config, ranking=ranking))
            each = sums_of(judged, name)
            sums |= each.sums
            facts |= {f"{name}{key}": value for key, value in found.items()}
        return UserSums(each.users, sums), facts

    def _config(self, recipe: str, like: OpenedRun) -> Config:
        workers = f"training.num_workers={int(self.executor.train is not None)}"
        config = override(recipes.build(recipe), [workers, WHOLE, *self.settings])
        # The data stand prepared; another setting would prepare them again.
        prepare = from_dict(read_json(RunFolder(like.run).config)).prepare
        return replace(config, seed=like.seed, prepare=prepare)

    def _judged(self, name: str, config: Config) -> tuple[Judged, dict[str, Any]]:
        run = RunFolder(join(self.out, "ranking", f"{name}-{value_hash(self.settings)}"))
        if not exists(run.metrics):
            LOG.info("ranking: %s, seed %d", config.recipe, config.seed)
            train_run(config, self.source.uri, run.root, cache=self.cache,
                      resume=exists(run.checkpoints), executor=self.executor)  # fmt: skip
        metrics = read_json(run.metrics)
        facts = {"run": run.root, **{key: metrics.get(key) for key in ("num_test", "ECE")}}
        return Judged.load(run.path("predictions"), "test"), facts


def sums_of(judged: Judged, prefix: str = "") -> UserSums:
    """Return `AUC` and `gAUC` of predictions as sums per user, under a prefix."""
    users = [f"{user:09d}" for user in judged.user]
    scores, clicked = judged.chance, judged.clicked
    values: dict[str, Floats] = {}
    weights: dict[str, Floats] = {}
    if clicked.any() and not clicked.all():
        values["AUC"], weights["AUC"] = auc_parts(scores, clicked)
    pages, auc, weight = gauc_parts(scores, clicked, judged.page)
    if len(pages):
        numbers, first = np.unique(judged.page, return_index=True)
        at = first[np.searchsorted(numbers, pages)]
        values["gAUC"], weights["gAUC"] = np.zeros(len(users)), np.zeros(len(users))
        values["gAUC"][at], weights["gAUC"][at] = auc, weight
    named = {prefix + name: value for name, value in values.items()}
    return UserSums.of(users, named, {prefix + name: part for name, part in weights.items()})


def auc_parts(
    scores: NDArray[np.floating], clicked: NDArray[np.bool_]
) -> tuple[Floats, Floats]:  # [n], [n] -> [n], [n]
    """Return values and weights per shown item whose weighted mean is the AUC over all pairs.

    A shown item's value is AUC + 2 (v - AUC), where v is the share of the items of the other kind
    that it is in the right order with, and clicks and others have half of the weight each. The mean
    is exact, and its change under a resampling of users is that of the AUC up to second order, as
    an AUC varies with its clicks and with its others (DeLong et al. 1988).
    """
    positive, negative = int(clicked.sum()), int((~clicked).sum())
    assert positive and negative, "an AUC compares clicks with others"
    twice = _twice_ranks(scores)  # among all
    share = np.empty(len(scores))
    below = (twice[clicked] - _twice_ranks(scores[clicked])) / 2
    share[clicked] = below / negative
    above = (twice[~clicked] - _twice_ranks(scores[~clicked])) / 2
    share[~clicked] = 1.0 - above / positive
    mean = float(share[clicked].mean())
    weights = np.where(clicked, len(scores) / (2 * positive), len(scores) / (2 * negative))
    return mean + 2 * (share - mean), weights


def gauc_parts(
    scores: NDArray[np.floating], clicked: NDArray[np.bool_], page: NDArray[np.int64]
) -> tuple[NDArray[np.int64], Floats, Floats]:  # [n] each -> [G] each
    """Return page, AUC and weight (impressions, as in DIN) of every page with both kinds."""
    found = group_auc(scores, clicked, page)
    return found.groups, found.auc, found.weights("impressions")


def _twice_ranks(scores: NDArray[np.floating]) -> NDArray[np.int64]:  # [n] -> [n]
    """Return twice the mean rank of each score from below, equal ones sharing it."""
    _, which, counts = np.unique(scores, return_inverse=True, return_counts=True)
    before = np.cumsum(counts) - counts
    twice: NDArray[np.int64] = (2 * before + counts + 1)[which]
    return twice
