"""The executor of a run on Ray: Ray prepares and measures, Ray Data embeds, Ray Train trains."""

from __future__ import annotations

from karma_ray.cluster.embedding import embed_items
from karma_ray.cluster.frozen_outputs import encode_on_ray
from karma_ray.cluster.measuring import enlist_on_ray, measure_on_a_gpu
from karma_ray.cluster.occupancy import kinds_up
from karma_ray.cluster.sharding import run_on_ray
from karma_ray.cluster.training import train_on_ray
from karma_ray.runs.executor import Executor

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
