"""Visual features come back by catalogue row, standardised, and only for their own catalogue."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from karma_ray.artifacts import content_hash, join, write_table
from karma_ray.data import visual
from karma_ray.data.catalog import Catalog
from karma_ray.data.visual import Moments, VisualFeatures, grid_of, write_visual_features
from karma_ray.errors import InputError
from tests import tiny

SHAPE = (4, 3)
OWNERS = ["i7", "i0", "i31"]


@pytest.fixture
def data(tmp_path: Path) -> str:
    """A data folder with the tiny catalogue."""
    write_table(tiny.catalog().table, join(str(tmp_path / "data"), "items"))
    return str(tmp_path / "data")


def _values() -> np.ndarray:
    noise = np.random.default_rng(0).normal(size=(len(OWNERS), *SHAPE))
    return (5 + np.array([1.0, 10.0, 0.1]) * noise).astype(np.float32)


def _write(data: str) -> str:
    uri = join(data, "visual_features")
    write_visual_features(uri, OWNERS, _values(), content_hash(join(data, "items")), encoder="x")
    return uri


@pytest.mark.parametrize("mapped", [True, False], ids=["node's copy", "in memory"])
def test_rows_are_gathered_standardised_and_absent_ones_are_marked(
    data: str, tmp_path: Path, mapped: bool
) -> None:
    loaded = Catalog.load(data, str(tmp_path / "cache"))
    catalog = loaded if mapped else tiny.catalog()
    features = VisualFeatures.load(_write(data), catalog)
    assert (features.num_tokens, features.width) == SHAPE
    assert features.facts["encoder"] == "x" and features.facts["with_image"] == 3
    found, present = features.gather(catalog.rows(["i31", "i1", "unknown", "i7"]))
    assert present.tolist() == [True, False, False, True]
    assert (found.dtype, found.shape) == (np.float32, (4, *SHAPE))
    assert not found[1].any() and not found[2].any()
    flat = _values().reshape(-1, SHAPE[1])
    expected = (_values() - flat.mean(0)) / flat.std(0)
    np.testing.assert_allclose(found[[3, 0]], expected[[0, 2]], atol=1e-4)


def test_processes_of_a_node_share_one_copy(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, catalog = _write(data), Catalog.load(data, str(tmp_path / "cache"))
    first = VisualFeatures.load(uri, catalog)
    monkeypatch.setattr(visual, "_fill", None)
    second = VisualFeatures.load(uri, catalog)
    np.testing.assert_array_equal(first.values, second.values)
    assert not second.values.flags.writeable and not second.values.flags.owndata


def test_features_made_anew_are_not_read_from_the_old_copy(data: str, tmp_path: Path) -> None:
    catalog = Catalog.load(data, str(tmp_path / "cache"))
    VisualFeatures.load(_write(data), catalog)
    uri, items = join(data, "visual_features"), content_hash(join(data, "items"))
    write_visual_features(uri, OWNERS[:1], _values()[:1], items)
    _, present = VisualFeatures.load(uri, catalog).gather(catalog.rows(OWNERS))
    assert present.tolist() == [True, False, False]


def test_features_of_another_catalogue_are_refused(data: str, tmp_path: Path) -> None:
    uri = _write(data)
    write_table(tiny.catalog().table.slice(1), join(data, "items"))
    other = Catalog.load(data, str(tmp_path / "cache"))
    with pytest.raises(InputError, match=r"another catalogue.*jobs/features\.py"):
        VisualFeatures.load(uri, other)
    in_memory = Catalog(tiny.catalog().table.slice(1))  # i0 is not in it
    with pytest.raises(InputError, match="another catalogue"):
        VisualFeatures.load(uri, in_memory)


def test_a_missing_or_foreign_folder_is_named(data: str) -> None:
    with pytest.raises(InputError, match="does not exist"):
        VisualFeatures.load(join(data, "visual_features"), tiny.catalog())


def test_moments_of_parts_add_up_to_those_of_the_whole() -> None:
    values = _values()
    mean, std = (Moments.of(values[:1]) + Moments.of(values[1:])).mean_and_std()
    flat = values.reshape(-1, SHAPE[1]).astype(np.float64)
    np.testing.assert_allclose(mean, flat.mean(0), rtol=1e-9)
    np.testing.assert_allclose(std, flat.std(0), rtol=1e-6)


def test_a_dimension_that_never_varies_is_centred_not_blown_up() -> None:
    mean, std = Moments.of(np.full((2, 4, 1), 7.0)).mean_and_std()
    assert (mean.tolist(), std.tolist()) == ([7.0], [1.0])


def test_targets_are_square_grids() -> None:
    assert [grid_of(name) ** 2 for name in ("pooled:1", "grid:16", "grid:64")] == [1, 16, 64]
    with pytest.raises(InputError, match="pooled:1, grid:16, grid:64"):
        grid_of("grid:9")
