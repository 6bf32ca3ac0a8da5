"""patch_pca is the whitened PCA of an image's cells."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from karma_ray.data.patches import PatchPca, side_of
from karma_ray.errors import InputError


def _images(count: int, side: int, seed: int = 0) -> np.ndarray:
    """Smooth random pictures, of several strong components."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (count, side // 4, side // 4, 3), dtype=np.uint8)
    return coarse.repeat(4, axis=1).repeat(4, axis=2)


@pytest.mark.parametrize(("target", "tokens"), [("pooled:1", 1), ("grid:16", 16), ("grid:64", 64)])
def test_features_of_the_fitted_cells_are_white(target: str, tokens: int) -> None:
    images = _images(60, side_of(target))
    encoded = PatchPca.fit(images, target, 8, seed=0)(images)
    assert encoded.shape == (60, tokens, 8) and encoded.dtype == np.float32
    flat = encoded.reshape(-1, 8)
    np.testing.assert_allclose(flat.mean(0), 0, atol=1e-3)
    np.testing.assert_allclose(flat.T @ flat / len(flat), np.eye(8), atol=1e-3)


def test_components_are_those_of_a_singular_value_decomposition() -> None:
    images = _images(20, 64)
    pca = PatchPca.fit(images, "grid:16", 5, seed=0)
    cells = images.reshape(20, 4, 16, 4, 16, 3).transpose(0, 1, 3, 2, 4, 5).reshape(320, -1) / 255
    centred = cells - cells.mean(0)
    _, scales, axes = np.linalg.svd(centred, full_matrices=False)
    expected = centred @ axes[:5].T / (scales[:5] / np.sqrt(320))
    found = pca(images).reshape(320, 5)
    signs = np.sign((found * expected).sum(0))
    np.testing.assert_allclose(found, expected * signs, atol=2e-3)
    assert pca.explained == pytest.approx((scales[:5] ** 2).sum() / (scales**2).sum(), abs=1e-5)


def test_a_cell_is_described_by_its_own_pixels_alone() -> None:
    images = _images(30, 64)
    pca = PatchPca.fit(images, "grid:16", 6, seed=0)
    changed = images[:1].copy()
    changed[0, 16:32, 48:64] = 255 - changed[0, 16:32, 48:64]  # second row, last column
    differs = np.abs(pca(changed) - pca(images[:1]))[0].max(1) > 1e-5
    assert np.flatnonzero(differs).tolist() == [7]


def test_rounding_noise_is_no_component() -> None:
    flat = np.zeros((40, 64, 64, 3), np.uint8)
    flat[:] = np.random.default_rng(0).integers(0, 256, (40, 1, 1, 3))
    assert PatchPca.fit(flat, "grid:16", 48, seed=0).projection.shape[1] == 3  # three colours
    with pytest.raises(InputError, match="all look alike"):
        PatchPca.fit(np.zeros((4, 64, 64, 3), np.uint8), "grid:16", 48, seed=0)


def test_width_is_checked_and_the_projection_is_saved(tmp_path: Path) -> None:
    images = _images(30, 64)
    with pytest.raises(InputError, match="--width"):
        PatchPca.fit(images, "grid:16", 0, seed=0)
    pca = PatchPca.fit(images, "grid:16", 6, seed=0)
    pca.save(str(tmp_path / "pca.safetensors"))
    saved = load_file(tmp_path / "pca.safetensors")
    again = PatchPca(4, saved["mean"], saved["projection"], pca.explained)
    np.testing.assert_array_equal(again(images), pca(images))
