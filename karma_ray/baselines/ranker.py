"""What every ranker is: floors, ceilings and models answer the same call."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


class Ranker(Protocol):
    """Scores the whole catalogue for a few requests."""

    def score(self, examples: pa.Table) -> NDArray[np.floating]:
        """Scores [b, I], columns in catalogue row order, higher is better, no NaN.

        May look only at `query`, `user_id`, `timestamp` and the `history_*` columns: the
        others are what is being asked.
        """
        ...
