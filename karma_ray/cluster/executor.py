"""The executor of a run on Ray: Ray prepares and measures, Ray Data embeds, Ray Train trains."""

from __future__ import annotations

from karma_ray.cluster.accelerators import CPU
from karma_ray.cluster.embedding import embed_items
from karma_ray.cluster.frozen_outputs import encode_on_ray
from karma_ray.cluster.measuring import enlist_on_ray, measure_on_a_gpu
from karma_ray.cluster.occupancy import kinds_up
from karma_ray.cluster.session import connect, joins_a_cluster
from karma_ray.cluster.sharding import run_on_ray
from karma_ray.cluster.supply import supply
from karma_ray.cluster.training import train_on_ray
from karma_ray.runs.executor import HERE, Executor

ON_RAY = Executor(
    prepare=run_on_ray,
    train=train_on_ray,
    freeze=encode_on_ray,
    embed=embed_items,
    measure=measure_on_a_gpu,
    enlist=enlist_on_ray,
    count_nodes=kinds_up,
)
"""Joins the cluster of this process, or starts a local one, when a part needs it."""


def on_other_machines() -> Executor:
    """Return ON_RAY in a cluster that has or may add several machines, and HERE elsewhere.

    For work that this process does as well on a machine of its own, but should not do on the head.
    """
    if not joins_a_cluster():
        return HERE
    connect()
    found = supply()
    return ON_RAY if len(found.nodes) > 1 or found.reach(CPU).more else HERE
