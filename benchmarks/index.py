"""Recall against queries a second of each kind of index, beside faiss called directly.

    python benchmarks/index.py [--items 100000 --items 1000000] [--width 128] [--kinds ivf,hnsw]

Vectors are drawn as embeddings lie: around centres of unequal size, with a spectrum that decays,
scaled to length 1. Queries are between an item and another one of its cluster, with noise, so they
are no items. They are asked one by one, or --batch at a time, in turn of the index as it is served
(loaded from its files, mapped into memory) and of faiss (that very index called directly; its own
exact index for `flat`, in memory), on one thread. Times are the thread's, so that other work on the
machine counts little: medians over the queries of medians over the rounds, and `over_faiss` is the
median ratio of the two. JSON lines, one for each setting of a kind.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from karma_ray import cli
from karma_ray.errors import InputError
from karma_ray.retrieval.engines import FaissSearch
from karma_ray.retrieval.exact import ExactSearch
from karma_ray.retrieval.index import ItemIndex
from karma_ray.retrieval.index_recall import DEPTHS, RECALL_AT, ProbeQueries
from karma_ray.retrieval.kinds import KINDS, Flat, IndexKind, faiss_for, index_kind

SWEEPS: dict[str, list[dict[str, int]]] = {
    "flat": [{}],
    "ivf": [{"num_probes": n} for n in (8, 16, 32, 64)],
    "hnsw": [{"breadth": n} for n in (200, 256, 512)],
    "ivfpq": [{"num_probes": n, "overfetch": o} for n, o in ((16, 4), (32, 8), (64, 8))],
    "sq8": [{"overfetch": n} for n in (1, 2)],
}
"""The settings of each kind that are measured, on one index."""


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    flags = cli.parser(__doc__ or "")
    flags.add_argument("--items", type=int, action="append", help="items (100000; repeatable)")
    flags.add_argument("--width", type=int, default=128, help="numbers of a vector (128)")
    flags.add_argument("--kinds", default=",".join(KINDS), help="kinds, with commas (all)")
    flags.add_argument("--queries", type=int, default=200, help="queries (200)")
    flags.add_argument("--batch", type=int, default=1, help="queries asked at a time (1)")
    flags.add_argument("--rounds", type=int, default=5, help="times each query is asked (5)")
    arguments = flags.parse_args(argv)
    torch.set_num_threads(1)
    faiss_for("ivf").omp_set_num_threads(1)
    for count in arguments.items or [100_000]:
        vectors, queries = drawn(count, arguments.width, arguments.queries)
        for name in arguments.kinds.split(","):
            kind = index_kind(name)
            if kind is None:
                raise InputError("--kinds", name, choices=KINDS)
            for line in measured(kind, vectors, queries, arguments.batch, arguments.rounds):
                print(json.dumps(line), flush=True)


def drawn(count: int, width: int, num_queries: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw items [count, width] and queries [num_queries, width], both of length 1."""
    random = np.random.default_rng(0)
    spectrum = (np.arange(1, width + 1) ** -0.5).astype(np.float32)
    num_centres = max(10, int(count**0.5))
    centres = random.normal(size=(num_centres, width)).astype(np.float32) * spectrum
    share = 1 / np.arange(1, num_centres + 1) ** 0.7
    cluster = random.choice(num_centres, count, p=share / share.sum())
    noise = random.standard_normal(size=(count, width), dtype=np.float32)
    items = _unit(centres[cluster] + 0.7 * noise * spectrum)
    first = random.integers(count, size=num_queries)
    second = [random.choice(np.flatnonzero(cluster == cluster[row])) for row in first]
    noise = random.standard_normal(size=(num_queries, width), dtype=np.float32)
    return items, _unit(_unit(items[first] + items[second]) + 0.5 * _unit(noise * spectrum))


def measured(
    kind: IndexKind, vectors: np.ndarray, queries: np.ndarray, batch: int, rounds: int
) -> Iterator[dict[str, Any]]:
    """Build an index and yield a line for each of its settings."""
    ids = [str(row) for row in range(len(vectors))]
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "index"))
        started = time.perf_counter()
        built = ItemIndex.build(vectors, ids, ids, kind, probes=ProbeQueries(queries, "drawn"))
        seconds = time.perf_counter() - started
        built.save(path)
        del built
        before = _anonymous()
        index = ItemIndex.load(path)
        private = _anonymous() - before
        files = sum(file.stat().st_size for file in Path(path).iterdir() if file.stem != "item_ids")
        best = ExactSearch(vectors).search(queries, RECALL_AT)[0]
        for knobs in SWEEPS[kind.kind]:
            tuned = dataclasses.replace(kind, **knobs)
            engine = index.engine
            if isinstance(engine, FaissSearch):
                engine = FaissSearch(engine.index, tuned)
            ours = dataclasses.replace(index, engine=engine)
            times, found = _timed(ours, _raw(index, tuned), queries, batch, rounds)
            ratios = [a / b for a, b in zip(*times, strict=True)]
            recalls = {k: _recall(found[:, :k], best[:, k - 1 :]) for k in DEPTHS}
            yield {
                "kind": kind.kind,
                "items": len(vectors),
                "width": vectors.shape[1],
                "knobs": dataclasses.asdict(tuned),
                **{f"recall@{k}": round(recall, 4) for k, recall in recalls.items()},
                "batch": batch,
                "queries_per_second": round(batch / statistics.median(times[0]), 1),
                "over_faiss": round(statistics.median(ratios), 3),
                "build_seconds": round(seconds, 1),
                "file_mib": round(files / 2**20, 1),
                "private_mib": round(private / 2**20, 1),
            }  # fmt: skip


def _raw(index: ItemIndex, kind: IndexKind) -> Callable[[np.ndarray], Any]:
    """Return what calls faiss directly, with a setting of the kind."""
    if isinstance(index.engine, ExactSearch):
        exact = faiss_for("ivf").IndexFlatIP(index.engine.d)
        exact.add(index.engine.vectors)
        return lambda queries: exact.search(queries, RECALL_AT)
    assert isinstance(index.engine, FaissSearch) and not isinstance(kind, Flat)
    mapped, parameters = index.engine.index, kind.search_parameters(None, 1.0)
    return lambda queries: mapped.search(queries, RECALL_AT, params=parameters)


def _timed(
    index: ItemIndex, raw: Callable[[np.ndarray], Any], queries: np.ndarray, batch: int, rounds: int
) -> tuple[list[list[float]], np.ndarray]:
    """Return seconds of each batch for both ways, and the scores that the index found."""
    batches = [queries[start : start + batch] for start in range(0, len(queries), batch)]
    ways = (lambda query: index.search(query, RECALL_AT), raw)
    took = np.zeros((rounds + 1, 2, len(batches)))
    found = []
    for turn in range(rounds + 1):
        for number, some in enumerate(batches):
            for way in (0, 1) if (turn + number) % 2 else (1, 0):
                started = time.thread_time()
                answer = ways[way](some)
                took[turn, way, number] = time.thread_time() - started
                if turn == 0 and way == 0:
                    found.append(answer[1])
    return np.median(took[1:], axis=0).tolist(), np.concatenate(found)


def _recall(found: np.ndarray, best: np.ndarray) -> float:
    """Share of the found scores that are as high as the last exact one (first column)."""
    return float((found >= best[:, :1] - 1e-6).mean())


def _unit(vectors: np.ndarray) -> np.ndarray:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


def _anonymous() -> int:
    """Bytes of this process that no other shares (Linux; 0 elsewhere)."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


if __name__ == "__main__":
    cli.run(main)
