"""The interface of every ranker: floors, ceilings and models."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from torch import Tensor


class Ranker(Protocol):
    """Scores the whole catalogue for a few requests."""

    def score(self, examples: pa.Table) -> NDArray[np.floating]:
        """Return scores [b, I], columns in catalogue order, higher is better, no NaN.

        Only `query`, `user_id`, `timestamp` and the `history_*` columns may be read; the others
        contain the answer.
        """
        ...


@runtime_checkable
class DeviceRanker(Protocol):
    """A ranker whose scores are computed on a device, and may stay there."""

    def score_on_device(self, examples: pa.Table) -> Tensor:
        """Return the scores [b, I] of `Ranker.score`, where they were computed."""
        ...
