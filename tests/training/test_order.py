from __future__ import annotations

import pickle
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from karma_ray.data import fragments
from karma_ray.errors import InputError
from karma_ray.training.order import Order, Source


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """50 rows in two files with row groups of 8."""
    folder = tmp_path_factory.mktemp("rows")
    for part, (start, stop) in enumerate([(0, 30), (30, 50)]):
        table = pa.table({"row": list(range(start, stop))})
        pq.write_table(table, folder / f"part-{part}.parquet", row_group_size=8)
    return Source.scan(str(folder))


def _batches(order: Order, start: int, steps: int) -> list[list[int]]:
    found = []
    for window in order.windows(start, steps):
        rows = order.source.read(window).column("row").to_pylist()
        size = window.batch_rows
        assert len(rows) == size * window.num_batches
        found += [rows[place : place + size] for place in range(0, len(rows), size)]
    return found


def _global(source: Source, workers: int, steps: int, window_rows: int) -> list[list[int]]:
    """Batches of all workers, side by side."""
    orders = [Order(source, 7, 8, rank, workers, window_rows) for rank in range(workers)]
    per_worker = [_batches(order, 0, steps) for order in orders]
    return [list(chain.from_iterable(parts)) for parts in zip(*per_worker, strict=True)]


@pytest.mark.parametrize("window_rows", [1000, 16])
def test_an_epoch_holds_every_row_at_most_once_and_all_that_fill_batches(
    source: Source, window_rows: int
) -> None:
    batches = _global(source, 1, 6, window_rows)
    assert [len(batch) for batch in batches] == [8] * 6
    assert len(set(chain.from_iterable(batches))) == 48


@pytest.mark.parametrize("window_rows", [1000, 16])
@pytest.mark.parametrize("workers", [2, 3, 4, 8])
def test_the_batches_do_not_depend_on_the_workers(
    source: Source, workers: int, window_rows: int
) -> None:
    assert _global(source, workers, 14, window_rows) == _global(source, 1, 14, window_rows)


@pytest.mark.parametrize("window_rows", [1000, 16])
def test_the_rows_left_out_are_others_in_every_epoch(source: Source, window_rows: int) -> None:
    batches = _global(source, 1, 60, window_rows)
    epochs = [set(chain.from_iterable(batches[i : i + 6])) for i in range(0, 60, 6)]
    assert set().union(*epochs) == set(range(50))


@pytest.mark.parametrize("window_rows", [1000, 16])
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_a_resumed_order_equals_an_uninterrupted_one(
    source: Source, workers: int, window_rows: int
) -> None:
    order = Order(source, 7, 8, workers - 1, workers, window_rows)
    whole = _batches(order, 0, 17)
    assert len(whole) == 17
    for step in (1, 3, 6, 7, 11, 16):
        assert _batches(order, step, 17) == whole[step:]


@pytest.mark.parametrize("window_rows", [1000, 16])
@pytest.mark.parametrize("workers", [1, 3, 4])
def test_an_order_resumed_on_other_workers_is_the_same_order(
    source: Source, workers: int, window_rows: int
) -> None:
    whole = _global(source, 2, 17, window_rows)
    for step in (1, 5, 6, 11):
        orders = [Order(source, 7, 8, rank, workers, window_rows) for rank in range(workers)]
        parts = [_batches(order, step, 17) for order in orders]
        assert [list(chain.from_iterable(p)) for p in zip(*parts, strict=True)] == whole[step:]


@pytest.mark.parametrize("batch_size", [1, 7, 20, 50])
def test_lanes_of_any_width_hold_every_row_at_most_once(source: Source, batch_size: int) -> None:
    """Also where lanes and workers do not divide the batch, nor each other."""
    for workers in {1, min(3, batch_size), min(5, batch_size)}:
        orders = [Order(source, 7, batch_size, r, workers, 40) for r in range(workers)]
        epoch = orders[0].batches_per_epoch
        assert epoch == 50 // batch_size
        rows = [row for order in orders for batch in _batches(order, 0, epoch) for row in batch]
        assert len(rows) == len(set(rows)) == epoch * batch_size


def test_what_is_planned_does_not_grow_with_the_batches_of_a_window(source: Source) -> None:
    """Plans travel to the read tasks; a training may have very many steps."""
    sizes = [len(pickle.dumps(Order(source, 7, 1).windows(0, n)[0])) for n in (1, 50)]
    assert sizes[1] - sizes[0] < 8


def test_windows_are_computed_when_asked_for_and_none_is_held(source: Source) -> None:
    order = Order(source, 7, 8, 0, 1, 16)
    many = order.windows(5, 10**12)
    assert len(many) == 5 * 10**11 - 2
    assert len(pickle.dumps(many)) < 4_000
    assert many[10**11].epoch == (10**11 + 2) // 3
    few = order.windows(5, 20)
    assert list(few) == [few[number] for number in range(len(few))] == list(few[:])
    assert sum(window.num_batches for window in few) == 15
    assert len(order.windows(5, 5)) == len(order.windows(6, 5)) == 0
    with pytest.raises(IndexError):
        few[len(few)]


@pytest.fixture(scope="module")
def sorted_rows(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """1,280 rows in their order, in row groups of 16."""
    folder = tmp_path_factory.mktemp("sorted")
    pq.write_table(pa.table({"row": range(1280)}), folder / "part.parquet", row_group_size=16)
    return Source.scan(str(folder))


def test_the_order_of_a_seed_stays_what_it_is(source: Source, sorted_rows: Source) -> None:
    """Runs continue and are repeated years later, on the batches that they had."""
    assert _batches(Order(source, 7, 8), 0, 7)[::6] == [
        [40, 25, 20, 26, 16, 42, 9, 0],
        [27, 0, 14, 9, 44, 46, 24, 11],
    ]
    assert _batches(Order(sorted_rows, 7, 32, 1, 4, 128), 38, 42)[1:3] == [
        [712, 715, 12, 15, 334, 330, 236, 238],
        [737, 738, 852, 853, 4, 7, 482, 486],
    ]


def test_rows_travel_over_the_whole_table_with_their_row_group(sorted_rows: Source) -> None:
    """A lane shuffles 8 rows at once here, and a row group of 16 goes to one place."""
    order = Order(sorted_rows, 7, 32, window_rows=128)
    epochs = [_batches(order, start, start + 40) for start in range(0, 400, 40)]
    distances = []
    for batches in epochs:
        flat = list(chain.from_iterable(batches))
        assert sorted(flat) == list(range(1280))  # every row once
        place = np.empty(1280, int)
        place[flat] = np.arange(1280)
        distances.append(np.abs(place - np.arange(1280)) / 1280)
        window = (place // 128).reshape(-1, 16)  # of the rows of each row group
        assert (window.max(1) - window.min(1)).max() <= 16 // 8
        for batch in batches:  # 2 rows of every lane, and lanes meet in one row group at most
            assert len({row // 16 for row in batch}) >= 16 // 2
    # Uniform places have a mean distance of 1/3 of the table, and 19 % of them are within 1/10.
    assert 0.30 < np.mean(distances) < 0.37
    assert 0.15 < np.mean(np.array(distances) < 0.1) < 0.23


def test_a_table_smaller_than_a_batch_is_a_batch(source: Source) -> None:
    assert sorted(_batches(Order(source, 7, 64), 0, 1)[0]) == list(range(50))


def test_a_large_table_is_read_by_its_workers_in_shares(source: Source) -> None:
    """Two workers read every row once; a third one shares lanes with its neighbours."""
    read = [
        sum(window.rows_read for window in Order(source, 7, 8, rank, 2, 16).windows(0, 6))
        for rank in range(2)
    ]
    assert read == [24, 24]


def test_epochs_and_seeds_differ_and_repeat(source: Source) -> None:
    first = _batches(Order(source, 7, 8), 0, 14)
    assert first == _batches(Order(source, 7, 8), 0, 14)
    assert first[:6] != first[6:12]
    assert first != _batches(Order(source, 8, 8), 0, 14)


def test_the_position_counts_epochs_and_batches(source: Source) -> None:
    order = Order(source, 7, 8)
    assert order.batches_per_epoch == 6
    assert [order.position(step) for step in (0, 5, 6, 13)] == [(0, 0), (0, 5), (1, 0), (2, 1)]


def test_a_table_of_many_files_is_read_with_few_open(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _batches(Order(source, 7, 8), 0, 6)
    monkeypatch.setattr(fragments, "MOST_FILES", 1)
    assert _batches(Order(source, 7, 8), 0, 6) == whole


def test_a_window_bounds_what_is_read_at_once(source: Source) -> None:
    order = Order(source, 7, 8, 0, 2, 16)
    for window in order.windows(0, 14):
        assert window.rows_read <= 16


def test_fewer_rows_than_workers_are_an_input_error(source: Source) -> None:
    with pytest.raises(InputError, match="fewer than 9 workers"):
        Order(source, 7, 8, 0, 9)


def test_an_empty_table_is_an_input_error(tmp_path: Path) -> None:
    pq.write_table(pa.table({"row": pa.array([], pa.int64())}), tmp_path / "part.parquet")
    with pytest.raises(InputError, match="holds no rows"):
        Source.scan(str(tmp_path))
