"""Draws depend on what they are for, and on nothing else."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch

from karma_ray.data.draws import hashed, row_keys, uniform
from tests import tiny


def test_draws_are_uniform_and_independent_of_their_neighbours() -> None:
    numbers = uniform(row_keys(400, 1)[:, None], 0, np.arange(100))
    counts = np.histogram(numbers, 20, (0.0, 1.0))[0]
    # 2,000 expected in each bin, standard deviation 44
    assert abs(counts - 2000).max() < 5 * 44
    for other in (uniform(row_keys(400, 2)[:, None], 0, np.arange(100)),
                  uniform(row_keys(400, 1)[:, None], 1, np.arange(100)),
                  np.roll(numbers, 1, 0), np.roll(numbers, 1, 1)):  # fmt: skip
        assert abs(np.corrcoef(numbers.ravel(), other.ravel())[0, 1]) < 0.02


def test_hashes_of_neighbours_are_distinct() -> None:
    assert len(np.unique(hashed(0, np.arange(100_000)))) == 100_000


def test_every_exposed_item_is_drawn_equally_often() -> None:
    row = tiny.window(["i0"], hard=[["i1", "i2", "i3", "i4"]])
    table = pa.concat_tables([tiny.sequences(row)] * 4000)
    batch = tiny.collator(num_hard_negatives=2).training(table, row_keys(4000, 0))
    drawn = batch.item_rows[batch.hard_index[batch.hard_mask]]
    counts = torch.bincount(drawn)[1:5]
    # 2,000 expected of each, standard deviation 32
    assert (counts - 2000).abs().max() < 5 * 32


@pytest.mark.parametrize("cut", [1, 3])
def test_a_rows_draws_do_not_depend_on_who_collates_it(cut: int) -> None:
    exposed = [[f"i{n}" for n in range(20, 30)]] * 6
    rows = [tiny.window([f"i{n}" for n in range(6)], hard=exposed, user=str(u)) for u in range(4)]
    collator = tiny.collator(num_hard_negatives=2, drop_query=0.5, num_decoded=2)
    keys = row_keys(4, 3)
    whole = collator.training(tiny.sequences(*rows), keys)
    parts = [
        collator.training(tiny.sequences(*rows[:cut]), keys[:cut]),
        collator.training(tiny.sequences(*rows[cut:]), keys[cut:]),
    ]
    for name in ("decode_step", "decode_mask", "hard_mask", "row_key"):
        assert torch.equal(torch.cat([getattr(p, name) for p in parts]), getattr(whole, name))
    hard = torch.cat([part.item_rows[part.hard_index] for part in parts])
    assert torch.equal(hard, whole.item_rows[whole.hard_index])
    missing = torch.cat([part.query_lengths[part.query_index] == 0 for part in parts])
    assert torch.equal(missing, whole.query_lengths[whole.query_index] == 0)
    assert 0 < missing.float().mean() < 1
