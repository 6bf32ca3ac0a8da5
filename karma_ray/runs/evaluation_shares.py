"""The final evaluation by several processes, each of which ranks some blocks of the examples.

This process measures, and other ones yield the values of the blocks that it leaves to them, in the
order in which it asks for them. All blocks are those of a single process, and so are all values.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from karma_ray.artifacts import RunFolder
from karma_ray.baselines.ranker import Ranker
from karma_ray.config import Config
from karma_ray.data.prepared import PreparedData
from karma_ray.evaluation.measurement import ALONE, Workers
from karma_ray.model.device import using_gpus
from karma_ray.retrieval.retriever import Retriever
from karma_ray.runs.evaluator import Evaluator

LOG = logging.getLogger(__name__)

SHARE_SECONDS = 60.0
"""Seconds of ranking that are worth a further process: until one ranks, it has started, imported
PyTorch and loaded catalogue, model and item vectors, which takes ten to twenty seconds."""
GROWN_SECONDS = 1200.0
"""Seconds of ranking that are worth machines which the autoscaler has yet to start, as that takes
minutes."""
SOME_SECONDS = 1.0
"""Time to rank the examples from which the time for all of them is estimated."""
FEW = 8
"""Examples of the first estimate."""

Share = Callable[[int, int], Iterator[NDArray[Any]]]
"""(rank, count) -> the values of one of `count` processes."""

Enlist = Callable[[Share, int, str, int], Sequence[Iterator[NDArray[Any]]]]
"""(share, most, bundle, later) -> what at most so many other processes yield, each of which loads
the bundle and calls `share` with a rank from 1, and with their number and this process as the
count. Machines for `later` of them may be started first."""


@dataclass(frozen=True)
class RankingShare:
    """What another process ranks: the floors of these names, and then the run's retriever."""

    config: Config
    source: PreparedData
    run: str
    floors: Sequence[str]

    def __call__(self, rank: int, count: int) -> Iterator[NDArray[Any]]:
        """Yield the values per example of this process's blocks."""
        with using_gpus(self.config.training.use_gpu != "false"):
            evaluator, workers = Evaluator(self.config, self.source), Workers(rank, count)
            for ranker in self._rankers():
                yield from evaluator.share(ranker, workers)

    def _rankers(self) -> Iterator[Ranker]:
        if self.floors:
            from karma_ray.baselines.floors import build_floor

            for name in self.floors:
                yield build_floor(name, self.source, self.config.seed)
        yield Retriever.load(self.run, self.source.items_uri)


def enlisted(
    evaluator: Evaluator, retriever: Retriever, run: str, floors: Sequence[str],
    enlist: Enlist | None,
) -> Workers:  # fmt: skip
    """Return the processes that rank together: this one alone if nobody else is worth it."""
    if enlist is None:
        return ALONE
    seconds = _seconds(evaluator, retriever)
    most = int(seconds / SHARE_SECONDS) - 1
    # As many machines as the run was trained on are what its owner wants to pay for.
    later = evaluator.config.training.num_workers - 1 if seconds >= GROWN_SECONDS else 0
    share = RankingShare(evaluator.config, evaluator.source, run, tuple(floors))
    others = enlist(share, most, RunFolder(run).bundle, later) if most > 0 else []
    if not others:
        return ALONE
    LOG.info("about %.0f s of ranking are divided between %d processes", seconds, len(others) + 1)

    def add(values: NDArray[Any]) -> NDArray[Any]:
        for other in others:
            values = values + next(other)
        return values

    return Workers(0, len(others) + 1, add)


def _seconds(evaluator: Evaluator, retriever: Retriever) -> float:
    """Return about how long one process takes to rank everything, from some of the examples."""
    limit = evaluator.config.evaluation.max_examples
    sizes = [each.num_rows for _, each in evaluator.rankings(retriever)]
    total: int = sum(min(size, limit or size) for size in sizes)
    examples = evaluator.rankings(retriever)[0][1]
    some = FEW
    evaluator(retriever, examples.slice(0, some))  # makes what is made once
    while True:
        begun = time.monotonic()
        evaluator(retriever, examples.slice(0, some))
        taken = time.monotonic() - begun
        if taken >= SOME_SECONDS or some >= examples.num_rows:
            return taken / some * total
        some *= 4
