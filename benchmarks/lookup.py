"""Memory and time of looking item ids up: the table that a node shares, beside a dictionary.

    python benchmarks/lookup.py [--items 1000000 --items 10000000] [--rounds 3] [--quick]

Every round starts a process for each of the two in turn, as a training worker would: it opens the
catalogue's Arrow copy, and builds a dictionary of the ids or maps the lookup table. `anonymous_mib`
is what the process then holds for itself alone (mapped files are shared by a node's processes), and
`open_seconds` the CPU time of opening, which for the first lookup of a node includes writing the
table (`first`). Lookups take ids as Arrow arrays, as collation does; `ns_by_size` is CPU time of an
id by the number asked at once, medians over the rounds. JSON lines, one for each number of items
and kind; --quick checks the command on 10,000 items.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pyarrow as pa

from karma_ray import cli
from karma_ray.data.item_lookup import ItemLookup

KINDS = ("dictionary", "table")
SIZES = (500, 5_000, 50_000)
TAKEN_SECONDS = 0.5
"""CPU time for which lookups of one size are repeated."""


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    flags = cli.parser(__doc__ or "")
    flags.add_argument("--items", type=int, action="append", help="items (1000000 and 10000000)")
    flags.add_argument("--rounds", type=int, default=3, help="processes of each kind (3)")
    flags.add_argument("--quick", action="store_true", help="10,000 items, one round")
    arguments = flags.parse_args(argv)
    counts = [10_000] if arguments.quick else arguments.items or [10**6, 10**7]
    rounds = 1 if arguments.quick else arguments.rounds
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "items.arrow")
            _write(path, count)
            found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
            for _ in range(rounds + 1):  # the first one of a node also writes the table
                for kind in KINDS:
                    found[kind].append(_in_process(str(path), kind))
        for kind in KINDS:
            first, *later = found[kind]
            print(json.dumps({"items": count, "kind": kind, **_line(first, later)}), flush=True)


def _write(path: Path, count: int) -> None:
    numbers = np.random.default_rng(0).permutation(count)
    with pa.OSFile(str(path), "wb") as sink:
        table = pa.table({"item_id": pa.array(numbers + 10**8).cast(pa.string())})
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)


def _in_process(path: str, kind: str) -> dict[str, Any]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return dict(pool.apply(measured, (path, kind)))


def measured(path: str, kind: str) -> dict[str, Any]:
    """Return what opening one of KINDS and looking up takes in this process."""
    column = pa.ipc.open_file(pa.memory_map(path)).read_all().column("item_id")
    held, started = anonymous_gib() * 1024, time.process_time()
    rows = _opened(column, Path(path), kind)
    rows(column.chunk(0)[:1])
    result: dict[str, Any] = {
        "open_seconds": time.process_time() - started,
        "anonymous_mib": anonymous_gib() * 1024 - held,
    }
    random = np.random.default_rng(1)
    for size in SIZES:
        asked = [
            column.chunk(0).take(pa.array(random.integers(0, len(column), size)))
            for _ in range(2 * SIZES[-1] // size)
        ]
        rounds, begun = 0, time.process_time()
        while time.process_time() < begun + TAKEN_SECONDS:
            for ids in asked:
                rows(ids)
            rounds += len(asked)
        result[str(size)] = (time.process_time() - begun) / (rounds * size) * 1e9
    return result


def _opened(column: pa.ChunkedArray, path: Path, kind: str) -> Callable[[pa.Array], np.ndarray]:
    if kind == "table":
        return ItemLookup(column, path).rows
    row_of = {item_id: row for row, item_id in enumerate(column.to_pylist())}
    return lambda ids: np.fromiter(
        (row_of.get(item_id, -1) for item_id in ids.to_pylist()), np.int64, len(ids)
    )


def anonymous_gib() -> float:
    """Return the memory of this process that is no file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (kib,) = (line.split()[1] for line in lines if line.startswith("RssAnon:"))
    return int(kib) / 2**20


def _line(first: dict[str, Any], later: list[dict[str, Any]]) -> dict[str, Any]:
    def middle(name: str) -> float:
        return float(statistics.median(each[name] for each in later))

    return {
        "rounds": len(later),
        "first_open_seconds": round(first["open_seconds"], 3),
        "open_seconds": round(middle("open_seconds"), 3),
        "anonymous_mib": round(middle("anonymous_mib"), 1),
        "ns_by_size": {size: round(middle(str(size))) for size in SIZES},
    }


if __name__ == "__main__":
    cli.run(main)
