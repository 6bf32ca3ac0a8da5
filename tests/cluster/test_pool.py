"""A pool computes every portion once, whether or not all its actors find a place."""

from __future__ import annotations

import pytest

from karma_ray.cluster.accelerators import Pool
from karma_ray.cluster.pool import encoded
from karma_ray.errors import InputError


class Squares:
    """Squares numbers and adds another."""

    def __init__(self, plus: int) -> None:
        self.plus = plus

    def encode(self, number: int) -> int:
        if number < 0:
            raise InputError("number", number, "is negative")
        return number**2 + self.plus


@pytest.mark.ray
def test_more_encoders_than_places_compute_every_portion_once(two_cpus: None) -> None:
    found = list(encoded(Pool(5, 0.0), Squares, (1,), range(12)))
    assert sorted(found) == [number**2 + 1 for number in range(12)]
    assert list(encoded(Pool(5, 0.0), Squares, (1,), [])) == []
    with pytest.raises(InputError, match="number: -1 is negative"):
        list(encoded(Pool(2, 0.0), Squares, (0,), [3, -1, 4]))
