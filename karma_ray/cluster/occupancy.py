"""What runs where on a cluster, and what is waited for, as Ray's control plane says it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from ray._private import state as control
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.autoscaler.v2.sdk import get_cluster_resource_state

from karma_ray.cluster.session import joins_a_cluster
from karma_ray.runs.node_hours import this_machine

ACCELERATOR = "accelerator_type:"
LONGEST = 200
"""Characters of a job's command that are shown."""
OF_RAY = ("JobSupervisor",)
"""Actors that Ray starts for itself, beside those whose names start with an underscore."""
SHOWN = ("CPU", "GPU")
"""Resources that people count; memory and Ray's own are left out."""


@dataclass(frozen=True)
class Occupancy:
    """A moment of a cluster. Amounts are by resource name."""

    nodes: dict[str, int]
    """Machines that are up, by kind."""
    total: dict[str, float]
    """CPUs and GPUs that are up."""
    free: dict[str, float]
    """Those of them that nobody has."""
    jobs: list[str]
    """Command of every job that has not ended."""
    actors: dict[tuple[str, str], int] = field(default_factory=dict)
    """Living actors, by class and kind of machine."""
    waiting: dict[str, int] = field(default_factory=dict)
    """Demands without a place, described by what they ask for."""


def kind_of(node: Mapping[str, Any]) -> str:
    """Return a machine's kind, told from what it offers: "8 CPU, 1 GPU (A10G)" or "head"."""
    resources = node["Resources"]
    parts = [f"{resources[name]:g} {name}" for name in SHOWN if resources.get(name)]
    cards = [name.removeprefix(ACCELERATOR) for name in resources if name.startswith(ACCELERATOR)]
    text = ", ".join(parts) + (f" ({', '.join(sorted(cards))})" if cards else "")
    if "node:__internal_head__" in resources:
        return f"head, {text}" if text else "head"
    return text or "no CPU"


def kinds_up() -> dict[str, int]:
    """Return how many machines of each kind are up; none before a cluster has been joined."""
    if not joins_a_cluster():
        return this_machine()
    if not ray.is_initialized():
        return {}
    return dict(Counter(kind_of(node) for node in ray.nodes() if node["Alive"]))


def occupancy() -> Occupancy:
    """Look at the cluster that this process has joined."""
    alive = {node["NodeID"]: kind_of(node) for node in ray.nodes() if node["Alive"]}
    total, free = ray.cluster_resources(), ray.available_resources()
    mine = ray.get_runtime_context().get_job_id()
    placed = [
        (actor["ActorClassName"].rsplit(".", 1)[-1], actor["Address"]["NodeID"])
        for actor in control.actors().values()
        if actor["State"] == "ALIVE"
    ]
    actors = Counter(
        (name, alive[node])
        for name, node in placed
        if node in alive and not name.startswith("_") and name not in OF_RAY
    )
    return Occupancy(
        nodes=dict(Counter(alive.values())),
        total={name: total.get(name, 0.0) for name in SHOWN},
        free={name: free.get(name, 0.0) for name in SHOWN},
        jobs=[
            str(job.get("Entrypoint") or "a driver")[:LONGEST]
            for job in control.jobs()
            if not job["IsDead"]
            and job["JobID"] != mine
            and not str(job.get("Entrypoint")).startswith("ray::")
        ],
        actors=dict(actors),
        waiting=waiting(),
    )


def waiting() -> dict[str, int]:
    """Return the demands of tasks, actors and placement groups that have no place yet."""
    state: Any = get_cluster_resource_state(GcsClient(ray.get_runtime_context().gcs_address))
    found: Counter[str] = Counter()
    for entry in state.pending_resource_requests:
        found[_asked(entry.request.resources_bundle)] += entry.count
    for group in state.pending_gang_resource_requests:
        for request in group.requests:
            found[_asked(request.resources_bundle)] += 1
    return dict(found)


def _asked(bundle: Mapping[str, float]) -> str:
    parts = [f"{amount:g} {name}" for name, amount in sorted(bundle.items()) if name in SHOWN]
    return ", ".join(parts) or "a place without a CPU"


def screen(found: Occupancy) -> str:
    """Return the moment as text: machines, jobs, actors and demands."""
    machines = "; ".join(f"{count} x {kind}" for kind, count in sorted(found.nodes.items()))
    used = ", ".join(
        f"{found.total[name] - found.free[name]:g} of {found.total[name]:g} {name}"
        for name in SHOWN
        if found.total[name]
    )
    lines = [f"Machines up: {machines}.", f"In use: {used or 'no CPU or GPU is up'}."]
    lines += [f"Job: {command}" for command in found.jobs] or ["No other job runs."]
    lines += [f"{count} x {name} on {kind}" for (name, kind), count in sorted(found.actors.items())]
    lines += [f"Waited for: {n} x {asked}." for asked, n in sorted(found.waiting.items())]
    return "\n".join(lines if found.waiting else [*lines, "Nothing is waited for."])
