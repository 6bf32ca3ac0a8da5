"""The collapse alarm: bounds on the metrics of every report, and advice that usually helps.

A crossed bound is reported once per run and kind: as a warning, as `alarm/KIND` in the record (with
the bound as its value), and in the report. Training continues; the alarm decides nothing.

The bounds come from runs on the toy shop and `hm` (docs/diagnosis.md). In healthy runs the
effective rank was at least a third of the width for e and a sixth for h, and cosines were below
0.6. Collapsed runs fell to a twelfth, or to cosines above 0.9, within tens of steps. Healthy runs
also cross a bound briefly: h in the first steps, e when its encoder starts to learn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # processes that only read records need no torch
    from torch import nn

PATIENCE = 3
"""Number of consecutive reports beyond a bound before the alarm is raised."""
LEAST_RANK_E = 0.1
"""Smallest effective rank of e, as a share of the width (or of the number of items, if less)."""
LEAST_RANK_H = 0.05
"""Smallest effective rank of h, which needs fewer dimensions than the items it selects."""
MOST_COSINE = 0.9
"""Largest mean cosine of two different items or interests; parallel vectors rank by noise."""
LEAST_NEGATIVES = 0.25
"""Smallest share of the pool of positives that a step keeps as negatives (in the known failure of
masks on live embeddings it fell from 108 to 2, method 1.5)."""
KEPT_GAP, NOTABLE_GAP = 0.2, 0.1
"""A decode gap that reached 0.1 nats per token must keep a fifth of its highest value."""
LEAST_GAP = 0.02
"""Smallest gap in nats per token in the second half of training; below it h_t has no text."""
MORE_SINKS = 25.0
"""Percentage points that content sinks may rise above their lowest value, since a checkpoint may
already have some."""

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
    "few negatives make the loss small although nothing is learnt"
)

Bound = Callable[["Alarm", float, Mapping[str, Any]], float | None]
"""(state, value, record) -> the bound that the value has crossed, or None."""


@dataclass(frozen=True)
class Kind:
    """One metric that is watched."""

    key: str
    """Name in the record."""
    name: str
    """Name in messages."""
    bound: Bound
    side: str
    """`below` or `above`."""
    meaning: str
    helps: str


@dataclass
class Alarm:
    """The state of the alarm: what a training's reports have shown so far."""

    width: int
    """D of e and h."""
    steps: int
    """Steps of the whole training."""
    told: set[str] = field(default_factory=set)
    highest: dict[str, float] = field(default_factory=dict)
    lowest: dict[str, float] = field(default_factory=dict)
    in_a_row: dict[str, int] = field(default_factory=dict)
    """Number of latest consecutive reports that cross the bound of a kind."""

    @classmethod
    def of(cls, model: nn.Module, steps: int, lines: Iterable[Mapping[str, Any]]) -> Alarm | None:
        """Create the alarm of a joint training, from the `lines` written so far, if it has one."""
        interest = getattr(model, "interest", None)
        if interest is None:
            return None
        alarm = cls(int(interest.learned_width), steps)
        for line in lines:
            alarm(line)
        return alarm

    def __call__(self, record: Mapping[str, Any]) -> dict[str, float]:
        """Return `alarm/KIND` -> crossed bound, for kinds that were not reported before."""
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
        """Return the largest effective rank that the vectors of a report can have."""
        return min(float(self.width), float(record.get("negatives/pool", math.inf)))


def messages(line: Mapping[str, Any], *, with_help: bool = True) -> list[str]:
    """Return the alarms in a line of metrics.jsonl as sentences."""
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
        "below", "items differ in a few directions only", _ALIKE,
    ),
    "effective_rank_h": Kind(
        "collapse/effective_rank_h", "the effective rank of the interests h", _rank(LEAST_RANK_H),
        "below", "all users get the same few interests", _ALIKE,
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
        "below", "Task 2's decoder cannot read the target's text from h_t", _WORDS,
    ),
    "content_sink": Kind(
        "collapse/content_sink", "the share of content sinks in the item encoder (percent)", _sinks,
        "above", "attention heads focus on single tokens whatever the item is", _ALIKE,
    ),
}  # fmt: skip
"""The watched metrics, by their name under `alarm/`."""
