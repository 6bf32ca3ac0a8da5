"""Clouds for Ray's autoscaler whose machines are local processes: as hard to please as a real one.

Ray's own has every machine ready in a second, and refuses none.
"""

from __future__ import annotations

import time
from typing import Any

from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider
from ray.autoscaler.node_launch_exception import NodeLaunchException
from ray.autoscaler.tags import TAG_RAY_USER_NODE_TYPE

START_S = 10.0
"""Time until a machine of the slow cloud starts: longer than a demand is left unmentioned."""


class RefusingProvider(FakeMultiNodeProvider):
    """Refuses node types named spot as AWS does, when a machine is asked for."""

    def create_node_with_resources_and_labels(
        self, node_config: Any, tags: dict[str, str], *rest: Any
    ) -> Any:
        if tags[TAG_RAY_USER_NODE_TYPE].endswith("spot"):
            raise NodeLaunchException("InsufficientInstanceCapacity", "there is no spot", None)
        return super().create_node_with_resources_and_labels(node_config, tags, *rest)


class SlowProvider(FakeMultiNodeProvider):
    """Takes its time to start a machine, as every cloud does."""

    def create_node_with_resources_and_labels(self, *request: Any) -> Any:
        time.sleep(START_S)  # in a thread of the autoscaler that only starts machines
        return super().create_node_with_resources_and_labels(*request)
