"""Bootstrap intervals of rows against baselines, kept longer than the values per example.

Values per example are large and are not committed. `differences/DATA.jsonl` keeps the results that
tables need: a line per row and baseline, named by hashes of the values of their runs. They are
valid as long as metrics/significance.py draws in the same way.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple
from pathlib import Path

import numpy as np

from karma_ray.artifacts import join, locked, read_lines, write_lines
from karma_ray.evaluation.outcomes import Outcomes
from karma_ray.metrics.significance import BootstrapResult, paired_bootstrap
from karma_ray.studies.records import Record, outcomes_of

Pairs = Sequence[tuple[Record, Record]]
"""The records of row and baseline for every seed."""
Key = tuple[tuple[str, ...], tuple[str, ...]]
"""The hashes `outcomes` of the records of a row and of its baseline."""
Found = dict[str, BootstrapResult | None]
"""Metric -> bootstrap; None if the runs have no example for the metric."""
FOLDER = "differences"
_DIGITS = 6
"""Decimals of the kept numbers, which are in points."""


class Intervals:
    """Intervals for the records in `results`: read, or computed from values per example."""

    def __init__(self, results: str | Path) -> None:
        self._results = results
        self._found: dict[str, dict[Key, Found]] = {}  # data set -> ...
        self._outcomes: dict[str, Outcomes | None] = {}

    def of(self, pairs: Pairs, metric: str) -> BootstrapResult | None:
        """Bootstrap over users, each with its examples under all seeds.

        If `gone` names runs, only the known seeds are used. None if there are none, if runs were
        tested on different examples, and if the metric is a mean over something else.
        """
        if not _comparable(pairs):
            return None
        kept = self._of_data(pairs)
        if metric not in kept.get(_key(pairs), {}):
            pairs = self._known_part(pairs, metric)
        if not pairs:
            return None
        found = kept.setdefault(_key(pairs), {})
        if metric not in found:
            found[metric] = self._computed(pairs, metric)
        return found[metric]

    def gone(self, pairs: Pairs, metric: str) -> tuple[str, ...]:
        """Return the names of runs whose values per example are needed for all seeds and lost."""
        if not _comparable(pairs) or metric in self._of_data(pairs).get(_key(pairs), {}):
            return ()
        return self._without_values(pairs)

    def save(self, records: Iterable[Record]) -> None:
        """Keep the found intervals of pairs whose runs are all among `records`."""
        there = {record.get("outcomes") for record in records}
        for data, mine in self._found.items():
            uri = self._uri(data)
            with locked(uri):
                before = _read(uri)
                found = {key: before.get(key, {}) | mine.get(key, {}) for key in {*before, *mine}}
                kept = {k: of for k, of in found.items() if of and there.issuperset(k[0] + k[1])}
                if kept != before:
                    write_lines([_line(key, kept[key]) for key in sorted(kept)], uri)

    def _uri(self, data: str) -> str:
        return join(str(self._results), FOLDER, f"{data}.jsonl")

    def _of_data(self, pairs: Pairs) -> dict[Key, Found]:
        data = pairs[0][0]["data"]
        if data not in self._found:
            self._found[data] = _read(self._uri(data))
        return self._found[data]

    def _values(self, record: Record) -> Outcomes | None:
        name = record["outcomes"]
        if name not in self._outcomes:
            self._outcomes[name] = outcomes_of(record, self._results)
        return self._outcomes[name]

    def _without_values(self, pairs: Pairs) -> tuple[str, ...]:
        records = [record for pair in pairs for record in pair if self._values(record) is None]
        return tuple(dict.fromkeys(record["name"] for record in records))

    def _known_part(self, pairs: Pairs, metric: str) -> Pairs:
        """Return the largest part of the pairs whose values, or whose interval, are known.

        A mean over fewer seeds varies at least as much over users, so its interval is not too
        narrow.
        """
        here = [pair for pair in pairs if not self._without_values([pair])]
        by_runs = {(one["outcomes"], other["outcomes"]): (one, other) for one, other in pairs}
        parts = [
            [by_runs[runs] for runs in zip(*key, strict=True)]
            for key, found in self._of_data(pairs).items()
            if metric in found and by_runs.keys() >= set(zip(*key, strict=True))
        ]
        return max([here, *parts], key=len)

    def _computed(self, pairs: Pairs, metric: str) -> BootstrapResult | None:
        parts = []
        for pair in pairs:
            mine, theirs = (self._values(record) for record in pair)
            assert mine is not None and theirs is not None, "asked of runs that have values"
            left, right = mine.values(metric), theirs.values(metric)
            if left is None or right is None:
                return None
            parts.append((left[0], right[0], left[1], left[2]))
        mine_all, theirs_all, users, weights = map(np.concatenate, zip(*parts, strict=True))
        found = paired_bootstrap(mine_all, theirs_all, users.tolist(), seed=0, weights=weights)
        return BootstrapResult(*(round(number, _DIGITS) for number in astuple(found)))


def _comparable(pairs: Pairs) -> bool:
    """Whether both runs of every pair were tested on the same clicks.

    Values per example are per click; a mean over requests would be another number.
    """
    return all(
        mine["examples"] == theirs["examples"]
        and mine["config"].get("evaluation", {}).get("hr_unit", "click") == "click"
        for mine, theirs in pairs
    )


def _key(pairs: Pairs) -> Key:
    return tuple(mine["outcomes"] for mine, _ in pairs), tuple(
        over["outcomes"] for _, over in pairs
    )


def _read(uri: str) -> dict[Key, Found]:
    return {
        (tuple(line.pop("row")), tuple(line.pop("over"))): {
            metric: None if numbers is None else BootstrapResult(*numbers)
            for metric, numbers in line.items()
        }
        for line in read_lines(uri)
    }


def _line(key: Key, found: Found) -> dict[str, object]:
    told = {metric: None if one is None else astuple(one) for metric, one in found.items()}
    return {"row": key[0], "over": key[1], **told}
