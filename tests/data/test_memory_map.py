"""An array is written whole or not at all, and by one process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from karma_ray.data.memory_map import mapped_array


def test_an_array_is_made_once_and_mapped_read_only(tmp_path: Path) -> None:
    made = []

    def fill(values: np.ndarray) -> None:
        made.append(values.shape)
        values[:] = 7

    for _ in range(2):
        found = mapped_array(tmp_path / "a.npy", np.int32, (2, 3), fill)
        assert found.tolist() == [[7] * 3] * 2
        assert not found.flags.writeable and not found.flags.owndata
    assert made == [(2, 3)]


def test_an_array_that_could_not_be_filled_leaves_no_file(tmp_path: Path) -> None:
    def fill(values: np.ndarray) -> None:
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        mapped_array(tmp_path / "a.npy", np.int32, (2, 3), fill)
    assert not [path for path in tmp_path.iterdir() if path.suffix in (".npy", ".tmp")]
    assert mapped_array(tmp_path / "a.npy", np.int32, (2, 3), lambda values: None).sum() == 0
