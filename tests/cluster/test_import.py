"""A long import on Ray writes what one process writes, also when workers are killed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from karma_ray.artifacts import read_table
from karma_ray.cluster import sharding
from karma_ray.data.importers import output
from karma_ray.data.importers.import_work import ImportSizes
from karma_ray.data.importers.long import import_long
from karma_ray.data.tasks import Task
from tests.cluster.test_sharding import KilledOnce
from tests.data.test_import_stream import contents, write_logs

ON_RAY = ImportSizes(rows_bytes=10_000, partition_bytes=10_000, range_pages=10, here_bytes=0)
"""Several tasks in each pass, none of which is done in this process."""


@pytest.mark.ray
def test_tasks_on_any_worker_write_what_one_process_writes(
    tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "ROWS_PER_PART", 50)
    log, items = write_logs(tmp_path)
    import_long(log, str(tmp_path / "here"), items=items)
    expected = contents(tmp_path / "here")
    rejected = read_table(str(tmp_path / "here" / "quarantine_import")).to_pylist()
    assert {Path(row["source_file"]).name for row in rejected} == {f"{n}.csv" for n in range(4)}
    killed: list[str] = []

    def run(task: Task, inputs: Sequence[Any], small: bool) -> Iterable[None]:
        killed.append(str(tmp_path / f"killed-{len(killed)}"))
        return sharding.run_on_ray(KilledOnce(task, killed[-1]), inputs, small)

    for number, (in_flight, runs) in enumerate(((1, sharding.run_on_ray), (4, run))):
        monkeypatch.setattr(sharding, "IN_FLIGHT", in_flight)
        out = tmp_path / f"out-{number}"
        import_long(log, str(out), items=items, sizes=ON_RAY, run=runs)
        assert contents(out) == expected
    assert len(killed) == 3 and all(map(Path.exists, map(Path, killed)))  # one in each pass
