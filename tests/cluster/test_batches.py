"""Batches of a step are the same for every number of workers, and wherever a run is resumed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import fields

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.data
import torch
from torch import Tensor

from karma_ray.cluster.batches import ray_blocks
from karma_ray.data.batch import Batch
from karma_ray.runs.batches import local_blocks, stream_batches
from karma_ray.runs.stages import TrainingCollate
from karma_ray.runs.warm_up import TokenCollate
from karma_ray.training.order import Order, Source
from tests import tiny

BATCH = 8
STEPS = 14  # two epochs and two batches more
RANDOM = {"num_hard_negatives": 2, "drop_query": 0.4, "num_decoded": 2}
# A table of 50 rows: whole in one window, and dealt out to lanes.
REGIMES = pytest.mark.parametrize("window_rows", [1000, 16])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """50 windows in row groups of 8, their users numbered by row."""
    folder = tmp_path_factory.mktemp("sequences")
    pq.write_table(tiny.shop(50), folder / "part.parquet", row_group_size=8)
    return Source.scan(str(folder))


def _stream(
    source: Source,
    worker: tuple[int, int],
    window_rows: int,
    steps: tuple[int, int] = (0, STEPS),
    use_ray: bool = False,
) -> Iterator[Batch]:
    order = Order(source, 7, BATCH, *worker, window_rows)
    return stream_batches(
        order,
        lambda: TrainingCollate(tiny.collator(**RANDOM)),
        start_step=steps[0],
        steps=steps[1],
        read_blocks=ray_blocks if use_ray else local_blocks,
    )


def _facts(batch: Batch) -> dict[str, list[Tensor]]:
    """What the windows of a batch hold, without its own numbering of items and queries."""

    def step_facts(window: int) -> dict[str, Tensor]:
        real = batch.step_mask[window]
        hard = batch.hard_mask[window][real]
        queries = batch.query_index[window][real]
        words = torch.zeros(len(queries), 6, dtype=torch.int64)
        words[:, : batch.query_tokens.shape[1]] = batch.query_tokens[queries]
        words[torch.arange(6) >= batch.query_lengths[queries, None]] = 0
        return {
            "items": batch.item_rows[batch.item_index[window][real]],
            "group": batch.group[window][real],
            "loss": batch.loss_mask[window][real],
            "hard": batch.item_rows[batch.hard_index[window][real]] * hard,
            "hard_mask": hard,
            "queries": words,
            "decoded": batch.decode_step[window] * batch.decode_mask[window],
            "decode_mask": batch.decode_mask[window],
            "key": batch.row_key[window],
        }

    windows = [step_facts(window) for window in range(batch.num_windows)]
    return {name: [window[name] for window in windows] for name in windows[0]}


def _globally(batches: tuple[Batch, ...]) -> dict[str, list[Tensor]]:
    """The same of the batches of all workers, in the order of their ranks."""
    facts = [_facts(batch) for batch in batches]
    return {name: [value for part in facts for value in part[name]] for name in facts[0]}


def _assert_same(left: dict[str, list[Tensor]], right: dict[str, list[Tensor]]) -> None:
    for name, values in left.items():
        assert len(values) == len(right[name]) == BATCH
        for one, other in zip(values, right[name], strict=True):
            assert torch.equal(one, other), name


@REGIMES
@pytest.mark.parametrize("workers", [2, 3, 4])
def test_rows_and_draws_do_not_depend_on_the_number_of_workers(
    source: Source, workers: int, window_rows: int
) -> None:
    alone = [_facts(batch) for batch in _stream(source, (0, 1), window_rows)]
    streams = [_stream(source, (rank, workers), window_rows) for rank in range(workers)]
    together = [_globally(batches) for batches in zip(*streams, strict=True)]
    assert len(alone) == len(together) == STEPS
    for one, other in zip(alone, together, strict=True):
        _assert_same(one, other)


@REGIMES
@pytest.mark.parametrize("resumed_on", [1, 2, 3])
def test_a_run_resumed_on_other_workers_sees_the_batches_it_would_have_seen(
    source: Source, resumed_on: int, window_rows: int
) -> None:
    streams = [_stream(source, (rank, 2), window_rows) for rank in range(2)]
    whole = [_globally(batches) for batches in zip(*streams, strict=True)]
    for start in (1, 5, 6, 9):
        later = [
            _stream(source, (rank, resumed_on), window_rows, (start, STEPS))
            for rank in range(resumed_on)
        ]
        found = [_globally(batches) for batches in zip(*later, strict=True)]
        for one, other in zip(whole[start:], found, strict=True):
            _assert_same(one, other)


def test_an_epoch_draws_anew(source: Source) -> None:
    """The same row has another key in the next epoch, and in another place another one."""
    keys = torch.cat([batch.row_key for batch in _stream(source, (0, 1), 1000)])
    assert len(keys.unique()) == len(keys) == STEPS * BATCH


def test_a_table_of_one_window_is_read_without_ray_data(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray.data, "from_items", None)  # calling it raises TypeError
    order = Order(source, 7, BATCH, 1, 3, 1000)
    windows = tuple(order.windows(5, STEPS))
    found = pa.concat_tables(ray_blocks(order, windows))
    assert found.equals(pa.concat_tables(local_blocks(order, windows)))


@pytest.mark.ray
def test_ray_data_streams_the_batches_of_this_process(ray_cluster: None, source: Source) -> None:
    steps = (5, STEPS)
    here = list(_stream(source, (1, 3), 16, steps))
    there = list(_stream(source, (1, 3), 16, steps, use_ray=True))
    assert len(here) == len(there) == STEPS - 5
    for one, other in zip(here, there, strict=True):
        for field in fields(Batch):
            assert torch.equal(getattr(one, field.name), getattr(other, field.name))


@pytest.mark.ray
def test_rows_come_when_training_holds_every_cpu(ray_cluster: None, source: Source) -> None:
    everything = ray.util.placement_group([{"CPU": ray.cluster_resources()["CPU"]}])
    ray.get(everything.ready(), timeout=60)
    order = Order(source, 7, BATCH, 0, 1, 16)
    windows = tuple(order.windows(0, STEPS))
    found: list[pa.Table] = []
    reading = threading.Thread(target=lambda: found.extend(ray_blocks(order, windows)), daemon=True)
    try:
        reading.start()
        reading.join(60)
        assert not reading.is_alive()
    finally:
        ray.util.remove_placement_group(everything)
    assert pa.concat_tables(found).equals(pa.concat_tables(local_blocks(order, windows)))


def test_item_tokens_are_padded_to_the_longest() -> None:
    lists = pa.array([[5, 6, 7], [8], [9, 1]], pa.list_(pa.int32()))
    batch = TokenCollate()(pa.table({"token_ids": lists}), np.zeros(3, np.int64))
    assert batch.tokens.tolist() == [[5, 6, 7], [8, 0, 0], [9, 1, 0]]
    assert batch.lengths.tolist() == [3, 1, 2]
