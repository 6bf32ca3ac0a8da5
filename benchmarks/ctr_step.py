"""Speed of training a CTR model: shown items per second, and what of a step takes the time.

python benchmarks/ctr_step.py                     DIN over ids at width 16, two threads
python benchmarks/ctr_step.py --items 1000000     a large table, whose dense Adam takes the time

Pages are drawn, with ten items and a full history each. A step is collate (which a run does in
another thread), forward and backward pass, and the optimiser.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pyarrow as pa
import torch

from karma_ray import recipes
from karma_ray.ranking.batch import CtrBatch
from karma_ray.ranking.collate import CtrCollator
from karma_ray.ranking.exposures import EXPOSURES
from karma_ray.ranking.families import Sizes, build_model, family_of
from karma_ray.training.ctr_step import CtrStep
from karma_ray.training.optim import build_optimizer

SHOWN = 10


def drawn_pages(pages: int, items: int, history: int) -> pa.Table:
    """Return drawn rows of exposures."""
    random = np.random.default_rng(0)
    words = [f"word{number} thing" for number in random.integers(0, 500, pages)]
    rows = [
        {
            "query": words[page], "history_rows": random.integers(0, items, history),
            "candidate_rows": random.integers(0, items, SHOWN),
            "clicked": random.random(SHOWN) < 0.1,
        }
        for page in range(pages)
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, schema=EXPOSURES)


def seconds(call: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Return the median time of a call, and its median CPU time, which other work changes less."""
    call()
    times = []
    for _ in range(repeats):
        started, began = time.perf_counter(), time.process_time()
        call()
        times.append((time.perf_counter() - started, time.process_time() - began))
    wall, cpu = np.median(times, axis=0)
    return float(wall), float(cpu)


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    flags.add_argument("--items", type=int, default=10_000, help="rows of the item table")
    flags.add_argument("--width", type=int, default=16, help="width of the embeddings")
    flags.add_argument("--history", type=int, default=20, help="clicks before each page")
    flags.add_argument("--pages", type=int, default=256, help="pages of a step")
    flags.add_argument("--threads", type=int, default=2, help="CPU threads")
    flags.add_argument("--repeats", type=int, default=30, help="steps that are timed")
    given = flags.parse_args()
    found, rows = measured(
        given.items, given.width, given.history, given.pages, given.threads, given.repeats
    )
    for name, (wall, cpu) in found.items():
        print(
            f"{name:<10} {1000 * wall:8.2f} ms  {rows / wall:12,.0f} shown items/s"
            f"   CPU {1000 * cpu:8.2f} ms  {rows / cpu:12,.0f}"
        )


def measured(
    items: int, width: int, history: int, num_pages: int, threads: int, repeats: int
) -> tuple[dict[str, tuple[float, float]], int]:
    """Return the wall and CPU seconds of each part of a step, and how many items it has."""
    torch.set_num_threads(threads)
    config = recipes.build("ctr_din")
    ranking = replace(config.ranking, width=width, max_history=history)
    model = build_model(ranking, Sizes(items, [50, 200]))
    optimizer = build_optimizer(model, learning_rate=config.training.learning_rate)
    step, collate = CtrStep(tuple(family_of(ranking).terms(ranking, None))), CtrCollator(ranking)
    pages = drawn_pages(num_pages, items, history)
    batch: CtrBatch = collate(pages)

    def learn() -> None:
        optimizer.zero_grad(set_to_none=True)
        step(model, batch).loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    found = {
        "collate": seconds(lambda: collate(pages), repeats),
        "forward": seconds(lambda: step(model, batch), repeats),
        "step": seconds(learn, repeats),
        "optimiser": seconds(optimizer.step, repeats),
    }
    return found, batch.num_candidates


if __name__ == "__main__":
    main()
