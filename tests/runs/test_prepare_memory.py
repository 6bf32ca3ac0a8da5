"""A log ten times larger than what its preparation may take in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from karma_ray.artifacts import write_table
from tests.data.logs import START, items_table

ROWS, FILES, QUERY = 4_000, 60, 4_000
LIMIT = 96 << 20
"""Bytes beside those that a process of the same libraries has after a small log."""

MEASURED = """
import json, sys
from karma_ray.data.config import PrepareConfig
from karma_ray.data.event_parts import Sizes
from karma_ray.runs.preparation import prepare
config = PrepareConfig(max_history=1, valid_share=0.01, test_share=0.01)
sizes = Sizes(part_cells=24_000, partition_cells=6_000)
peaks = []
for data in sys.argv[1:]:
    facts = prepare(data, config, sizes=sizes)
    # Not of getrusage, which knows the peak of the process that started this one.
    (peak,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    peaks.append(int(peak.split()[1]) * 1024)
print(json.dumps([*peaks, facts["counts"]["pages"]]))
"""


def write_log(folder: Path, files: int) -> int:
    """Write a log with long queries; returns its bytes in memory."""
    (folder / "events").mkdir(parents=True)
    write_table(items_table(60), str(folder / "items"))
    size = 0
    for number in range(files):
        rows = range(number * ROWS, (number + 1) * ROWS)
        start = int(START.timestamp() * 1e6)
        table = pa.table({
            "user_id": [f"u{row * 7919 % 5_003}" for row in rows],
            "timestamp": pa.array([start + 10**6 * row for row in rows], pa.timestamp("us", "UTC")),
            "query": [f"{row} " + "long " * (QUERY // 5) for row in rows],
            "clicked_item_ids": [[f"i{row % 60}"] for row in rows],
        })  # fmt: skip
        size += table.nbytes
        pq.write_table(table, folder / "events" / f"part-{number:03d}.parquet", compression="zstd")
    return size


@pytest.mark.slow
def test_a_log_ten_times_larger_than_the_memory_for_it_is_prepared(tmp_path: Path) -> None:
    write_log(tmp_path / "small", 1)
    size = write_log(tmp_path / "large", FILES)
    assert size > 9.5 * LIMIT
    call = [sys.executable, "-c", MEASURED, str(tmp_path / "small"), str(tmp_path / "large")]
    found = subprocess.run(
        call, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True
    )
    before, after, pages = json.loads(found.stdout.splitlines()[-1])
    assert pages == ROWS * FILES
    assert after - before < LIMIT, f"{(after - before) >> 20} MiB for a log of {size >> 20} MiB"
