"""The two kinds of a level: codewords of k-means, and FSQ of a projected residual.

Legend: n vectors, D width, K codewords, r dimensions of FSQ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from karma_ray.codes.fsq import bounded, digits, packed, unpacked
from karma_ray.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Vectors = NDArray[np.float32]  # [n, D]
    Codes = NDArray[np.int32]  # [n]
    Arrays = dict[str, NDArray[np.float32]]

MIDDLE = math.atanh(0.5)
"""The tanh of half of all values lies within -1/2 to 1/2 if their median size is scaled to this,
so the levels of FSQ are used about equally often. A deviation would not do, as few large residuals
would set it and push all others into the middle levels."""


class Level(Protocol):
    """One number of an item's code."""

    @property
    def size(self) -> int:
        """Number of codes."""

    def encode(self, vectors: Vectors) -> Codes:
        """Return the code of each vector."""

    def decode(self, codes: Codes) -> Vectors:
        """Return the vector that each code stands for."""

    def arrays(self) -> Arrays:
        """Return what is stored."""


@dataclass(frozen=True)
class KMeansLevel:
    """The nearest of K codewords."""

    codewords: NDArray[np.float32]  # [K, D]

    @classmethod
    def fit(cls, vectors: Vectors, size: int, iterations: int, seed: int) -> KMeansLevel:
        """Fit codewords by faiss; raises InputError if there are fewer vectors than codewords."""
        if len(vectors) < size:
            problem = f"needs as many items to fit codewords, there are {len(vectors)}"
            raise InputError("codes.codewords or codes.fsq_levels", size, problem)
        import faiss  # rankers that read codes need none

        kmeans = faiss.Kmeans(
            vectors.shape[1], size, niter=iterations, seed=seed, verbose=False,
            min_points_per_centroid=1, max_points_per_centroid=max(1, -(-len(vectors) // size)),
        )  # fmt: skip
        kmeans.train(np.ascontiguousarray(vectors, np.float32))
        return cls(np.asarray(kmeans.centroids, np.float32).reshape(size, -1))

    @property
    def size(self) -> int:
        return len(self.codewords)

    def encode(self, vectors: Vectors) -> Codes:
        import faiss

        _, nearest = faiss.knn(np.ascontiguousarray(vectors), self.codewords, 1)
        return np.asarray(nearest[:, 0], np.int32)

    def decode(self, codes: Codes) -> Vectors:
        return self.codewords[codes]

    def arrays(self) -> Arrays:
        return {"codewords": self.codewords}


@dataclass(frozen=True)
class FSQLevel:
    """FSQ of the r main components of a residual, each scaled by its median size."""

    levels: tuple[int, ...]
    mean: NDArray[np.float32]  # [D]
    """The mean, but the median along the components."""
    components: NDArray[np.float32]  # [r, D]
    scales: NDArray[np.float32]  # [r]
    values: NDArray[np.float32]  # [r, max(levels)]
    """What each level of a dimension stands for: the mean of the sample's values in it."""

    @classmethod
    def fit(cls, vectors: Vectors, levels: tuple[int, ...]) -> FSQLevel:
        """Fit the projection and the values; raises InputError with more dimensions than D."""
        width = vectors.shape[1]
        if len(levels) > width:
            problem = f"has more dimensions than the embeddings, which have {width}"
            raise InputError("codes.fsq_levels", list(levels), problem)
        mean = vectors.mean(0, dtype=np.float64)
        centred = vectors - mean
        _, found = np.linalg.eigh(centred.T @ centred / max(1, len(vectors)))
        components = found[:, ::-1][:, : len(levels)].T
        largest = np.abs(components).argmax(1)  # a component has no sign of its own
        components = components * np.sign(components[np.arange(len(levels)), largest])[:, None]
        projected = centred @ components.T
        centre = np.median(projected, axis=0)
        mean, projected = mean + centre @ components, projected - centre
        middle = np.median(np.abs(projected), axis=0)
        middle = np.where(middle > 0, middle, projected.std(0))  # of many equal vectors
        scales = MIDDLE / np.where(middle > 0, middle, 1.0)
        values = _means(projected, scales, levels)
        return cls(levels, *(a.astype(np.float32) for a in (mean, components, scales, values)))

    @classmethod
    def of(cls, levels: tuple[int, ...], stored: Mapping[str, NDArray[np.float32]]) -> FSQLevel:
        """Return the level with the arrays that `arrays` gave."""
        return cls(levels, **stored)

    @property
    def size(self) -> int:
        return math.prod(self.levels)

    def encode(self, vectors: Vectors) -> Codes:
        projected = (vectors - self.mean) @ self.components.T
        return packed(digits(projected * self.scales, self.levels), self.levels).astype(np.int32)

    def decode(self, codes: Codes) -> Vectors:
        found = unpacked(codes, self.levels)
        values = self.values[np.arange(len(self.levels)), found]
        return np.asarray(self.mean + values @ self.components, np.float32)

    def arrays(self) -> Arrays:
        return {
            "mean": self.mean, "components": self.components, "scales": self.scales,
            "values": self.values,
        }  # fmt: skip


def _means(
    projected: NDArray[np.float64], scales: NDArray[np.float64], levels: tuple[int, ...]
) -> NDArray[np.float64]:  # [n, r] -> [r, max(levels)]
    """Return the mean value of every level; one that the sample lacks is where FSQ places it."""
    found = digits(projected * scales, levels)
    values = np.zeros((len(levels), max(levels)))
    for place, count in enumerate(levels):
        values[place, :count] = _inverse(np.arange(count), count) / scales[place]
        total = np.bincount(found[:, place], projected[:, place], count)
        number = np.bincount(found[:, place], minlength=count)
        used = number > 0
        values[place, :count][used] = total[used] / number[used]
    return values


def _inverse(digit: NDArray[np.int64], count: int) -> NDArray[np.float64]:
    """Return a value that FSQ gives to each level, by interpolating `bounded`."""
    grid = np.linspace(-4, 4, 8001)
    return np.interp(digit - count // 2, bounded(grid[:, None], [count])[:, 0], grid)
