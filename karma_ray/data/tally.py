"""Sums per key over a stream of batches, held in one compact table."""

from __future__ import annotations

import polars as pl

_LEAST_PENDING = 1_000_000


class Tally:
    """Sums of columns per key; the memory is that of the distinct keys, twice at most."""

    def __init__(self, key: str, kind: type[pl.DataType], sums: tuple[str, ...]) -> None:
        self._key, self._sums = key, sums
        self._total = pl.DataFrame(schema={key: kind, **dict.fromkeys(sums, pl.Int64)})
        self._pending: list[pl.DataFrame] = []
        self._num_pending = 0

    def add(self, rows: pl.DataFrame) -> None:
        """Add rows with the key and the columns to be summed."""
        part = self._summed(rows.select(self._total.columns))
        self._pending.append(part)
        self._num_pending += part.height
        if self._num_pending > max(_LEAST_PENDING, self._total.height):
            self._compact()

    def table(self) -> pl.DataFrame:
        """Return a row per key, in the order of the keys."""
        self._compact()
        return self._total.sort(self._key, nulls_last=True)

    def _compact(self) -> None:
        self._total = self._summed(pl.concat([self._total, *self._pending]))
        self._pending, self._num_pending = [], 0

    def _summed(self, rows: pl.DataFrame) -> pl.DataFrame:
        sums = [pl.col(name).cast(pl.Int64).sum() for name in self._sums]
        return rows.group_by(self._key).agg(sums)
