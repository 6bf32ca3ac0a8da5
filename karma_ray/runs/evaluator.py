"""What measures every ranker of a run on the same examples, catalogue and cold items."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from karma_ray.baselines.popularity import warm_mask
from karma_ray.baselines.ranker import Ranker
from karma_ray.config import Config
from karma_ray.data.paraphrases import Paraphrases
from karma_ray.data.prepared import PreparedData
from karma_ray.evaluation.evaluate import EvaluationResult, evaluate, measure
from karma_ray.evaluation.measurement import ALONE, Workers
from karma_ray.evaluation.outcomes import Outcomes
from karma_ray.evaluation.paraphrased import ParaphrasedRanker, paraphrased_metrics


class Evaluator:
    """Evaluates every ranker on the same examples, catalogue and cold items."""

    def __init__(self, config: Config, source: PreparedData) -> None:
        self.config, self.source = config, source
        self.catalog = source.catalog()
        self.warm = warm_mask(source.windows("item_ids"), self.catalog)
        self.matches = source.query_matches(self.catalog)
        self.held_out = source.held_out(self.catalog)
        named = config.evaluation.paraphrases
        self.paraphrases = Paraphrases.load(named) if named else None

    def __call__(self, ranker: Ranker, examples: pa.Table) -> dict[str, float]:
        """Return the metrics of a ranker as a flat mapping."""
        return self.detailed(ranker, examples).metrics

    def detailed(
        self, ranker: Ranker, examples: pa.Table, workers: Workers = ALONE
    ) -> EvaluationResult:
        """Return the metrics, and the values per example that they average."""
        return evaluate(
            ranker, examples, self.catalog, config=self.config.evaluation,
            train_item_ids=self.warm, query_matches=self.matches, held_out=self.held_out,
            seed=self.config.seed, workers=workers,
        )  # fmt: skip

    def rankings(self, ranker: Ranker) -> list[tuple[Ranker, pa.Table]]:
        """Return all that is ranked: the test, validation, and the test in other words, if any."""
        test = self.source.examples("test")
        found = [(ranker, test), (ranker, self.source.examples("valid"))]
        if self.paraphrases is not None and test.num_rows:
            found.append((ParaphrasedRanker(ranker, self.paraphrases), test))
        return found

    def share(self, ranker: Ranker, workers: Workers) -> Iterator[NDArray[Any]]:
        """Yield this worker's share of the values per example, of one ranking after another."""
        config, seed = self.config.evaluation, self.config.seed
        for asked, examples in self.rankings(ranker):
            measured, _ = measure(
                asked, examples, self.catalog, config, self.matches, seed, workers
            )
            yield from measured.values

    def both_splits(
        self, ranker: Ranker, outcomes: str | None = None, workers: Workers = ALONE
    ) -> dict[str, float]:
        """Return the test metrics, and the validation metrics under `valid/`.

        With `evaluation.paraphrases` those of the rewritten test queries are under `paraphrased/`.
        The outcome of every test example is written to the folder `outcomes`, if given. Other
        `workers` rank by `share`.
        """
        found = [self.detailed(*ranking, workers) for ranking in self.rankings(ranker)]
        test, valid, again = found[0], found[1], found[2] if len(found) > 2 else None
        metrics, examples = test.metrics, self.source.examples("test")
        if again is not None and self.paraphrases is not None:
            metrics = metrics | paraphrased_metrics(again, examples, self.paraphrases)
        if outcomes is not None:
            self._outcomes(examples, test, again).save(outcomes)
        return metrics | {f"valid/{name}": value for name, value in valid.metrics.items()}

    def _outcomes(
        self, examples: pa.Table, test: EvaluationResult, again: EvaluationResult | None
    ) -> Outcomes:
        targets = examples.column("positive_item_id").take(pa.array(test.details.rows))
        rows = self.catalog.rows(targets.combine_chunks())
        known, at = rows >= 0, np.maximum(rows, 0)
        cold = ~(known & self.warm[at])
        held_out = None if self.held_out is None else known & self.held_out[at]
        users = examples.column("user_id").to_pylist()
        paraphrased = None if again is None else again.details
        return Outcomes.of(test.details, cold, users, held_out, paraphrased)
