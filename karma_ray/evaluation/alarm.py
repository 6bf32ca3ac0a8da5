"""The collapse alarm: bounds on what every report measures, and what usually helps.

A crossed bound is told once per run and kind: as a warning, as `alarm/KIND` in the record (the
bound; the value stands beside it) and in the report. Training goes on: the numbers decide nothing.

The bounds come from runs on the toy shop and `hm` (docs/diagnosis.md). Healthy ones kept a third
of their width as effective rank of e, a sixth as that of h, and cosines below .6; those that
collapsed fell to a twelfth, or to cosines above .9, within tens of steps. Healthy ones too cross a
bound for a moment: h at the first steps, e when its encoder starts to learn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # processes that only read records do without torch
    from torch import nn

PATIENCE = 3
"""Reports in a row that must cross a bound before it is told."""
LEAST_RANK_E = 0.1
"""Effective rank of e as a share of the width (or of the number of items, if that is less)."""
LEAST_RANK_H = 0.05
"""The same of h, which needs fewer directions than the items that it chooses from."""
MOST_COSINE = 0.9
"""Mean cosine of two different items, or interests. Nearly parallel vectors rank by noise."""
LEAST_NEGATIVES = 0.25
"""Share of the pool of positives that is left to a step as negatives (108 -> 2 in the reports on
live-embedding masks, METHOD 1.5)."""
KEPT_GAP, NOTABLE_GAP = 0.2, 0.1
"""A decode gap that reached .1 nats per token and fell to a fifth of its highest: forgetting."""
LEAST_GAP = 0.02
"""Nats per token in the second half of the training: h_t has not learnt to hold words at all."""
MORE_SINKS = 25.0
"""Points that content sinks may rise above their lowest: what a checkpoint brings along is no
collapse."""

_ALIKE = (
    "a lower learning rate (training.learning_rate, training.encoder_lr), a later encoder "
    "(training.encoder_delay), decodability (objective.reconstruction=1), fewer hard negatives at "
    "the start (objective.hard_ramp)"
)
_WORDS = (
    "decodability (objective.reconstruction=1, a larger objective.lambda_dec), a longer warm-up "
    "(warmup.steps), a lower learning rate (training.learning_rate)"
)
_NEGATIVES = (
    "larger batches (training.batch_size), fewer items of equal text, longer prepared windows; "
    "few negatives make the loss small without teaching anything"
)

Bound = Callable[["Alarm", float, Mapping[str, Any]], float | None]
"""(state, value, record) -> the bound that the value has crossed, or None."""


@dataclass(frozen=True)
class Kind:
    """One thing that is watched."""

    key: str
    """Name in the record."""
    name: str
    """In words."""
    bound: Bound
    side: str
    """`below` or `above`."""
    meaning: str
    helps: str


@dataclass
class Alarm:
    """What a training's reports have shown so far."""

    width: int
    """D of e and h."""
    steps: int
    """Steps of the whole training."""
    told: set[str] = field(default_factory=set)
    highest: dict[str, float] = field(default_factory=dict)
    lowest: dict[str, float] = field(default_factory=dict)
    in_a_row: dict[str, int] = field(default_factory=dict)
    """Reports up to the newest that cross a kind's bound."""

    @classmethod
    def of(cls, model: nn.Module, steps: int, lines: Iterable[Mapping[str, Any]]) -> Alarm | None:
        """For a joint training that has written `lines` already; None for other models."""
        interest = getattr(model, "interest", None)
        if interest is None:
            return None
        alarm = cls(int(interest.learned_width), steps)
        for line in lines:
            alarm(line)
        return alarm

    def __call__(self, record: Mapping[str, Any]) -> dict[str, float]:
        """`alarm/KIND` -> crossed bound, of kinds that have not been told yet."""
        found: dict[str, float] = {}
        for kind, watched in KINDS.items():
            value = record.get(watched.key)
            if value is None or not math.isfinite(value):
                continue
            self.highest[kind] = max(value, self.highest.get(kind, -math.inf))
            self.lowest[kind] = min(value, self.lowest.get(kind, math.inf))
            bound = watched.bound(self, value, record)
            self.in_a_row[kind] = 0 if bound is None else self.in_a_row.get(kind, 0) + 1
            if bound is not None and self.in_a_row[kind] >= PATIENCE and kind not in self.told:
                found[f"alarm/{kind}"] = bound
                self.told.add(kind)
        return found

    def directions(self, record: Mapping[str, Any]) -> float:
        """The largest effective rank that the vectors of a report can have."""
        return min(float(self.width), float(record.get("negatives/pool", math.inf)))


def messages(line: Mapping[str, Any], *, with_help: bool = True) -> list[str]:
    """The alarms of a line of metrics.jsonl as sentences."""
    return [
        f"collapse alarm at step {int(line.get('step', 0))}: {watched.name} is "
        f"{line[watched.key]:.3g}, {watched.side} {line[f'alarm/{kind}']:.3g}: {watched.meaning}."
        + f" What usually helps: {watched.helps}."
        * with_help
        for kind, watched in KINDS.items()
        if f"alarm/{kind}" in line and watched.key in line
    ]


def _rank(share: float) -> Bound:
    def crossed(alarm: Alarm, value: float, record: Mapping[str, Any]) -> float | None:
        bound = share * alarm.directions(record)
        return bound if value < bound else None

    return crossed


def _cosine(alarm: Alarm, value: float, record: Mapping[str, Any]) -> float | None:
    return MOST_COSINE if value > MOST_COSINE else None


def _negatives(alarm: Alarm, value: float, record: Mapping[str, Any]) -> float | None:
    bound = LEAST_NEGATIVES * record.get("negatives/pool", 0.0)
    return bound if value < bound else None


def _gap(alarm: Alarm, value: float, record: Mapping[str, Any]) -> float | None:
    highest = alarm.highest["decode_gap"]
    if highest >= NOTABLE_GAP and value < KEPT_GAP * highest:
        return KEPT_GAP * highest
    late = record.get("step", 0) > alarm.steps / 2
    return LEAST_GAP if late and value < LEAST_GAP else None


def _sinks(alarm: Alarm, value: float, record: Mapping[str, Any]) -> float | None:
    bound = alarm.lowest["content_sink"] + MORE_SINKS
    return bound if value > bound else None


KINDS = {
    "effective_rank_e": Kind(
        "collapse/effective_rank_e", "the effective rank of the items e", _rank(LEAST_RANK_E),
        "below", "items are told apart in a few directions only", _ALIKE,
    ),
    "effective_rank_h": Kind(
        "collapse/effective_rank_h", "the effective rank of the interests h", _rank(LEAST_RANK_H),
        "below", "everybody is given the same few interests", _ALIKE,
    ),
    "mean_cosine_e": Kind(
        "collapse/mean_cosine_e", "the mean cosine between items e", _cosine,
        "above", "item embeddings are nearly parallel", _ALIKE,
    ),
    "mean_cosine_h": Kind(
        "collapse/mean_cosine_h", "the mean cosine between interests h", _cosine,
        "above", "requests are nearly indistinguishable", _ALIKE,
    ),
    "negatives": Kind(
        "negatives/surviving", "the number of negatives per step", _negatives,
        "below", "the mask has deleted most of the pool", _NEGATIVES,
    ),
    "decode_gap": Kind(
        "decode_gap", "the decode gap (nats per token)", _gap,
        "below", "Task 2's decoder does not read the target's words from h_t", _WORDS,
    ),
    "content_sink": Kind(
        "collapse/content_sink", "the share of content sinks in the item encoder (percent)", _sinks,
        "above", "heads stare at single words whatever the item", _ALIKE,
    ),
}  # fmt: skip
"""What is watched, by the name under `alarm/`."""
