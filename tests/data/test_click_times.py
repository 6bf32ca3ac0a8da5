"""Cutoffs from clicks per day are those from all times."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from karma_ray.data.click_times import (
    CLICK_TIMES,
    DAY,
    clicks_per_day,
    cutoffs_by_day,
    cutoffs_of,
)
from karma_ray.data.config import PrepareConfig
from karma_ray.errors import InputError


@pytest.mark.parametrize("seed", range(30))
def test_days_give_the_cutoffs_that_all_times_give(seed: int) -> None:
    generator = np.random.default_rng(seed)
    parts = []
    for _ in range(int(generator.integers(1, 4))):
        span = int(generator.choice([DAY // 2, 3 * DAY, 40 * DAY]))
        times = np.unique(generator.integers(0, span, int(generator.integers(1, 30))))
        clicks = generator.integers(1, 6, times.size)
        parts.append(pa.table([times, clicks], schema=CLICK_TIMES))
    valid, test = generator.choice([0.0, 0.1, 0.3], 2)
    config = PrepareConfig(valid_share=float(valid), test_share=float(test))
    read: list[int] = []

    def times_in(first: int, end: int) -> pa.Table:
        read.append(first)
        whole = pa.concat_tables(parts)
        inside = pc.and_(pc.greater_equal(whole["time"], first), pc.less(whole["time"], end))
        return whole.filter(inside)

    days = [clicks_per_day(part) for part in parts]
    try:
        expected = cutoffs_of(parts, config, None)
    except InputError as error:
        with pytest.raises(InputError) as same:
            cutoffs_by_day(days, times_in, config, None)
        assert str(same.value) == str(error)
        return
    assert cutoffs_by_day(days, times_in, config, None) == expected
    assert len(read) <= 5


def test_a_log_without_clicks_has_no_cutoffs() -> None:
    with pytest.raises(InputError, match="nothing to prepare"):
        cutoffs_by_day([[]], lambda first, end: CLICK_TIMES.empty_table(), PrepareConfig(), None)
