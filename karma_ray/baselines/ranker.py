"""The interface of every ranker: floors, ceilings and models."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


class Ranker(Protocol):
    """Scores the whole catalogue for a few requests."""

    def score(self, examples: pa.Table) -> NDArray[np.floating]:
        """Return scores [b, I], columns in catalogue order, higher is better, no NaN.

        Only `query`, `user_id`, `timestamp` and the `history_*` columns may be read; the others
        contain the answer.
        """
        ...
