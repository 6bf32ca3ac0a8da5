"""What recall by all lists costs a request, beside the model's list alone.

    python benchmarks/channels.py [--items 10000 --items 100000] [--requests 100] [--quick]

The shop is drawn: titles of a dozen words whose frequencies fall as in language, four attributes,
clicks on few items. Every request is answered by the dense list and by the blend in turn, on one
thread, from search vectors that are given, so that the model's own time does not count in either.
Times are the thread's, medians over the requests of medians over the rounds: `dense_ms`,
`blend_ms`, and `added_ms`, the median difference. JSON lines, one for each number of items and
kind of request: with a query, a history of 20 clicks, or both.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pyarrow as pa
import torch

from karma_ray import cli
from karma_ray.data.catalog import Catalog
from karma_ray.data.collate import CollateConfig, Collator
from karma_ray.data.prepared import Postings
from karma_ray.model.backbone import build_tiny
from karma_ray.model.backbones.tokenizer import train_tokenizer
from karma_ray.model.config import ModelConfig, TinyBackboneConfig
from karma_ray.model.interest import InterestModel
from karma_ray.retrieval.blend import GROUPS, SCORES, Blend
from karma_ray.retrieval.blended import BlendedSearch
from karma_ray.retrieval.channel_tastes import Tastes
from karma_ray.retrieval.channel_words import Words
from karma_ray.retrieval.channels import Channels, Matches
from karma_ray.retrieval.encode import ItemTable
from karma_ray.retrieval.filters import Filter
from karma_ray.retrieval.requests import HistoryItem, Request
from karma_ray.retrieval.retriever import Retriever, build_index

WORDS, TITLE, HISTORY, K = 20_000, 12, 20, 100
ATTRIBUTES = {"brand": 2000, "category": 100, "colour": 20, "material": 40}
TINY = TinyBackboneConfig(hidden_size=64, num_heads=2, num_key_value_heads=1, intermediate_size=64)
KINDS = ("query", "history", "both")


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    flags = cli.parser(__doc__ or "")
    flags.add_argument("--items", type=int, action="append", help="items (10000 and 100000)")
    flags.add_argument("--requests", type=int, default=100, help="requests of each kind (100)")
    flags.add_argument("--rounds", type=int, default=5, help="times each request is asked (5)")
    flags.add_argument("--quick", action="store_true", help="2,000 items, few requests")
    arguments = flags.parse_args(argv)
    torch.set_num_threads(1)
    counts = [2_000] if arguments.quick else arguments.items or [10_000, 100_000]
    requests, rounds = (5, 2) if arguments.quick else (arguments.requests, arguments.rounds)
    for count in counts:
        rng = np.random.default_rng(0)
        retriever, search, titles = shop(count, rng)
        for kind in KINDS:
            line = measured(retriever, search, asked(kind, requests, titles, rng), rounds)
            print(json.dumps({"items": count, "request": kind, **line}), flush=True)


def shop(count: int, rng: np.random.Generator) -> tuple[Retriever, BlendedSearch, list[str]]:
    """Return a retriever of random vectors, its channels, and the titles."""
    shares = 1.0 / np.arange(1, WORDS + 1) ** 0.9
    drawn = rng.choice(WORDS, (count, TITLE), p=shares / shares.sum())
    titles = [" ".join(f"w{word}" for word in row) for row in drawn]
    ids = [f"i{n}" for n in range(count)]
    columns = {
        f"attr_{name}": pa.array([f"v{value}" for value in rng.integers(0, size, count)])
        for name, size in ATTRIBUTES.items()
    }
    nothing = pa.nulls(count, pa.string())
    texts = {"item_id": ids, "title": titles, "brand": nothing, "category": nothing,
             "text": nothing}  # fmt: skip
    catalog = Catalog(pa.table({**texts, **columns}))
    clicks = rng.zipf(1.6, count).clip(max=10_000) - 1
    channels = Channels(
        Words.of(titles), Tastes.of(catalog.table, clicks),
        Matches({}, catalog.derived(Postings.of)), {},
    )  # fmt: skip
    words = train_tokenizer(iter(titles[:200]), 512)
    size = len(words.get_vocab())  # type: ignore[attr-defined]
    bodies = [build_tiny(TINY, size, seed) for seed in (0, 1)]
    interest = InterestModel(ModelConfig(tiny=TINY), *bodies, words, 0).eval()
    vectors = rng.normal(size=(count, TINY.hidden_size)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    table = ItemTable(ids, titles, vectors, {})
    retriever = Retriever(interest, Collator(table, words, CollateConfig()), table,
                          build_index(interest, table))  # fmt: skip
    blend = Blend("logistic", {group: dict.fromkeys(SCORES, 1.0) for group in GROUPS})
    return retriever, BlendedSearch(channels, blend), titles


def asked(
    kind: str, count: int, titles: list[str], rng: np.random.Generator
) -> list[Request]:  # fmt: skip
    """Return requests whose query has two words of a title, which may match many items."""
    found = []
    for _ in range(count):
        query = " ".join(rng.choice(titles[int(rng.integers(len(titles)))].split(), 2))
        history = [HistoryItem(f"i{row}") for row in rng.integers(0, len(titles), HISTORY)]
        found.append(
            Request("" if kind == "history" else query, [] if kind == "query" else history)
        )
    return found


def measured(
    retriever: Retriever, search: BlendedSearch, requests: list[Request], rounds: int
) -> dict[str, Any]:
    """Return the medians of both."""
    width = retriever.index.engine.d
    vectors = np.random.default_rng(1).normal(size=(len(requests), 1, width)).astype(np.float32)

    def answer(number: int, blended: BlendedSearch | None) -> None:
        retriever.blended = blended
        retriever.best_of(vectors[[number]], [requests[number]], [K], [Filter()])

    answer(0, search)
    dense, blend, added = [], [], []
    for number in range(len(requests)):
        pairs = [(timed(answer, number, None), timed(answer, number, search))
                 for _ in range(rounds)]  # fmt: skip
        ours, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
        dense.append(ours)
        blend.append(theirs)
        added.append(theirs - ours)
    names = ("dense_ms", "blend_ms", "added_ms")
    medians = [round(statistics.median(times), 3) for times in (dense, blend, added)]
    slow = round(float(np.quantile(added, 0.99)), 3)
    return {**dict(zip(names, medians, strict=True)), "added_p99_ms": slow}


def timed(what: Callable[..., None], *given: Any) -> float:
    """Return the milliseconds of this thread that a call takes."""
    started = time.thread_time()
    what(*given)
    return 1e3 * (time.thread_time() - started)


if __name__ == "__main__":
    cli.run(main)
