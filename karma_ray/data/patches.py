"""patch_pca: whitened principal components of image patches, an encoder without any weights.

An image is divided into a grid. The colours of each cell are projected on the leading components
of all cells of the training catalogue and divided by their standard deviations. The encoder is
linear and frozen; it keeps colour, shading and coarse shape, but no meaning.

Legend: n images, S pixels of a side, G cells on a side, N_v = G * G, P numbers of a cell,
d_v components.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.linalg
from safetensors.numpy import save

from karma_ray.artifacts import write_bytes
from karma_ray.data.visual import grid_of
from karma_ray.errors import InputError

SIDES = {1: 32, 4: 64, 8: 64}
"""Cells per side -> pixels S per side; a pooled cell is the whole, small image."""
SAMPLE_IMAGES = 4096
SAMPLE_CELLS = 65_536
"""Cells for fitting the components: some hundred for each estimated number."""
ROUNDING = (1 / 255) ** 2 / 12
"""Variance of rounding an 8-bit colour; a component below it is noise that whitening would
amplify."""
SINGLE = 1e-6
"""Smallest share of the largest variance that single precision can resolve."""


@dataclass(frozen=True)
class PatchPca:
    """Images [n, S, S, 3] uint8 -> features [n, N_v, d_v] float32."""

    grid: int
    """Cells per side, G."""
    mean: np.ndarray  # [P] float32
    projection: np.ndarray  # [P, d_v] float32, components over their deviations
    explained: float
    """Share of the variance of the cells that the components explain."""

    @classmethod
    def fit(cls, images: np.ndarray, target: str, width: int, seed: int) -> PatchPca:
        """Fit on pictures [n, S, S, 3] with side `side_of(target)`.

        Fewer than `width` components are kept if the pictures have no more.
        """
        if width < 1:
            raise InputError("--width", width, "must be at least 1")
        grid = grid_of(target)
        cells = _cells(images, grid).reshape(-1, 3 * (SIDES[grid] // grid) ** 2)
        if len(cells) > SAMPLE_CELLS:
            drawn = np.random.default_rng(seed).choice(len(cells), SAMPLE_CELLS, replace=False)
            cells = cells[np.sort(drawn)]
        mean = cells.mean(0, dtype=np.float64)
        cells = cells - mean.astype(np.float32)
        covariance = (cells.T @ cells).astype(np.float64) / len(cells)
        size = len(covariance)
        kept = [max(0, size - width), size - 1]
        variances, axes = scipy.linalg.eigh(covariance, subset_by_index=kept)
        variances, axes = variances[::-1], axes[:, ::-1]
        real = variances > max(ROUNDING, SINGLE * variances[0])
        if not real.any():
            raise InputError("items", f"{len(images)} images", "all look alike: nothing to encode")
        variances, axes = variances[real], axes[:, real]
        # The sign of an eigenvector is arbitrary; its largest number is made positive.
        signs = np.sign(axes[np.abs(axes).argmax(0), np.arange(axes.shape[1])])
        projection = axes * signs / np.sqrt(variances)
        explained = float(variances.sum() / np.trace(covariance))
        return cls(grid, mean.astype(np.float32), projection.astype(np.float32), explained)

    @property
    def side(self) -> int:
        """Pixels per side, S."""
        return SIDES[self.grid]

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Encode a batch of images."""
        encoded: np.ndarray = (_cells(images, self.grid) - self.mean) @ self.projection
        return encoded

    def save(self, uri: str) -> None:
        """Write mean and projection as safetensors."""
        tensors = {"mean": self.mean, "projection": np.ascontiguousarray(self.projection)}
        # Only one entry: safetensors orders several at random, and folders are hashed.
        write_bytes(save(tensors, {"grid": str(self.grid)}), uri)


def side_of(target: str) -> int:
    """Return the side S, in pixels, of the square from which `target` is computed."""
    return SIDES[grid_of(target)]


def _cells(images: np.ndarray, grid: int) -> np.ndarray:
    """Cut [n, S, S, 3] uint8 into cells, row by row, [n, G * G, P] float32 in 0..1."""
    number, side = images.shape[:2]
    cell = side // grid
    cut = images.reshape(number, grid, cell, grid, cell, 3).transpose(0, 1, 3, 2, 4, 5)
    return cut.reshape(number, grid * grid, -1).astype(np.float32) / 255
