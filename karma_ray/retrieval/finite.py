"""Checks that embeddings, weights and queries are finite, as a search would fail silently.

Legend: I items, B requests, K vectors of a request, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from karma_ray.errors import KarmaRayError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch.nn import Module

AT_ONCE = 8_192
"""Items whose vectors are checked at once."""


def check_finite(
    item_ids: Sequence[str],
    vectors: NDArray[np.float32],  # [I, D]
    where: str = "the model",
) -> None:
    """Raise KarmaRayError, with an example, if vectors of items contain NaN or infinity."""
    # In parts, because a mask of all numbers would be a quarter of the vectors' own memory.
    parts = [vectors[start : start + AT_ONCE] for start in range(0, len(vectors), AT_ONCE)]
    finite = np.concatenate([np.isfinite(part).all(1) for part in parts] or [np.ones(0, bool)])
    broken = np.flatnonzero(~finite)
    if len(broken):
        raise KarmaRayError(
            f"{where}: the embeddings of {len(broken)} of {len(item_ids)} items are not finite "
            f"(for example of {item_ids[broken[0]]!r}), so they could never be found; the model "
            "has diverged, or the file is damaged"
        )


def check_weights(model: Module, where: str) -> None:
    """Raise KarmaRayError that names the first weight with NaN or infinity."""
    for name, weight in model.named_parameters():
        if not bool(weight.isfinite().all()):
            raise KarmaRayError(
                f"{where}: weight {name} is not finite; the model has diverged, or the file is "
                "damaged"
            )


def check_queries(vectors: NDArray[np.float32]) -> None:  # [B, K, D]
    """Raise KarmaRayError if a request would search with NaN or infinity."""
    broken = ~np.isfinite(vectors).all((1, 2))
    if broken.any():
        raise KarmaRayError(
            f"the model's answer to {int(broken.sum())} of {len(vectors)} requests is not finite, "
            "so nothing can be searched for"
        )
