"""What the endpoint's growing window of history does to recall, beside the window of evaluation.

    python benchmarks/growing_window.py RUN DATA [--split valid] [--examples 4000]

A model is trained on at most `collate.max_history` clicks. Evaluation reads the last so many; at
the endpoint a longer history's window begins anew with half as many and grows, so that its stored
keys and values stay valid.
Asked are the examples whose history is longer than one window, in both ways, through the endpoint's
own engine and the retriever. JSON lines: HR@K of both, in percent, and the difference in points
with its 95 % interval over users, for all of them and by the length that the window had.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from karma_ray import cli
from karma_ray.artifacts import absolute, join, read_table
from karma_ray.errors import InputError
from karma_ray.metrics.significance import paired_bootstrap
from karma_ray.retrieval.requests import HistoryItem, Request
from karma_ray.retrieval.retriever import Retriever
from karma_ray.serving.engine import Engine, RecallCall
from karma_ray.serving.histories import steps_of

KS = (10, 50, 200)
BATCH = 64


def request_of(row: dict) -> Request:
    """Return the request of an example."""
    steps = (row["history_item_ids"], row["history_queries"], row["history_timestamps"])
    return Request(row["query"], [HistoryItem(*step) for step in zip(*steps, strict=True)])


def long_examples(data: str, split: str, longer_than: int, count: int) -> pa.Table:
    """Return at most `count` examples with a longer history, drawn evenly."""
    table = read_table(join(data, "examples", f"split={split}"))
    lengths = pc.list_value_length(table.column("history_item_ids"))
    table = table.filter(pc.greater(lengths, longer_than))
    if table.num_rows == 0:
        raise InputError("DATA", data, f"has no {split} example with over {longer_than} clicks")
    drawn = np.random.default_rng(0).permutation(table.num_rows)[:count]
    return table.take(pa.array(np.sort(drawn)))


def main(argv: list[str] | None = None) -> None:
    """Ask, and print."""
    flags = cli.parser(__doc__ or "")
    flags.add_argument("run", metavar="RUN")
    flags.add_argument("data", metavar="DATA")
    flags.add_argument("--split", choices=["valid", "test"], default="valid")
    flags.add_argument("--examples", type=int, default=4000)
    given = flags.parse_args(argv)
    retriever = Retriever.load(absolute(given.run))
    limit = retriever.collator.config.max_history
    engine = Engine(retriever, cache_bytes=0)
    examples = long_examples(absolute(given.data), given.split, limit, given.examples)
    rows = examples.to_pylist()
    ranks: dict[str, list[int]] = {"evaluation": [], "endpoint": []}
    windows = []
    for begin in range(0, len(rows), BATCH):
        some = rows[begin : begin + BATCH]
        requests = [request_of(row) for row in some]
        windows += [len(steps_of(r.history, retriever.table, limit)) for r in requests]
        answers = {
            "evaluation": retriever.recall_batch(requests, max(KS)),
            "endpoint": engine.answer([RecallCall(request, max(KS)) for request in requests]),
        }
        for way, found in answers.items():
            for row, answer in zip(some, found, strict=True):
                ids = [item.item_id for item in answer.items]
                target = row["positive_item_id"]
                ranks[way].append(ids.index(target) if target in ids else max(KS))
    users = [row["user_id"] for row in rows]
    groups = {"all": np.ones(len(rows), bool)}
    for low, high in ((0.5, 0.625), (0.625, 0.75), (0.75, 0.875), (0.875, 1.01)):
        share = np.array(windows) / limit
        groups[f"{low:g} to {high:g} windows"] = (share >= low) & (share < high)
    for name, chosen in groups.items():
        if not chosen.any():
            continue
        line = {"examples": int(chosen.sum()), "window": name, "max_history": limit}
        for k in KS:
            hits = {w: (np.array(r)[chosen] < k).astype(float) for w, r in ranks.items()}
            found = paired_bootstrap(
                hits["endpoint"], hits["evaluation"],
                [user for user, taken in zip(users, chosen, strict=True) if taken], seed=0,
            )  # fmt: skip
            line[f"HR@{k}"] = [round(100 * hits[w].mean(), 2) for w in ranks]
            line[f"HR@{k} difference"] = [
                round(100 * value, 2) for value in (found.difference, found.low, found.high)
            ]
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    cli.run(main)
