"""Outcomes of a ranker on every test example, stored compactly for every run of a study.

A paired bootstrap over users needs values per example: ranks, term overlap, and the AUC of every
judged request. They are stored as 16-bit integers in two compressed parts: the examples (the same
for all rankers on the same data), and the outcomes of this ranker.
Legend: n examples, G judged requests.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from karma_ray.artifacts import join, read_bytes, write_bytes
from karma_ray.evaluation.measurement import EvaluationDetails
from karma_ray.metrics import ranking

Values = tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.float64]]
"""(value, user, weight), each [m]."""
FILES = ("examples.npz", "outcomes.npz")
_LARGEST = np.iinfo(np.uint16).max
_AUC_PARTS, _OVERLAP_PARTS = 10_000, 2_000  # of a share in [0, 1]


@dataclass(frozen=True)
class Examples:
    """The tested users and targets; rankers can be paired if these are equal."""

    user: NDArray[np.int64]
    """[n] user numbers, in the order of first appearance among all examples."""
    cold: NDArray[np.bool_]
    """[n] whether the target has no training click."""
    group_user: NDArray[np.int64]
    """[G]"""
    group_weight: NDArray[np.float64]
    """[G] weight in gAUC."""
    held_out: NDArray[np.bool_] | None = None
    """[n] whether the target's category is held out of training; None if none is."""


@dataclass(frozen=True)
class Outcomes:
    """The results of one ranker."""

    examples: Examples
    rank: NDArray[np.int64]
    """[n] rank of the target among all items; 65535 means that or worse."""
    query_rank: NDArray[np.int64]
    """[n] rank among the items that match the query; 0 for examples outside `in_query/`."""
    overlap: NDArray[np.float64]
    """[n] JS@50 in [0, 1]."""
    group_auc: NDArray[np.float64]
    """[G] in [0, 1]."""
    paraphrased_rank: NDArray[np.int64] | None = None
    """[n] as `rank`, when the query is asked in other words; None if that is not measured."""

    def values(self, metric: str) -> Values | None:
        """Return (value, user, weight), each [m], whose weighted mean is `metric` in percent.

        Metrics: HR@K, NDCG@K, MRR, JS@50 and gAUC; the first three also under `cold/`, `warm/`,
        `held_out/`, `in_query/` and `paraphrased/`, JS@50 under the first three. None for other
        metrics and if nothing is measured.
        """
        section, _, name = metric.rpartition("/")
        if metric == "gAUC":
            found = (100 * self.group_auc, self.examples.group_user, self.examples.group_weight)
            return found if len(self.group_auc) else None
        every, cold = np.ones(len(self.rank), dtype=bool), self.examples.cold
        sections = {
            "": (every, self.rank),
            "cold": (cold, self.rank),
            "warm": (~cold, self.rank),
            "held_out": (self.examples.held_out, self.rank),
            "in_query": (self.query_rank > 0, self.query_rank),
            "paraphrased": (every, self.paraphrased_rank),
        }
        mask, ranks = sections.get(section, (None, None))
        if mask is None or ranks is None or not mask.any():
            return None
        if name == "JS@50" and ranks is not self.rank:
            return None
        values = self._per_example(name, ranks)
        if values is None:
            return None
        return 100 * values[mask], self.examples.user[mask], np.ones(int(mask.sum()))

    def _per_example(self, name: str, ranks: NDArray[np.int64]) -> NDArray[np.float64] | None:
        if name.startswith("HR@") and name[3:].isdigit():
            return ranking.hit(ranks, int(name[3:]))
        if name.startswith("NDCG@") and name[5:].isdigit():
            return ranking.ndcg(np.maximum(ranks, 1), int(name[5:]))
        if name == "MRR":
            return np.where(ranks >= _LARGEST, 0.0, 1.0 / np.maximum(ranks, 1))
        return self.overlap if name == "JS@50" else None

    @classmethod
    def of(
        cls,
        details: EvaluationDetails,
        cold: NDArray[np.bool_],
        users: Iterable[str | None],
        held_out: NDArray[np.bool_] | None = None,
        paraphrased: EvaluationDetails | None = None,
    ) -> Outcomes:
        """Build outcomes from an evaluation's values per example; cold and held_out [n].

        `paraphrased` has those of the same examples with the queries in other words. `users` are
        those of all examples, including the ones outside a sample, so that a user has the same
        number in every sample.
        """
        numbers = {name: number for number, name in enumerate(dict.fromkeys(users))}
        user = [numbers[name] for name in details.user_ids]
        group = [numbers[name] for name in details.group_user_ids]
        examples = Examples(
            np.array(user, dtype=np.int64), cold, np.array(group, dtype=np.int64),
            details.group_weights, held_out,
        )  # fmt: skip
        return cls(
            examples, np.minimum(details.ranks, _LARGEST), details.query_ranks, details.js,
            details.group_auc,
            None if paraphrased is None else np.minimum(paraphrased.ranks, _LARGEST),
        )  # fmt: skip

    def packed(self) -> tuple[bytes, bytes]:
        """Return (examples, outcomes), each the content of an .npz file."""
        these = self.examples
        examples = {
            "user": these.user,
            "cold": these.cold,
            "group_user": these.group_user,
            "group_weight": these.group_weight,
        }
        outcomes = {
            "rank": self.rank,
            "query_rank": np.minimum(self.query_rank, _LARGEST),
            "overlap": np.rint(self.overlap * _OVERLAP_PARTS),
            "group_auc": np.rint(self.group_auc * _AUC_PARTS),
        }
        if these.held_out is not None:
            examples["held_out"] = these.held_out
        if self.paraphrased_rank is not None:
            outcomes["paraphrased_rank"] = self.paraphrased_rank
        return _packed(examples), _packed(outcomes)

    def save(self, folder: str) -> None:
        """Write `examples.npz` and `outcomes.npz`."""
        for name, content in zip(FILES, self.packed(), strict=True):
            write_bytes(content, join(folder, name))

    @classmethod
    def load(cls, folder: str) -> Outcomes:
        """Read what `save` wrote."""
        return cls.unpacked(*(read_bytes(join(folder, name)) for name in FILES))

    @classmethod
    def unpacked(cls, examples: bytes, outcomes: bytes) -> Outcomes:
        """Invert `packed`; shares are exact to three decimals."""
        of, did = _unpacked(examples), _unpacked(outcomes)
        these = Examples(
            of["user"], of["cold"].astype(bool), of["group_user"],
            of["group_weight"].astype(np.float64),
            of["held_out"].astype(bool) if "held_out" in of else None,
        )  # fmt: skip
        return cls(
            these, did["rank"], did["query_rank"], did["overlap"] / _OVERLAP_PARTS,
            did["group_auc"] / _AUC_PARTS, did.get("paraphrased_rank"),
        )  # fmt: skip


def _packed(columns: Mapping[str, NDArray[Any]]) -> bytes:
    """Store the bytes of numbers in separate planes, since high bytes compress well."""
    planes: dict[str, Any] = {}
    for name, values in columns.items():
        numbers = values.astype(np.uint32)  # users may be many
        planes[name] = numbers.astype("<u4").view(np.uint8).reshape(-1, 4).T
    sink = io.BytesIO()
    np.savez_compressed(sink, **planes)
    return sink.getvalue()


def _unpacked(content: bytes) -> dict[str, NDArray[np.int64]]:
    with np.load(io.BytesIO(content)) as file:
        return {
            name: np.ascontiguousarray(file[name].T).view("<u4")[:, 0].astype(np.int64)
            for name in file.files
        }
