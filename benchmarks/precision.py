"""What bfloat16 costs in what is found: one run embedded in both precisions, the same clicks.

    python benchmarks/precision.py RUN [--data DATA] [--split valid] [--kind KIND]

The run itself is left alone: its items are embedded twice into a temporary folder, by the encoder
of jobs/embed.py, and each table is indexed and measured on all clicks of a split by the evaluation
of runs. JSON lines: the cosines of the two vectors of an item, and for each metric both values, the
difference in points with its 95 % interval (paired, over users), and whether that holds 0. A metric
without values is left out. The last line says whether all hold 0, and the widest difference.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pyarrow as pa

from karma_ray import cli
from karma_ray.artifacts import RunFolder, absolute, join, read_json, read_manifest
from karma_ray.config import from_dict
from karma_ray.data.collate import Collator
from karma_ray.data.prepared import PreparedData
from karma_ray.errors import InputError
from karma_ray.evaluation.outcomes import Outcomes
from karma_ray.metrics.significance import paired_bootstrap
from karma_ray.model.device import this_device
from karma_ray.retrieval.embedding import embed_catalog
from karma_ray.retrieval.encode import ItemTable, load_embeddings
from karma_ray.retrieval.export import load_bundle
from karma_ray.retrieval.kinds import index_kind
from karma_ray.retrieval.retriever import Retriever
from karma_ray.runs.evaluator import Evaluator

PRECISIONS = ("float32", "bfloat16")
METRICS = ("HR@10", "HR@50", "HR@200", "NDCG@10", "MRR", "gAUC")


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    flags = cli.parser(__doc__ or "")
    flags.add_argument("run", metavar="RUN", help="run folder")
    flags.add_argument("--data", metavar="DATA", help="prepared data (default: the run's)")
    flags.add_argument("--split", choices=["valid", "test"], default="test", help="(test)")
    flags.add_argument("--kind", help="of the index (default: by the size of the catalogue)")
    arguments = flags.parse_args(argv)
    run = RunFolder(absolute(arguments.run))
    source = PreparedData.load(arguments.data or read_manifest(run.root, "run")["data"])
    examples = source.examples(arguments.split)
    if not examples.num_rows:
        raise InputError("--split", arguments.split, "has no example")
    evaluator = Evaluator(from_dict(read_json(run.config)), source)
    with tempfile.TemporaryDirectory() as folder:
        tables = {kind: embedded(run, source, join(folder, kind), kind) for kind in PRECISIONS}
    kind = index_kind(arguments.kind) if arguments.kind else None
    retrievers = (retriever(run, tables[name], evaluator, kind) for name in PRECISIONS)
    found = [outcomes(evaluator, one, examples) for one in retrievers]
    lines = list(compared(*found))
    for line in lines:
        print(json.dumps(line), flush=True)
    print(json.dumps({
        "run": run.root, "clicks": len(found[0].rank), "users": lines[0]["users"],
        **cosines(*(tables[name] for name in PRECISIONS)),
        "all_within_noise": all(line["within_noise"] for line in lines),
        "widest_difference": max(abs(line["difference"]) for line in lines),
    }))  # fmt: skip


def embedded(run: RunFolder, source: PreparedData, out: str, precision: str) -> ItemTable:
    """Embed the catalogue, and return it in its order."""
    started = time.perf_counter()
    manifest = embed_catalog(run.bundle, source.items_uri, out, precision=precision)
    seconds = time.perf_counter() - started
    told = {"precision": precision, "items": manifest["num_items"], "seconds": round(seconds, 1)}
    print(json.dumps(told), flush=True)
    return load_embeddings(out).in_order(source.catalog().item_ids)


def retriever(run: RunFolder, table: ItemTable, evaluator: Evaluator, kind: Any) -> Retriever:
    """Return the run's model over a table of vectors, with an index of them."""
    bundle = load_bundle(run.bundle)
    interest = bundle.interest.to(this_device(None))
    collator = Collator(table, bundle.tokenizer, bundle.collate_config)
    catalog, vectors = evaluator.catalog, table.embeddings
    return Retriever.from_model(interest, collator, catalog, vectors, kind)


def outcomes(evaluator: Evaluator, ranker: Retriever, examples: pa.Table) -> Outcomes:
    """Return the outcome of every click."""
    details = evaluator.detailed(ranker, examples).details
    nowhere = np.zeros(len(details.rows), dtype=bool)
    return Outcomes.of(details, nowhere, examples.column("user_id").to_pylist())


def compared(full: Outcomes, half: Outcomes) -> Iterator[dict[str, Any]]:
    """Yield a line for each metric: bfloat16 minus float32."""
    for metric in METRICS:
        before, after = full.values(metric), half.values(metric)
        if before is None or after is None:
            continue
        values, users, weights = before
        boot = paired_bootstrap(after[0], values, users.tolist(), seed=0, weights=weights)
        yield {
            "metric": metric, "float32": round(float(np.average(values, weights=weights)), 3),
            "bfloat16": round(float(np.average(after[0], weights=weights)), 3),
            "difference": round(boot.difference, 3),
            "interval": [round(boot.low, 3), round(boot.high, 3)],
            "within_noise": bool(boot.low <= 0 <= boot.high), "users": boot.num_users,
        }  # fmt: skip


def cosines(full: ItemTable, half: ItemTable) -> dict[str, float]:
    """Return the least and the mean cosine of the two vectors of an item."""
    one, other = (
        table.embeddings / np.linalg.norm(table.embeddings, axis=1, keepdims=True)
        for table in (full, half)
    )
    found = (one * other).sum(1)
    return {"least_cosine": round(float(found.min()), 6),
            "mean_cosine": round(float(found.mean()), 6)}  # fmt: skip


if __name__ == "__main__":
    cli.run(main)
