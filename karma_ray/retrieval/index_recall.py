"""The recall of an index against exact search: measured, promised, and raised by a knob.

Legend: I items, B queries, D width.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from karma_ray.errors import InputError
from karma_ray.retrieval.engines import Engine
from karma_ray.retrieval.exact import ExactSearch
from karma_ray.retrieval.kinds import Flat, IndexKind

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Vectors = NDArray[np.float32]

DEPTHS = (10, 50, 200)
"""Depths at which the recall of an index is measured against exact search."""
RECALL_AT = DEPTHS[-1]
"""The depth of the promised recall."""
ITEM_VECTORS, EXACT = "item vectors", "not measured: exact"
"""Queries of an index that was built without requests, and of one that needs none."""
NUM_PROBE_QUERIES = 256
"""Number of item vectors that are used as queries where there are no requests."""
DOUBLINGS = 5
"""How often a knob that nobody typed is doubled until the recall is what was promised."""


@dataclass(frozen=True)
class ProbeQueries:
    """Queries that measure the recall of an index, and what they are, for its manifest."""

    vectors: Vectors  # [B, D]
    what: str


def item_probes(vectors: Vectors) -> ProbeQueries:  # [I, D]
    """Return evenly spaced items as queries."""
    rows = np.linspace(0, len(vectors) - 1, min(NUM_PROBE_QUERIES, len(vectors))).astype(int)
    return ProbeQueries(vectors[rows], f"{len(rows)} {ITEM_VECTORS}")


def measured_recalls(
    engine: Engine, vectors: Vectors, queries: Vectors
) -> dict[int, float]:  # [I, D], [B, D]
    """Return the share of the exact top of each depth that `engine` finds.

    An item that scores as high as the last exact one counts, as duplicates are as good.
    """
    deepest = min(RECALL_AT, len(vectors))
    exact = ExactSearch(vectors).search(queries, deepest)[0]
    found = engine.search(queries, deepest)[0]
    recalls = {}
    for depth in DEPTHS:
        k = min(depth, deepest)
        least = exact[:, k - 1 : k]
        recalls[depth] = float((found[:, :k] >= least - 1e-5 * np.abs(least) - 1e-6).mean())
    return recalls


def check_recall(found: float, least: float, kind: IndexKind, what: str) -> None:
    """Raise InputError, which names the knob that helps, if a recall is below its promise."""
    if found < least and not isinstance(kind, Flat):
        now = getattr(kind, kind.knob)
        raise InputError(
            "--min-recall", least,
            f"is not reached: recall@{RECALL_AT} of this {kind.kind} index is {found:.3f} on "
            f"{what}; raise it with --kind {kind.kind} --set {kind.knob}={2 * now} (now {now})",
        )  # fmt: skip


def raised(
    engine: Engine, kind: IndexKind, vectors: Vectors, probes: ProbeQueries, least: float
) -> tuple[Engine, IndexKind, dict[int, float]]:
    """Double the knob of an engine until its recall@200 is at least `least`, or five times.

    The knob is one of the search, so nothing is built again.
    """
    recalls = measured_recalls(engine, vectors, probes.vectors)
    for _ in range(0 if isinstance(kind, Flat) else DOUBLINGS):
        if recalls[RECALL_AT] >= least:
            break
        kind = dataclasses.replace(kind, **{kind.knob: 2 * getattr(kind, kind.knob)})
        engine = engine.tuned(kind)
        recalls = measured_recalls(engine, vectors, probes.vectors)
    return engine, kind, recalls
