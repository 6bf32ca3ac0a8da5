"""How good codes are: collisions, reconstruction error and use of the codebooks.

Legend: n items, D width, L levels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from karma_ray.codes.codebooks import Codebooks

BLOCK_ITEMS = 16_384
"""Items whose residuals are in memory at once."""


@dataclass(frozen=True)
class Tally:
    """Sums over items, which parts of a catalogue add up; a JSON value by `vars`."""

    items: int
    square_errors: list[float]  # [L]
    """Squared length of what is left over after each level."""
    cosines: float
    """Cosines between the vectors and their reconstructions."""
    total: list[float]  # [D]
    squares: float
    """Squared lengths of the vectors."""

    @classmethod
    def sum(cls, parts: Iterable[Tally]) -> Tally:
        """Return the sums over all parts."""
        found = list(parts)
        return cls(
            sum(part.items for part in found),
            np.sum([part.square_errors for part in found], axis=0).tolist(),
            sum(part.cosines for part in found),
            np.sum([part.total for part in found], axis=0).tolist(),
            sum(part.squares for part in found),
        )

    @property
    def variance(self) -> float:
        """Squared distance of all items from their mean."""
        return self.squares - float(np.square(self.total).sum()) / self.items


@dataclass(frozen=True)
class Quality:
    """The numbers of a table of codes, as in its manifest."""

    collision_rate: float
    """Share of the items that share their whole code with another item."""
    items_per_code: float
    """Items for each code that any item has."""
    errors: list[float]  # [L]
    """Mean squared error of the first levels together, as a share of the embeddings' variance."""
    mean_cosine: float
    """Mean cosine between an embedding and its reconstruction."""
    used: list[float]  # [L]
    """Share of each level's codes that some item has."""
    perplexity: list[float]  # [L]
    """Exponential of the entropy of each level's codes: as many, used equally, say as much."""

    def rounded(self) -> dict[str, Any]:
        """Return the numbers for a manifest."""
        return {
            name: [round(v, 6) for v in value] if isinstance(value, list) else round(value, 6)
            for name, value in vars(self).items()
        }


def coded(
    books: Codebooks, vectors: NDArray[np.float32]
) -> tuple[NDArray[np.int32], Tally]:  # [n, D] -> [n, L]
    """Return the codes of vectors, block by block, and their sums."""
    codes, tallies = [], []
    for start in range(0, len(vectors), BLOCK_ITEMS):
        block = np.array(vectors[start : start + BLOCK_ITEMS], np.float32)
        found, errors, residual = [], [], block
        for level, residual in books.steps(block):
            found.append(level)
            errors.append(float(np.square(residual, dtype=np.float64).sum()))
        codes.append(np.stack(found, axis=1))
        lengths = np.linalg.norm(block, axis=1) * np.linalg.norm(block - residual, axis=1)
        cosines = ((block - residual) * block).sum(1) / np.maximum(lengths, 1e-12)
        squares = float(np.square(block, dtype=np.float64).sum())
        total = block.sum(0, dtype=np.float64).tolist()
        tallies.append(Tally(len(block), errors, float(cosines.sum()), total, squares))
    return np.concatenate(codes), Tally.sum(tallies)


def quality(tally: Tally, codes: NDArray[np.int32], sizes: Sequence[int]) -> Quality:
    """Return the numbers of all items, whose codes are [n, L]."""
    rate, per_code = collisions(codes, sizes)
    use = [codebook_use(codes[:, place], size) for place, size in enumerate(sizes)]
    variance = max(tally.variance, 1e-30)
    return Quality(
        rate, per_code, [error / variance for error in tally.square_errors],
        tally.cosines / tally.items, [used for used, _ in use], [evenly for _, evenly in use],
    )  # fmt: skip


def collisions(codes: NDArray[np.int32], sizes: Sequence[int]) -> tuple[float, float]:
    """Return the share of items whose code another has too, and the items for each code."""
    keys = codes @ np.cumprod([1, *sizes[:-1]], dtype=np.int64)
    _, counts = np.unique(keys, return_counts=True)
    return float(counts[counts > 1].sum() / len(codes)), len(codes) / len(counts)


def codebook_use(codes: NDArray[np.int32], size: int) -> tuple[float, float]:  # [n]
    """Return the share of `size` codes that are used, and the perplexity of their use."""
    counts = np.bincount(codes, minlength=size)
    share = counts[counts > 0] / len(codes)
    return float((counts > 0).mean()), float(np.exp(-(share * np.log(share)).sum()))


def equal_vectors(vectors: NDArray[np.float32]) -> float:  # [n, D]
    """Return the share of items with the very vector of another: no codes tell them apart."""
    factors = np.random.default_rng(0).integers(1, 2**63, vectors.shape[1], np.uint64)
    keys = [
        (np.array(vectors[start : start + BLOCK_ITEMS]).view(np.uint32) * factors).sum(1)
        for start in range(0, len(vectors), BLOCK_ITEMS)
    ]
    _, counts = np.unique(np.concatenate(keys), return_counts=True)
    return float(counts[counts > 1].sum() / len(vectors))
