"""Both kinds of codes on the same embeddings, with the same number of codes, in one table."""

from __future__ import annotations

import dataclasses
import logging
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from karma_ray.codes.codebooks import Codebooks
from karma_ray.codes.config import KINDS, CodesConfig, Kind
from karma_ray.codes.quality import Quality, coded, equal_vectors, quality

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

LOG = logging.getLogger(__name__)


def measured(
    vectors: NDArray[np.float32], config: CodesConfig, bundle: str = ""
) -> Quality:  # [I, D]
    """Fit codebooks, give codes to all vectors, and return how good they are."""
    books = Codebooks.fit(vectors, config, bundle)
    codes, tally = coded(books, vectors)
    return quality(tally, codes, config.sizes)


def compare(
    vectors: NDArray[np.float32], config: CodesConfig, num_seeds: int = 1
) -> dict[Kind, list[Quality]]:  # [I, D]
    """Measure both kinds with the seeds from `config.seed` on."""
    found: dict[Kind, list[Quality]] = {kind: [] for kind in KINDS}
    for seed in range(config.seed, config.seed + num_seeds):
        for kind in KINDS:
            LOG.info("codes of kind %s, seed %d", kind, seed)
            choice = dataclasses.replace(config, kind=kind, seed=seed)
            found[kind].append(measured(vectors, choice))
    return found


def table_of(found: dict[Kind, list[Quality]], sizes: Sequence[int]) -> str:
    """Return the numbers of each kind, over seeds with their standard deviation."""
    columns = [[named(one, sizes) for one in some] for some in found.values()]
    lines = [
        f"{name:<26}" + "".join(f"{_told([one[name] for one in some]):>22}" for some in columns)
        for name in columns[0][0]
    ]
    return "\n".join([f"{'':<26}" + "".join(f"{kind:>22}" for kind in found), *lines])


def named(of: Quality, sizes: Sequence[int]) -> dict[str, float]:
    """Return the numbers with the names that a table gives them."""
    levels = list(enumerate(sizes))
    return {
        "collision rate": of.collision_rate,
        "items per code": of.items_per_code,
        "mean cosine": of.mean_cosine,
        **{f"error after level {n + 1}": of.errors[n] for n, _ in levels},
        **{f"level {n + 1}: used of {size}": of.used[n] for n, size in levels},
        **{f"level {n + 1}: perplexity": of.perplexity[n] for n, _ in levels},
    }


def floor_of(vectors: NDArray[np.float32]) -> str:
    """Return a sentence on collisions that no codes avoid."""
    return f"{equal_vectors(vectors):.2%} of the items have the very vector of another"


def _told(values: list[float]) -> str:
    digits = 1 if values[0] >= 10 else 4
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"
