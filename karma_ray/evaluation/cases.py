"""Example cases for the report: recalled titles, and the text decoded from h_t."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from karma_ray.baselines.sequential import IdModel
from karma_ray.data.catalog import Catalog
from karma_ray.evaluation.impressions import sampled
from karma_ray.model.karma import KarmaModel
from karma_ray.retrieval.retriever import Retriever


def collect_cases(
    retriever: Retriever,
    model: KarmaModel | IdModel,
    examples: pa.Table,
    catalog: Catalog,
    *,
    count: int,
    seed: int,
    top: int = 10,
) -> list[dict[str, Any]]:
    """Return `count` test examples: history, recalled titles, the target and the decoded text."""
    sample = sampled(examples, count, seed)
    scores = retriever.score(sample)  # [n, I]
    spoken = model.speak(retriever.interests(sample), retriever.collator.requests(sample))
    rows = sample.to_pylist()
    truths = catalog.rows([row["positive_item_id"] for row in rows])
    cases = []
    for row, values, truth, words in zip(rows, scores, truths, spoken, strict=True):
        best = np.argsort(-values, kind="stable")[:top]
        history = list(zip(row["history_queries"], row["history_item_ids"], strict=True))[-6:]
        known = catalog.rows([item for _, item in history])
        cases.append(
            {
                "query": row["query"],
                "history": [
                    {"query": query, "title": catalog.titles[place] if place >= 0 else item}
                    for (query, item), place in zip(history, known, strict=True)
                ],
                "truth": catalog.titles[truth] if truth >= 0 else row["positive_item_id"],
                "rank": int((values >= values[truth]).sum()) if truth >= 0 else None,
                "recalled": [
                    {
                        "title": catalog.titles[place],
                        "score": float(values[place]),
                        "is_truth": bool(place == truth),
                    }
                    for place in best
                ],
                "decoded": words,
            }
        )
    return cases
