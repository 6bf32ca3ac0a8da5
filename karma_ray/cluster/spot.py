"""Which machine the autoscaler starts: a spot one, or one on demand while AWS refuses spot."""

from __future__ import annotations

from typing import Any

from ray.autoscaler._private.resource_demand_scheduler import _resource_based_utilization_scorer

ON_DEMAND = "on_demand"
"""How the name of a node type ends whose machines always cost their full price."""


def spot_first(
    node_resources: dict[str, float],
    resources: list[dict[str, float]],
    node_type: str,
    *,
    node_availability_summary: Any,
) -> tuple[Any, ...] | None:
    """Return the score of starting a node of `node_type` for `resources`, None if it is no use.

    Ray's own score decides, except that a type whose last start failed (within half an hour, as Ray
    remembers it) stands behind all others, and that a tie goes to spot. Read by Ray's first
    autoscaler from RAY_AUTOSCALER_UTILIZATION_SCORER (cluster.yaml).
    """
    score = _resource_based_utilization_scorer(
        node_resources, resources, node_availability_summary=node_availability_summary
    )
    if score is None:
        return None
    spares_gpus, *fit = score
    record = node_availability_summary.node_availabilities.get(node_type)
    refused = record is not None and not record.is_available
    return (spares_gpus, not refused, *fit, not node_type.endswith(ON_DEMAND))
