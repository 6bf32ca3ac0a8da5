"""Preparation on Ray against a single-process script in Polars that makes the same examples.

    python benchmarks/prepare.py [--events MILLIONS ...] [--rounds N] [--ways ray] [--quick]

Logs are generated: pages of 8 items, 50 per user, a click or two on each. Both ways prepare the
same log in new processes, one after the other in every round. A line gives the wall and CPU seconds
and the peak memory of all processes together (proportional set size, sampled); the median of the
rounds counts. `memory_gib` has the largest memory in each second of the last round; `--plot FILE`
draws it. `--ways ray` leaves Polars out, which must hold the log; on the smallest log the tables of
both must be equal. JSON lines; the last one holds the headline: `fixed_seconds` (Ray on a log of
1,000 events), `seconds_per_million` (further events, between the smallest and the largest log),
`slope_over_polars` (the same over that of Polars), `cpu_slope_over_polars` (the same of CPU
seconds, which other work on the machine hardly changes), `growth_exponent` (of Ray's seconds
without the fixed ones) and `peak_gib` (Ray, largest log).
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import polars as pl
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from karma_ray.artifacts import write_table
from karma_ray.cli import parser, run
from karma_ray.data.config import PrepareConfig
from karma_ray.data.event_parts import Sizes
from karma_ray.data.prepared import PreparedData
from karma_ray.runs.preparation import prepare

ITEMS = 50_000
FILE_ROWS = 1_000_000
ROW_GROUP = 131_072
START = 1_704_067_200_000_000
"""Microseconds; 2024 begins."""
WAYS = ("polars", "ray")
TINY = 0.001
"""Millions of events, of the log that shows the fixed cost."""


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    flags = parser(__doc__ or "")
    flags.add_argument("--events", type=float, nargs="+", help="millions of events (1 3 10)")
    flags.add_argument("--rounds", type=int, default=3, help="rounds of each (default 3)")
    flags.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="(polars ray)")
    flags.add_argument("--plot", metavar="FILE.png", help="draw memory over time")
    flags.add_argument("--quick", action="store_true", help="0.2 and 0.6 million, one round")
    flags.add_argument("--one", nargs=3, metavar=("WAY", "DATA", "OUT"), help="prepare once")
    arguments = flags.parse_args(argv)
    if arguments.one:
        prepare_once(*arguments.one)
        return
    quick = arguments.quick
    sizes = sorted(arguments.events or ([0.2, 0.6] if quick else [1.0, 3.0, 10.0]))
    rounds = 1 if quick else arguments.rounds
    found: dict[tuple[str, float], dict[str, float]] = {}
    curves: dict[tuple[str, float], list[float]] = {}
    for size in [TINY, *sizes]:
        with tempfile.TemporaryDirectory() as folder:
            generate(Path(folder, "data"), int(size * 1e6))
            for way in arguments.ways:
                outs = [f"{folder}/{way}-{number}" for number in range(rounds)]
                lines, memories = zip(
                    *(measure(way, f"{folder}/data", out) for out in outs), strict=True
                )
                found[way, size] = {
                    name: statistics.median(line[name] for line in lines) for name in lines[0]
                }
                curves[way, size] = memory = memories[-1]
                print_line({"way": way, "millions": size, **found[way, size], "memory_gib": memory})
            if size == sizes[0] and len(arguments.ways) > 1:
                check_equal(f"{folder}/ray-0", f"{folder}/polars-0")
    if arguments.plot:
        plot({key: curve for key, curve in curves.items() if key[1] > TINY}, arguments.plot)
    if "ray" in arguments.ways:
        print_line(headline(found, sizes))


def headline(
    found: dict[tuple[str, float], dict[str, float]], sizes: list[float]
) -> dict[str, Any]:
    """Return the figures that count; those of a comparison only if there was one."""
    fixed = found["ray", TINY]["seconds"]
    least, most = sizes[0], sizes[-1]
    line = {
        "fixed_seconds": round(fixed, 1), "peak_gib": found["ray", most]["peak_gib"],
        "millions": most,
    }  # fmt: skip
    if most > least:
        grown = [max(found["ray", size]["seconds"] - fixed, 0.001) for size in (least, most)]
        line["growth_exponent"] = round(math.log(grown[1] / grown[0]) / math.log(most / least), 2)
        line["seconds_per_million"] = round(_slope(found, "ray", "seconds", least, most), 2)
    if ("polars", most) in found:
        line["polars_peak_gib"] = found["polars", most]["peak_gib"]
        for name, key in (("slope", "seconds"), ("cpu_slope", "cpu_seconds")):
            ours, theirs = (_slope(found, way, key, least, most) for way in ("ray", "polars"))
            line[f"{name}_over_polars"] = round(ours / theirs, 2)
    return line


def _slope(
    found: dict[tuple[str, float], dict[str, float]], way: str, name: str, least: float, most: float
) -> float:
    """Return how much is added by a million events; from the smallest log of all if need be."""
    least = least if most > least else TINY
    return (found[way, most][name] - found[way, least][name]) / (most - least)


def measure(way: str, data: str, out: str) -> tuple[dict[str, float], list[float]]:
    """Prepare in a new process.

    Returns seconds, CPU seconds and peak memory of its tree, and the largest memory in GiB of each
    second.
    """
    began, peaks, cpu = time.perf_counter(), [0], {0: 0.0}
    command = [sys.executable, __file__, "--one", way, data, out]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        tree = []
        with suppress(psutil.Error):
            tree = [psutil.Process(process.pid)]
            tree += tree[0].children(recursive=True)
        used = 0
        for each in tree:
            with suppress(psutil.Error):  # it has ended meanwhile
                used += each.memory_full_info().pss
                cpu[each.pid] = sum(each.cpu_times()[:2])
        second = int(time.perf_counter() - began)
        peaks += [used] * (second + 1 - len(peaks))
        peaks[second] = max(peaks[second], used)
        time.sleep(0.3)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    seconds = time.perf_counter() - began
    figures = {"seconds": round(seconds, 2), "cpu_seconds": round(sum(cpu.values()), 2),
               "peak_gib": round(max(peaks) / 2**30, 2)}  # fmt: skip
    return figures, [round(peak / 2**30, 2) for peak in peaks]


def plot(curves: dict[tuple[str, float], list[float]], path: str) -> None:
    """Draw the memory of all processes over time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for (way, size), curve in curves.items():
        axes.plot(curve, label=f"{way}, {size:g} million", linestyle="-" if way == "ray" else ":")
    axes.set(xlabel="seconds", ylabel="memory of all processes, GiB", ylim=(0, None))
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def prepare_once(way: str, data: str, out: str) -> None:
    """Prepare a log with Polars alone, or on Ray whatever its size."""
    if way == "polars":
        from benchmarks import prepare_polars

        prepare_polars.prepare(data, out)
    else:
        from karma_ray.cluster.sharding import run_on_ray

        prepare(data, PrepareConfig(), out, run_on_ray, Sizes(here_cells=0))


def check_equal(ours: str, theirs: str) -> None:
    """Raise AssertionError unless both ways made the same windows and examples."""
    data = PreparedData.load(ours)
    for name, table, keys in (
        ("sequences", data.sequences(), ["user_id", "first"]),
        ("valid", data.examples("valid"), ["page_id", "positive_item_id"]),
        ("test", data.examples("test"), ["page_id", "positive_item_id"]),
    ):
        frames = [pl.DataFrame(pl.from_arrow(table)), pl.read_parquet(f"{theirs}/{name}.parquet")]
        if name == "sequences":
            frames = [f.with_columns(first=pl.col("timestamps").list.first()) for f in frames]
        one, other = (frame.sort(keys, maintain_order=True) for frame in frames)
        for column in table.column_names:
            assert one[column].equals(other[column]), f"{name}: {column} differs"


def generate(folder: Path, num_events: int, row_group: int = ROW_GROUP) -> None:
    """Write a log of pages in the order of time, and its items."""
    generator = np.random.default_rng(num_events)
    ids = pa.array([f"item-{number:07d}" for number in range(ITEMS)])
    words = pa.array([f"word {number}" for number in range(2_000)])
    write_table(pa.table({"item_id": ids, "title": ids}), str(folder / "items"))
    (folder / "events").mkdir(parents=True)
    num_users = max(10, num_events // 50)
    for first in range(0, num_events, FILE_ROWS):
        rows = min(FILE_ROWS, num_events - first)
        user = generator.integers(0, num_users, rows)
        # Eight different items: a popular one, and steps from it.
        start = (ITEMS * generator.random(rows) ** 3).astype(np.int64)
        shown = (start[:, None] + np.arange(8) * 5_003) % ITEMS
        clicked = generator.random((rows, 8)) < 0.2
        clicked[np.arange(rows), generator.integers(0, 8, rows)] = True
        # A user has one page at a time, because the order of ties would need a rule in both.
        time_of = START + (first + np.arange(rows)) * 40_000_000
        table = pa.table({
            "user_id": pa.array(user).cast(pa.string()),
            "timestamp": pa.array(time_of).cast(pa.timestamp("us", tz="UTC")),
            "query": words.take(pa.array(generator.integers(0, len(words), rows))),
            "exposed_item_ids": lists(ids, shown, np.ones_like(clicked)),
            "clicked_item_ids": lists(ids, shown, clicked),
            "session_id": pa.array(time_of // 3_600_000_000).cast(pa.string()),
        })  # fmt: skip
        name = f"part-{first // FILE_ROWS:05d}.parquet"
        pq.write_table(table, folder / "events" / name, row_group_size=row_group)


def lists(ids: pa.Array, places: np.ndarray, kept: np.ndarray) -> pa.ListArray:
    """Return the ids at places [rows, n] where `kept`, as lists."""
    offsets = np.concatenate([[0], np.cumsum(kept.sum(axis=1))]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), ids.take(pa.array(places[kept])))


def print_line(line: dict[str, Any]) -> None:
    """Print a JSON line at once."""
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    run(main)
