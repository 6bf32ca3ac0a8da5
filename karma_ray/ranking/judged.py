"""Predictions beside what happened: the metrics of a CTR model, and its comparison with another.

Legend: n shown items.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from karma_ray.artifacts import read_table, write_table
from karma_ray.data.fragments import row_blocks
from karma_ray.data.steps import flattened, list_sizes
from karma_ray.metrics.clicks import Reliability, auc, log_loss, mean_auc_difference
from karma_ray.metrics.ranking import GroupWeight, group_auc
from karma_ray.metrics.significance import BootstrapResult, paired_bootstrap
from karma_ray.ranking.exposures import EXPOSURES, Exposures

Predict = Callable[[pa.Table], NDArray[np.floating]]
"""Rows of exposures -> the chance of a click of each of their candidates, [n]."""
PAGES = 1024
"""Pages that are scored at once."""
_COLUMNS = ("user", "page", "row", "chance", "clicked")


@dataclass(frozen=True)
class Judged:
    """The shown items of a split, all [n], in the order of the exposures."""

    user: NDArray[np.int64]
    """Numbers of users from 0 on."""
    page: NDArray[np.int64]
    row: NDArray[np.int64]
    """Catalogue rows."""
    chance: NDArray[np.float64]
    """Predicted, or any score for what predicts no chance."""
    clicked: NDArray[np.bool_]

    @classmethod
    def of(cls, exposures: Exposures, split: str, predict: Predict, most: int = 0) -> Judged:
        """Predict a split (its first `most` pages, 0: all)."""
        parts: list[tuple[NDArray[Any], ...]] = []
        users: dict[str, int] = {}
        pages = 0
        for rows in _slices(exposures, split):
            if most and pages >= most:
                break
            sizes = list_sizes(rows.column("candidate_rows"))
            who = [users.setdefault(u, len(users)) for u in rows.column("user_id").to_pylist()]
            parts.append((
                np.repeat(np.array(who, np.int64), sizes),
                np.repeat(pages + np.arange(rows.num_rows), sizes),
                flattened(rows.column("candidate_rows")).to_numpy().astype(np.int64),
                np.asarray(predict(rows), np.float64),
                flattened(rows.column("clicked")).to_numpy(zero_copy_only=False).astype(bool),
            ))  # fmt: skip
            pages += rows.num_rows
        if not parts:
            none = np.zeros(0, np.int64)
            return cls(none, none, none, np.zeros(0), np.zeros(0, bool))
        return cls(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def where(self, kept: NDArray[np.bool_]) -> Judged:
        """Return some shown items."""
        return Judged(*(getattr(self, name)[kept] for name in _COLUMNS))

    def with_chance(self, chance: NDArray[np.floating]) -> Judged:
        """Return the same shown items with other predictions."""
        return replace(self, chance=np.asarray(chance, np.float64))

    def metrics(self, weight: GroupWeight, *, is_chance: bool = True) -> dict[str, float]:
        """Return AUC, gAUC and ECE in percent, the log loss, and counts.

        What predicts no chance has no log loss and no ECE.
        """
        groups = group_auc(self.chance, self.clicked, self.page)
        found: dict[str, float] = {
            "num_test": len(self.clicked), "num_clicks": int(self.clicked.sum()),
            "num_gauc_groups": len(groups.auc), "CTR": 100 * _mean(self.clicked),
            "AUC": 100 * auc(self.chance, self.clicked),
            "gAUC": 100 * _mean(groups.auc, groups.weights(weight)),
        }  # fmt: skip
        if is_chance:
            found |= {
                "logloss": _mean(log_loss(self.chance, self.clicked)),
                "ECE": 100 * Reliability.of(self.chance, self.clicked).error,
                "predicted_CTR": 100 * _mean(self.chance),
            }
        return {name: value for name, value in found.items() if np.isfinite(value)}

    def intervals(self, weight: GroupWeight, seed: int) -> dict[str, float]:
        """Return the bounds of the 95 % intervals of AUC and gAUC over users, in percent."""
        if not self.clicked.any() or self.clicked.all():
            return {}
        return {
            f"{name}_{bound}": 100 * getattr(result, bound)
            for name, result in mean_differences([self], None, weight, seed).items()
            for bound in ("low", "high")
        }

    def differences(
        self, other: Judged, weight: GroupWeight, seed: int
    ) -> dict[str, BootstrapResult]:
        """Return AUC and gAUC of this one minus those of another on the same shown items.

        Users are resampled, the same for both. Values are shares of 1.
        """
        return mean_differences([self], [other], weight, seed)

    def save(self, folder: str, split: str) -> None:
        """Write one Parquet file with the predictions of a split."""
        write_table(pa.table({name: getattr(self, name) for name in _COLUMNS}), folder, split)

    @classmethod
    def load(cls, folder: str, split: str) -> Judged:
        """Read the predictions of a split."""
        table = read_table(f"{folder}/{split}.parquet")
        return cls(*(table.column(n).to_numpy(zero_copy_only=False) for n in _COLUMNS))


def mean_differences(
    mine: Sequence[Judged], others: Sequence[Judged] | None, weight: GroupWeight, seed: int
) -> dict[str, BootstrapResult]:
    """Return the means over seeds of AUC and gAUC of `mine` minus those of `others`.

    All predict the same shown items. A drawn user comes with what all seeds predicted for it.
    Without `others` it is the metrics themselves. Values are shares of 1.
    """
    first = mine[0]
    assert all(np.array_equal(first.row, one.row) for one in (*mine, *(others or ()))), (
        "the same shown items under two models"
    )
    left, right = ([one.chance for one in some] for some in (mine, others or ()))
    found = {"AUC": mean_auc_difference(left, right or None, first.clicked, first.user, seed)}
    groups = [group_auc(one.chance, one.clicked, one.page) for one in mine]
    theirs = [group_auc(one.chance, one.clicked, one.page).auc for one in others or ()]
    if len(groups[0].auc):  # no page of some shown items may have a click and another item
        pages, place = np.unique(first.page, return_index=True)
        users = first.user[place[np.searchsorted(pages, groups[0].groups)]]
        found["gAUC"] = paired_bootstrap(
            np.mean([one.auc for one in groups], axis=0),
            np.mean(theirs, axis=0) if theirs else np.zeros(len(groups[0].auc)),
            [str(user) for user in users], seed=seed, weights=groups[0].weights(weight),
        )  # fmt: skip
    return found


def _slices(exposures: Exposures, split: str) -> Iterator[pa.Table]:
    names = [*EXPOSURES.names, *(["features"] if exposures.num_features else [])]
    for block in row_blocks(exposures.split(split), names):
        for start in range(0, block.num_rows, PAGES):
            yield block.slice(start, PAGES)


def _mean(values: NDArray[Any], weights: NDArray[np.float64] | None = None) -> float:
    return float(np.average(values, weights=weights)) if len(values) else float("nan")
