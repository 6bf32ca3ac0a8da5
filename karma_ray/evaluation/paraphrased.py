"""The same requests in other words: what a ranker knows of a query beyond its training clicks.

The query of the request is rewritten for the ranker alone. Requests, pages and the items that a
query matches stay those of the original query, and so do the queries of the history.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from karma_ray.baselines.ranker import Ranker
from karma_ray.data.paraphrases import Paraphrases
from karma_ray.evaluation.evaluate import EvaluationResult


class ParaphrasedRanker:
    """Asks another ranker with rewritten queries."""

    def __init__(self, ranker: Ranker, paraphrases: Paraphrases) -> None:
        self._ranker, self._paraphrases = ranker, paraphrases

    def score(self, examples: pa.Table) -> NDArray[np.floating]:  # -> [b, I]
        """Return the scores of the ranker for the rewritten examples."""
        return self._ranker.score(self._paraphrases.rewritten(examples))


def paraphrased_metrics(
    found: EvaluationResult, examples: pa.Table, paraphrases: Paraphrases
) -> dict[str, float]:
    """Return the metrics over all examples, and over `held_out/`, under `paraphrased/`.

    `paraphrased/share_rewritten` is the share of the examples whose query is rewritten, in percent.
    """
    measured = examples.take(pa.array(found.details.rows))
    share = 100.0 * paraphrases.num_rewritten(measured) / max(measured.num_rows, 1)
    kept = {"share_rewritten": share} | {
        name: value
        for name, value in found.metrics.items()
        if name.startswith("held_out/") or ("/" not in name and name != "num_unknown_target")
    }
    return {f"paraphrased/{name}": value for name, value in kept.items()}
