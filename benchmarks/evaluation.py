"""Time and memory of evaluating rankers on a very large catalogue, in blocks of requests.

    python benchmarks/evaluation.py [--items 1000000] [--requests 134] [--quick]

Items with titles and brands are drawn, and requests with histories and pages; each ranker is
measured as every run is (karma_ray/evaluation). `dense` scores by vectors of width 64. JSON lines:
CPU seconds of building a ranker, CPU milliseconds a request, the memory that is the process's own
before (`held_gib`), and what the evaluation needs beside it at its peak (`more_gib`). --quick
checks the command on 2,000 items.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pyarrow as pa

from benchmarks.lookup import anonymous_gib
from karma_ray import cli
from karma_ray.baselines.affinity import AffinityRanker
from karma_ray.baselines.bm25 import Bm25Ranker
from karma_ray.baselines.popularity import PopularityRanker
from karma_ray.baselines.ranker import Ranker
from karma_ray.data.catalog import Catalog
from karma_ray.data.prepared import QueryMatches
from karma_ray.data.schema import EXAMPLES
from karma_ray.evaluation.config import EvaluationConfig
from karma_ray.evaluation.evaluate import evaluate

WIDTH, WORDS, SHOWN = 64, 5_000, 14


class Dense:
    """Scores by inner products, as a retriever does."""

    def __init__(self, num_items: int) -> None:
        self._random = np.random.default_rng(3)
        self._items = self._random.standard_normal((num_items, WIDTH)).astype(np.float32)

    def score(self, examples: pa.Table) -> np.ndarray:
        """Return scores [b, I] for random interests."""
        interests = self._random.standard_normal((examples.num_rows, WIDTH)).astype(np.float32)
        return np.asarray(interests @ self._items.T)


class Peak:
    """The largest memory that is this process's own, since `self.gib` was set to 0."""

    def __init__(self) -> None:
        self.gib = 0.0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.gib = max(self.gib, anonymous_gib())
            time.sleep(0.02)


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    flags = cli.parser(__doc__ or "")
    flags.add_argument("--items", type=int, default=1_000_000, help="items (1000000)")
    flags.add_argument("--requests", type=int, default=134, help="requests (134)")
    flags.add_argument("--quick", action="store_true", help="2,000 items, 20 requests")
    arguments = flags.parse_args(argv)
    num_items = 2_000 if arguments.quick else arguments.items
    num_requests = 20 if arguments.quick else arguments.requests
    catalog, examples = drawn_catalog(num_items), drawn_examples(num_items, num_requests)
    clicks = np.random.default_rng(2).poisson(0.3, num_items)
    matches, peak = QueryMatches(catalog), Peak()
    rankers: dict[str, Callable[[], Ranker]] = {
        "popularity": lambda: PopularityRanker(clicks),
        "dense": lambda: Dense(num_items),
        "affinity": lambda: AffinityRanker(catalog, matches, clicks),
        "bm25": lambda: Bm25Ranker(catalog),
    }
    for name, build in rankers.items():
        began = time.process_time()
        ranker = build()
        built, held, peak.gib = time.process_time(), anonymous_gib(), 0.0
        evaluate(
            ranker, examples, catalog, config=EvaluationConfig(), train_item_ids=clicks > 0,
            query_matches=matches,
        )  # fmt: skip
        spent = time.process_time() - built
        print(json.dumps({
            "items": num_items, "requests": num_requests, "ranker": name,
            "build_seconds": round(built - began, 2),
            "ms_per_request": round(spent / num_requests * 1e3, 1),
            "held_gib": round(held, 2), "more_gib": round(peak.gib - held, 2),
        }), flush=True)  # fmt: skip


def drawn_catalog(num_items: int) -> Catalog:
    """Draw items with four words and a brand."""
    random = np.random.default_rng(0)
    words = np.array([f"w{number}" for number in range(WORDS)])
    drawn = words[(WORDS * random.random((num_items, 4)) ** 2).astype(int)]
    none = pa.nulls(num_items, pa.string())
    columns = {
        "item_id": pa.array(np.arange(num_items)).cast(pa.string()),
        "title": [" ".join(some) for some in drawn],
        "brand": pa.array(random.integers(0, 300, num_items)).cast(pa.string()),
        "text": none,
        "category": none,
    }
    return Catalog(pa.table(columns))


def drawn_examples(num_items: int, num_requests: int) -> pa.Table:
    """Draw requests for a word, with ten clicks before and a page of four items."""
    shown = np.random.default_rng(1).integers(0, num_items, (num_requests, SHOWN)).astype(str)
    rows = [
        {
            "user_id": f"u{number}",
            "query": f"w{number}",
            "page_id": f"p{number}",
            "page_positive_ids": [items[0]],
            "positive_item_id": items[0],
            "hard_negative_ids": items[1:4],
            "history_item_ids": items[4:],
        }
        for number, items in enumerate(shown.tolist())
    ]
    return pa.Table.from_pylist(rows, schema=EXAMPLES)


if __name__ == "__main__":
    cli.run(main)
