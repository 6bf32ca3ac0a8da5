"""A cloud that has no spot machines, for Ray's autoscaler: its other nodes are local processes."""

from __future__ import annotations

from typing import Any

from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider
from ray.autoscaler.node_launch_exception import NodeLaunchException
from ray.autoscaler.tags import TAG_RAY_USER_NODE_TYPE


class RefusingProvider(FakeMultiNodeProvider):
    """Refuses node types named spot as AWS does, when a machine is asked for."""

    def create_node_with_resources_and_labels(
        self, node_config: Any, tags: dict[str, str], *rest: Any
    ) -> Any:
        if tags[TAG_RAY_USER_NODE_TYPE].endswith("spot"):
            raise NodeLaunchException("InsufficientInstanceCapacity", "there is no spot", None)
        return super().create_node_with_resources_and_labels(node_config, tags, *rest)
