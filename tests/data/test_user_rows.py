"""Rows by user: any number of partitions is read from ranges of the same file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from karma_ray.data.user_rows import (
    joined,
    newest,
    num_partitions,
    partition_of,
    read_rows,
    slot_range,
    write_rows,
)
from karma_ray.data.validation import check_events
from tests.data.logs import event, events_table, items_table, random_events


def clean(events: pa.Table) -> pa.Table:
    return check_events(events, items_table(60)["item_id"].combine_chunks()).table


def test_a_user_is_in_one_partition_in_every_process() -> None:
    users = pa.chunked_array([["u1", "u2"], ["u1", "Zoë"]])
    # Pinned: files of a re-run must hold the same users, whatever process or version wrote them.
    assert partition_of(users, 3).to_pylist() == [2, 0, 2, 2]
    assert set(partition_of(users, 1).to_pylist()) == {0}


@pytest.mark.parametrize("fewest", [1, 3, 4])
def test_partitions_are_ranges_of_one_file_however_many_there_are(
    tmp_path: Path, fewest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("karma_ray.data.ordered_rows.BATCH_BYTES", 1_000)
    rows = clean(random_events(seed=1, num_users=200))
    path = str(tmp_path / "rows.arrow")
    write_rows(rows, path, fewest)
    for count in (fewest, 2 * fewest, 16 * fewest):
        of_row = partition_of(rows["user_id"], count).to_numpy()
        for partition in range(count):
            read = read_rows(path, slot_range(partition, count, fewest))
            assert read.sort_by("order").equals(rows.take(np.flatnonzero(of_row == partition)))


def test_the_number_of_partitions_follows_the_size_in_steps_of_two() -> None:
    assert [num_partitions(4, cells, 100) for cells in (1, 400, 401, 800, 1601)] == [4, 4, 8, 8, 32]
    assert num_partitions(1, 10**12, 1) == 1 << 16  # what a file of rows serves


def test_rows_of_several_parts_are_numbered_as_one_log() -> None:
    rows = clean(random_events(seed=2))
    parts = [clean(random_events(seed=2).slice(0, 150)), clean(random_events(seed=2).slice(150))]
    assert joined(parts, [0, 150]).equals(rows)
    assert joined([], []).schema == rows.schema


def test_the_newest_rows_of_a_user_are_kept_and_equal_times_by_their_order() -> None:
    hours = [5, 1, 5, 5, 2]
    rows = clean(events_table([event("u", h, ["i1"]) for h in hours] + [event("v", 0, ["i1"])]))
    assert newest(rows, 5).equals(rows)
    assert newest(rows, 2)["order"].to_pylist() == [2, 3, 5]
    # Parts may drop rows on their own: what is beyond the limit in one is so in all.
    halves = [newest(rows.slice(0, 3), 2), newest(rows.slice(3), 2)]
    assert newest(pa.concat_tables(halves), 2).equals(newest(rows, 2))
