"""What data of any size would take on the machines of cluster.yaml, by measured rates.

    python benchmarks/paper_model.py [--events 1e9] [--items 1e8] [--lines FILE ...]

Arithmetic: nothing of that size is run. FILEs hold the JSON lines of benchmarks/prepare.py,
encode.py, codes.py, index.py and gpu_check.py, whose rates replace those that are named here; what
has no rate is left out, and told. Two rates are measured on the spot, in CPU time: the look-up of
a part's items among all ids, and the reading of a partition's rows from one part.

A page has 8 items shown, and a core of the measurements counts as one of a machine's virtual CPUs,
which nobody has checked. Dollars are list prices of docs/cluster.md, spot at 40 % of them. JSON
lines, one for a step and a last one with the sums; `source` says where a rate is from, and
`measured` is false where a part of the arithmetic was never seen.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from karma_ray import cli
from karma_ray.artifacts import join
from karma_ray.data.config import PrepareConfig
from karma_ray.data.event_parts import Sizes
from karma_ray.data.user_rows import num_partitions, read_rows, slot_range, write_rows
from karma_ray.data.validation import CLEAN_EVENTS
from karma_ray.errors import InputError

CELLS_PER_EVENT = 14
"""User, time, query, session, eight items shown and two clicked."""
SPOT = 0.4
LARGEST = 12
"""Machines that cluster.yaml starts at most."""
IDS = 2_000_000
"""Ids of a catalogue with which the look-up is measured; its time grows with their number."""
REQUESTS = 4
"""Of a read: its size, the end of the file, the footer, and one batch."""
DOLLARS_PER_REQUEST = 0.4e-6
"""List price of a GET of S3."""
A10G = 70e12 * 0.45
"""Operations a second: the data sheet's peak in bfloat16, and a share that nobody has measured."""
WEIGHTS = {"smollm2-135m": 1.06e8, "qwen3-0.6b": 4.4e8}
"""In the layers of an item encoder; a token costs two operations for each."""
TOKENS = 57
"""Of an item's text: the median of `hm` (docs/scale.md)."""


@dataclass(frozen=True)
class Machine:
    """A type of cluster.yaml."""

    name: str
    cores: int
    dollars: float
    """An hour on demand, with its disk of 200 GB."""


CPU, GPU = Machine("m5.4xlarge", 16, 0.79), Machine("g5.2xlarge", 8, 1.234)


@dataclass(frozen=True)
class Rate:
    """Core-seconds (seconds of a GPU) for one unit of work."""

    seconds: float
    source: str
    measured: bool = True


@dataclass
class Rates:
    """What is known of each step; a benchmark's lines replace it."""

    prepare: Rate = Rate(12.1e-6, "docs/log.md, L52: (53.8 - 29.6) CPU s for two million pages")
    codes: Rate = Rate(1 / 766_000, "docs/codes.md: res_kmeans_fsq, width 64")
    encode: dict[str, Rate] = field(default_factory=dict)
    index: dict[str, Rate] = field(default_factory=dict)

    def read(self, file: str, items: float) -> None:
        """Take the rates of a benchmark's lines."""
        lines = [
            json.loads(line) for line in Path(file).read_text().splitlines() if line[:1] == "{"
        ]
        logs = sorted((line["millions"], line["cpu_seconds"]) for line in lines
                      if line.get("way") == "ray" and line["millions"] >= 0.1)  # fmt: skip
        if len(logs) > 1:
            slope = (logs[-1][1] - logs[0][1]) / (logs[-1][0] - logs[0][0])
            told = f"{file}: between {logs[0][0]} and {logs[-1][0]} million pages"
            self.prepare = Rate(slope / 1e6, told)
        for line in lines:
            if "items_per_second" in line and line.get("threads") == 1:
                name = f"{line['shape']}, {line['precision']}"
                self.encode[name] = Rate(1 / line["items_per_second"], file)
            elif "items_per_s" in line:
                self.encode[f"{line['shape']} on the GPU"] = Rate(1 / line["items_per_s"], file)
            elif line.get("way") == "res_kmeans_fsq":
                self.codes = Rate(1 / line["items_per_second"], file)
            elif "build_seconds" in line:
                # Cells are as many as the square root of the items, and each item meets all.
                grown = math.sqrt(items / line["items"]) if line["kind"] != "sq8" else 1.0
                each = line["build_seconds"] / line["items"] * grown
                told = f"{file}: {line['items']} items, grown"
                self.index[line["kind"]] = Rate(each, told, measured=False)


def main(argv: list[str] | None = None) -> None:
    """Compute and print."""
    flags = cli.parser(__doc__ or "")
    flags.add_argument("--events", type=float, default=1e9, help="pages of the log (1e9)")
    flags.add_argument("--items", type=float, default=1e8, help="items of the catalogue (1e8)")
    flags.add_argument("--lines", nargs="+", default=[], metavar="FILE", help="of benchmarks")
    arguments = flags.parse_args(argv)
    if min(arguments.events, arguments.items) < 1:
        raise InputError("--events, --items", 0, "must be at least 1")
    rates = Rates()
    for file in arguments.lines:
        rates.read(file, arguments.items)
    lines = list(steps(arguments.events, arguments.items, rates))
    for line in lines:
        print(json.dumps(line), flush=True)
    needed = [line for line in lines if line["needed"]]
    print(json.dumps({
        "events": arguments.events, "items": arguments.items,
        "core_hours": round(sum(line["core_hours"] for line in needed), 1),
        "on_demand_dollars": round(sum(line["on_demand_dollars"] for line in needed), 2),
        "spot_dollars": round(sum(line["spot_dollars"] for line in needed), 2),
        "encoding": None if rates.encode else "no rate: give the lines of benchmarks/encode.py",
        "index": None if rates.index else "no rate: give the lines of benchmarks/index.py",
    }))  # fmt: skip


def steps(events: float, items: float, rates: Rates) -> Iterator[dict[str, Any]]:
    """Yield a line for each step."""
    sizes, fewest = Sizes(), PrepareConfig().num_partitions
    cells = int(events * CELLS_PER_EVENT)
    parts = -(-cells // sizes.part_cells)
    partitions = num_partitions(fewest, cells, sizes.partition_cells)
    yield step("prepare: rows", CPU, events, rates.prepare)
    yield step("prepare: items of each part", CPU, parts * items, lookup_rate())
    yield step("prepare: parts read by each partition", CPU, parts * partitions, reading_rate())
    yield requests("prepare: requests of these reads to S3", parts * partitions)
    for name, rate in rates.encode.items():
        yield step(f"encode: {name}", GPU if "GPU" in name else CPU, items, rate, needed=False)
    for name, weights in WEIGHTS.items():
        seconds = 2 * weights * TOKENS / A10G
        told = f"{TOKENS} tokens, 45 % of 70e12 operations a second"
        rate = Rate(seconds, told, measured=False)
        yield step(f"encode: {name}, on its GPU", GPU, items, rate, needed=False)
    yield step("codes", CPU, items, rates.codes)
    for name, rate in rates.index.items():
        yield step(f"index: {name}", CPU, items, rate, needed=False)


def step(
    name: str, machine: Machine, amount: float, rate: Rate, *, needed: bool = True
) -> dict[str, Any]:
    """Return the hours and dollars of one step; those that are not `needed` are alternatives."""
    hours = amount * rate.seconds / 3600
    on_gpu = machine is GPU
    of_machine = hours if on_gpu else hours / machine.cores
    return {
        "step": name, "machine": machine.name, "amount": amount, "needed": needed,
        "gpu_hours" if on_gpu else "core_hours": round(hours, 2),
        "machine_hours": round(of_machine, 2), "hours_of_12": round(of_machine / LARGEST, 2),
        "on_demand_dollars": round(of_machine * machine.dollars, 2),
        "spot_dollars": round(of_machine * machine.dollars * SPOT, 2),
        "seconds_per_unit": float(f"{rate.seconds:.3g}"), "source": rate.source,
        "measured": rate.measured,
    }  # fmt: skip


def requests(name: str, reads: float) -> dict[str, Any]:
    """Return what a store charges for reads of parts."""
    dollars = round(reads * REQUESTS * DOLLARS_PER_REQUEST, 2)
    return {
        "step": name, "machine": "S3", "amount": reads * REQUESTS, "needed": True,
        "core_hours": 0.0, "on_demand_dollars": dollars, "spot_dollars": dollars,
        "source": f"{REQUESTS} requests of a read, counted in the code", "measured": False,
    }  # fmt: skip


def lookup_rate() -> Rate:
    """Measure the search for a part's items among the catalogue's ids: seconds for each id."""
    ids = pa.array([f"item-{number:09d}" for number in range(2 * IDS)])
    named = ids.take(pa.array(np.random.default_rng(0).permutation(2 * IDS)[: IDS // 2]))
    took = []
    for count in (IDS, 2 * IDS):
        started = time.process_time()
        pc.is_in(ids[:count], value_set=named)
        took.append(time.process_time() - started)
    told = f"here: {IDS:,} ids more, {IDS // 2:,} named, process time"
    return Rate((took[1] - took[0]) / IDS, told)


def reading_rate(reads: int = 200) -> Rate:
    """Measure the reading of one partition's rows from one part on disk: seconds for each."""
    generator, rows = np.random.default_rng(0), Sizes().part_cells // CELLS_PER_EVENT
    ids = pa.array([f"item-{number:09d}" for number in range(IDS // 10)])
    entries = ids.take(pa.array(generator.integers(0, len(ids), 8 * rows)))
    every = pa.array(np.arange(0, 8 * rows + 1, 8, dtype=np.int32))
    shown = pa.ListArray.from_arrays(every, entries)
    users = pa.array(generator.integers(0, rows, rows)).cast(pa.string())
    made = {"user_id": users, "exposed_item_ids": shown, "clicked_item_ids": shown}
    table = pa.table(
        [made.get(field.name, pa.nulls(rows, field.type)) for field in CLEAN_EVENTS],
        schema=CLEAN_EVENTS,
    )
    fewest, partitions = PrepareConfig().num_partitions, 4096
    with tempfile.TemporaryDirectory() as folder:
        file = join(folder, "rows.arrow")
        write_rows(table, file, fewest)
        started = time.process_time()
        for partition in range(reads):
            read_rows(file, slot_range(partition, partitions, fewest))
        seconds = (time.process_time() - started) / reads
    told = f"here: {reads} of {partitions} partitions of a part of {rows:,} pages, process time"
    return Rate(seconds, told)


if __name__ == "__main__":
    cli.run(main)
