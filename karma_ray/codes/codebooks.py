"""Codebooks: levels that are fitted one after another, each on what the ones before leave over.

An item's embedding is the sum of what its codes stand for, plus the last residual. Res-KmeansFSQ
(QARM V2, 2602.08559) takes FSQ for the last level, whose codes need no codewords to be fitted.
Legend: n items, D width, L levels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from safetensors.numpy import load, save

from karma_ray.artifacts import (
    exists,
    join,
    read_bytes,
    read_manifest,
    write_bytes,
    write_manifest,
)
from karma_ray.codes.config import CodesConfig
from karma_ray.codes.levels import FSQLevel, KMeansLevel, Level
from karma_ray.errors import InputError
from karma_ray.ranges import validated

if TYPE_CHECKING:
    from numpy.typing import NDArray

MANIFEST_KIND = "codebooks"
TENSORS = "codebooks.safetensors"


@dataclass(frozen=True)
class Codebooks:
    """All levels, fitted."""

    config: CodesConfig
    levels: tuple[Level, ...]
    width: int
    bundle: str
    """Content hash of the bundle whose embeddings they were fitted on."""
    fitted_on: int
    """Number of items of the sample."""

    @classmethod
    def fit(
        cls, vectors: NDArray[np.float32], config: CodesConfig, bundle: str = ""
    ) -> Codebooks:  # [n, D]
        """Fit the levels on a sample of vectors, which may be mapped into memory.

        Raises InputError on choices out of range, and on too few items.
        """
        config.check()
        residual, fitted = sample_of(vectors, config), list[Level]()
        for place, size in enumerate(config.sizes):
            last = place == config.levels - 1
            level: Level
            if last and config.kind == "res_kmeans_fsq":
                level = FSQLevel.fit(residual, config.fsq_levels)
            else:
                level = KMeansLevel.fit(residual, size, config.iterations, config.seed + place)
            fitted.append(level)
            residual = residual - level.decode(level.encode(residual))
        return cls(config, tuple(fitted), vectors.shape[1], bundle, len(residual))

    def encode(self, vectors: NDArray[np.float32]) -> NDArray[np.int32]:  # [n, D] -> [n, L]
        """Return the codes of vectors; raises InputError on vectors of another width."""
        return np.stack([codes for codes, _ in self.steps(vectors)], axis=1)

    def decode(
        self, codes: NDArray[np.int32], num_levels: int | None = None
    ) -> NDArray[np.float32]:  # [n, L] -> [n, D]
        """Return the sum of what the codes of the first levels, by default of all, stand for."""
        result = np.zeros((len(codes), self.width), np.float32)
        for place, level in enumerate(self.levels[:num_levels]):
            result += level.decode(codes[:, place])
        return result

    def steps(
        self, vectors: NDArray[np.float32]
    ) -> Iterator[tuple[NDArray[np.int32], NDArray[np.float32]]]:
        """Yield the codes [n] of each level, and the residual [n, D] that it leaves."""
        if vectors.shape[1] != self.width:
            problem = f"is not the width of the codebooks, which is {self.width}"
            raise InputError("width of the embeddings", vectors.shape[1], problem)
        residual = np.array(vectors, np.float32)
        for level in self.levels:
            codes = level.encode(residual)
            residual -= level.decode(codes)
            yield codes, residual

    def save(self, folder: str) -> str:
        """Write the levels, and a manifest that marks the folder complete; returns its hash."""
        arrays = {
            f"{place}.{name}": np.ascontiguousarray(values)
            for place, level in enumerate(self.levels)
            for name, values in level.arrays().items()
        }
        write_bytes(save(arrays), join(folder, TENSORS))
        facts = {"config": self.config.plain(), "width": self.width, "fitted_on": self.fitted_on}
        parents = {"bundle": self.bundle}
        manifest = write_manifest(folder, MANIFEST_KIND, parents=parents, **facts)
        return str(manifest["content_hash"])

    @classmethod
    def load(cls, folder: str) -> Codebooks:
        """Read codebooks, also those in a folder of codes; raises InputError if there are none."""
        if exists(join(folder, "codebooks")):
            folder = join(folder, "codebooks")
        if not exists(join(folder, "manifest.json")):
            raise InputError("--codebooks", folder, "holds no codebooks")
        facts = read_manifest(folder, MANIFEST_KIND)
        config = validated(CodesConfig, facts["config"], "codes")
        stored = load(read_bytes(join(folder, TENSORS)))
        levels = list[Level]()
        for place in range(config.levels):
            start = f"{place}."
            arrays = {n.removeprefix(start): a for n, a in stored.items() if n.startswith(start)}
            is_words = "codewords" in arrays
            levels.append(
                KMeansLevel(**arrays) if is_words else FSQLevel.of(config.fsq_levels, arrays)
            )
        return cls(
            config, tuple(levels), facts["width"], facts["parents"]["bundle"], facts["fitted_on"]
        )


def sample_of(
    vectors: NDArray[np.float32], config: CodesConfig
) -> NDArray[np.float32]:  # [n, D] -> [at most config.sample, D]
    """Return the vectors that codebooks are fitted on, in the order of the catalogue."""
    if len(vectors) <= config.sample:
        return np.array(vectors, np.float32)
    rows = np.random.default_rng(config.seed).choice(len(vectors), config.sample, replace=False)
    return np.array(vectors[np.sort(rows)], np.float32)
