"""What a cluster has, and what its autoscaler could add.

Ray says the first, but has no one way to learn the second. Asked in this order: the configuration
that some autoscalers report to Ray; the file that the autoscaler of `ray up` was started with, on
the head node; the RayCluster resource of Kubernetes. Where none is found, nothing can be added.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import yaml

LOG = logging.getLogger(__name__)

Resources = Mapping[str, float]
"""Amounts by name: CPU, GPU, memory in bytes, and names of a cluster's own."""
HEAD = "node:__internal_head__"
"""A resource that Ray gives to the head node alone."""
ASKING_S = 30.0
"""Time in which the head node must say what its autoscaler could add."""
UNLIMITED = 1_000_000
"""Number of nodes of a type without a limit."""
_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


@dataclass(frozen=True)
class NodeType:
    """A type of node that an autoscaler may start."""

    resources: Resources
    most: int
    """Largest number of nodes of this type."""


@dataclass(frozen=True)
class Reach:
    """How many equal workers have a place."""

    up: int
    """On the nodes that are up, if nothing else ran there."""
    more: int = 0
    """How many more there may be once the autoscaler has added nodes."""

    @property
    def possible(self) -> int:
        """The number that may come to run together."""
        return self.up + self.more


@dataclass(frozen=True)
class Supply:
    """The nodes that are up, and those that may be."""

    nodes: Sequence[Resources]
    types: Sequence[NodeType] = ()
    """Types of nodes that the autoscaler knows, the head's among them; none without one."""
    most_nodes: int = UNLIMITED
    """Largest number of nodes of all types together."""

    def reach(self, need: Resources) -> Reach:
        """Return how many workers that each need `need` have a place."""
        up = sum(_fitting(node, need) for node in self.nodes)
        room, most = self.most_nodes, 0
        for fit, kind in sorted(
            ((_fitting(kind.resources, need), kind) for kind in self.types),
            key=lambda pair: -pair[0],
        ):
            count = min(kind.most, room)
            most, room = most + fit * count, room - count
        return Reach(up, max(0, most - up))

    def smallest_beside(self, name: str, other: str) -> float:
        """Return the least amount of `other` per unit of `name` on a node that has `name`."""
        every = [*self.nodes, *(kind.resources for kind in self.types)]
        return min((n.get(other, 0.0) / n[name] for n in every if n.get(name, 0.0)), default=0.0)


def supply() -> Supply:
    """Return the supply of the cluster that this process has joined."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    nodes = [node["Resources"] for node in alive]
    reported = _reported()
    if reported is not None:
        return Supply(nodes, reported)
    found = _declared_on_head(alive)
    if found is None:
        return Supply(nodes)
    return Supply(nodes, *declared_types(found))


def declared_types(config: Mapping[str, Any]) -> tuple[list[NodeType], int]:
    """Return the node types of an autoscaler's configuration, and the most nodes of all types."""
    workers = int(config.get("max_workers", UNLIMITED))
    head = config.get("head_node_type")
    types = [
        NodeType(
            {str(key): float(amount) for key, amount in (kind.get("resources") or {}).items()},
            1 if name == head else int(kind.get("max_workers", workers)),
        )
        for name, kind in (config.get("available_node_types") or {}).items()
    ]
    return types, workers + 1


def _fitting(node: Resources, need: Resources) -> int:
    return int(min(node.get(name, 0.0) // amount for name, amount in need.items()))


def _reported() -> list[NodeType] | None:
    """Return the types of the cluster configuration that an autoscaler has reported to Ray."""
    from ray._private.state import state

    config = state.get_cluster_config()
    if config is None or not config.node_group_configs:
        return None
    return [
        NodeType(dict(group.resources), group.max_count if group.max_count >= 0 else UNLIMITED)
        for group in config.node_group_configs
    ]


def _declared_on_head(alive: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return the autoscaler's configuration, read on the head node, or None."""
    context = ray.get_runtime_context()
    heads = [node["NodeID"] for node in alive if HEAD in node["Resources"]]
    if context.get_node_id() in heads:
        return autoscaler_config(context.gcs_address)
    reading = ray.remote(num_cpus=0, resources={HEAD: 0.001})(autoscaler_config)
    try:
        found: dict[str, Any] | None = ray.get(
            reading.remote(context.gcs_address), timeout=ASKING_S
        )
        return found
    except ray.exceptions.RayError as error:
        LOG.warning("the head node does not say what may be added: %s", type(error).__name__)
        return None


def autoscaler_config(gcs_address: str) -> dict[str, Any] | None:
    """Return the configuration of the autoscaler on this node, or None if it has none."""
    try:
        if "KUBERNETES_SERVICE_HOST" in os.environ and "RAY_CLUSTER_NAME" in os.environ:
            return _of_kubernetes(os.environ["RAY_CLUSTER_NAME"])
        path = _file_of_monitor(gcs_address)
        if path is None:
            return None
        config: dict[str, Any] = yaml.safe_load(Path(path).expanduser().read_text())
        return config
    except Exception as error:  # of many libraries; without an answer nothing can be added
        LOG.warning("what the autoscaler could add is not known: %s", error)
        return None


def _file_of_monitor(gcs_address: str) -> str | None:
    """Return the file that the monitor process of this cluster was started with."""
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = process.read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it has ended, or belongs to another user
            continue
        flags = dict(word.split("=", 1) for word in words if word.startswith("--") and "=" in word)
        port = flags.get("--gcs-address", "").rpartition(":")[2]
        if port == gcs_address.rpartition(":")[2] and "--autoscaling-config" in flags:
            return flags["--autoscaling-config"]
    return None


def _of_kubernetes(name: str) -> dict[str, Any] | None:
    from ray.autoscaler._private.kuberay.node_provider import KubernetesHttpApiClient

    namespace = os.environ.get("RAY_CLUSTER_NAMESPACE") or _NAMESPACE.read_text().strip()
    return of_ray_cluster(KubernetesHttpApiClient(namespace=namespace).get(f"rayclusters/{name}"))


def of_ray_cluster(resource: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the configuration that KubeRay's autoscaler derives from a RayCluster resource."""
    from ray.autoscaler._private.kuberay.autoscaling_config import (
        _derive_autoscaling_config_from_ray_cr,
    )

    if not resource["spec"].get("enableInTreeAutoscaling"):
        return None
    config: dict[str, Any] = _derive_autoscaling_config_from_ray_cr(dict(resource))
    return config
