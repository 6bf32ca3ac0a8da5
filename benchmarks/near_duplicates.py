"""What grouping near-duplicates by cells misses, and what it costs beside comparing all pairs.

    python benchmarks/near_duplicates.py [--items 100000] [--width 64] [--kinds 300] [--quick]

Vectors are drawn around centres of kinds, as items of one kind are alike, and a tenth of the items
are near-duplicates of another, with a cosine between .99 and 1. `missed_share` is the share of the
pairs of near-duplicates that are in one group if all pairs are compared, and not by cells; both are
measured in CPU time. A JSON line; --quick checks the command on 3,000 items.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from numpy.typing import NDArray

from karma_ray import cli
from karma_ray.objectives import negatives

COSINE = 0.99
SPREAD = 1.0
"""Length of an item's own part beside that of its kind, which is 1."""


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    flags = cli.parser(__doc__ or "")
    flags.add_argument("--items", type=int, default=100_000, help="items (100000)")
    flags.add_argument("--width", type=int, default=64, help="width of the vectors (64)")
    flags.add_argument("--kinds", type=int, default=300, help="kinds of items (300)")
    flags.add_argument("--quick", action="store_true", help="3,000 items")
    arguments = flags.parse_args(argv)
    count = 3_000 if arguments.quick else arguments.items
    vectors, pairs = planted(count, arguments.width, arguments.kinds)
    every, all_seconds = grouped(vectors, count)
    some, cell_seconds = grouped(vectors, 0)
    together = every[pairs[0]] == every[pairs[1]]
    missed = together & (some[pairs[0]] != some[pairs[1]])
    line: dict[str, Any] = {
        "items": count, "width": arguments.width, "cells": count // negatives.CELL_ITEMS,
        "pairs": int(together.sum()), "missed_share": float(missed.sum() / together.sum()),
        "groups": int(every.max()) + 1, "groups_by_cells": int(some.max()) + 1,
        "all_pairs_cpu_seconds": all_seconds, "cells_cpu_seconds": cell_seconds,
    }  # fmt: skip
    print(json.dumps(line))


def planted(count: int, width: int, kinds: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return vectors [count, width] and the rows [2, count // 10] of near-duplicates."""
    random = np.random.default_rng(0)

    def units(number: int) -> NDArray[np.float64]:
        drawn = random.normal(size=(number, width))
        found: NDArray[np.float64] = drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
        return found

    vectors = units(kinds)[random.integers(0, kinds, count)] + SPREAD * units(count)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    pairs = random.permutation(count)[: 2 * (count // 10)].reshape(2, -1)
    away = units(pairs.shape[1])
    cosine = random.uniform(COSINE + 0.001, 1, pairs.shape[1])[:, None]
    first = vectors[pairs[0]]
    away -= (away * first).sum(1, keepdims=True) * first
    away /= np.linalg.norm(away, axis=1, keepdims=True)
    vectors[pairs[1]] = cosine * first + np.sqrt(1 - cosine**2) * away
    return vectors.astype(np.float32), pairs


def grouped(vectors: NDArray[np.float32], all_pairs: int) -> tuple[NDArray[np.int64], float]:
    """Return the groups of vectors if up to `all_pairs` are compared with all, and CPU seconds."""
    negatives.ALL_PAIRS, before = all_pairs, negatives.ALL_PAIRS
    started = time.process_time()
    found = negatives.grouped_contents(np.arange(len(vectors)), vectors, COSINE)
    seconds = time.process_time() - started
    negatives.ALL_PAIRS = before
    return found, round(seconds, 2)


if __name__ == "__main__":
    main()
