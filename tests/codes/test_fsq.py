"""FSQ against values by hand and the paper's definition."""

from __future__ import annotations

import math

import numpy as np
import pytest

from karma_ray.codes.fsq import bounded, digits, packed, unpacked


def test_an_odd_dimension_rounds_a_scaled_tanh() -> None:
    # L = 5: half = 4 * 0.999 / 2 = 1.998, no offset. 1.998 * tanh(0.5) = 0.923 -> 1 -> digit 3.
    values = np.array([[-9.0], [-0.5], [0.0], [0.2], [0.5], [9.0]])
    expected = 1.998 * np.tanh(values)
    np.testing.assert_allclose(bounded(values, [5]), expected)
    assert digits(values, [5])[:, 0].tolist() == [0, 1, 2, 2, 3, 4]


def test_an_even_dimension_is_shifted_by_half_a_step() -> None:
    # L = 4: half = 3 * 0.999 / 2 = 1.4985, offset 0.5, shift tan(0.5 / 1.4985) = 0.3467.
    shift = math.tan(0.5 / 1.4985)
    expected = [[math.tanh(z + shift) * 1.4985 - 0.5] for z in (-9.0, -0.6, 0.1, 9.0)]
    values = np.array([[-9.0], [-0.6], [0.1], [9.0]])
    np.testing.assert_allclose(bounded(values, [4]), expected)
    # -1.9985, -0.868, 0.127, 0.9985 -> -2, -1, 0, 1 -> digits from 0 on.
    assert digits(values, [4])[:, 0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8, 16])
def test_every_level_is_reached_and_no_other(count: int) -> None:
    values = np.linspace(-30, 30, 60_001)[:, None]
    assert np.unique(digits(values, [count])).tolist() == list(range(count))


def test_an_integer_stands_for_the_levels_of_all_dimensions() -> None:
    # 1 + 2 * 8 + 4 * 8 * 5 = 177
    assert packed(np.array([[1, 2, 4]]), [8, 5, 5]).tolist() == [177]
    codes = np.arange(8 * 5 * 5)
    assert packed(unpacked(codes, [8, 5, 5]), [8, 5, 5]).tolist() == codes.tolist()
