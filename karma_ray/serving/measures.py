"""What the endpoint counts, in the text format of Prometheus (`/metrics`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

    from karma_ray.serving.arms import Arms
    from karma_ray.serving.prefix_cache import PrefixCache

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Measures:
    """Counters of one process."""

    def __init__(
        self, num_waiting: Callable[[], int], cache: Callable[[], PrefixCache | None],
        arms: Callable[[], Arms],
    ) -> None:  # fmt: skip
        """What is given is called when somebody asks."""
        self._registry = CollectorRegistry()
        named: Any = {"registry": self._registry}
        self.requests = Counter(
            "karma_ray_requests", "Answered requests", ["path", "status", "arm"], **named
        )
        self.seconds = Histogram(
            "karma_ray_request_seconds", "Time from the parsed request to its answer",
            ["path", "arm"], buckets=SECONDS, **named,
        )  # fmt: skip
        self.batch_size = Histogram(
            "karma_ray_batch_size", "Requests computed together", buckets=SIZES, **named
        )
        self.batch_seconds = Histogram(
            "karma_ray_batch_seconds", "Time of the compute thread for a batch",
            buckets=SECONDS, **named,
        )  # fmt: skip
        self.rank_seconds = Histogram(
            "karma_ray_rank_seconds", "Time of a stage of /v1/rank for a batch", ["stage"],
            buckets=SECONDS, **named,
        )  # fmt: skip
        self.swaps = Counter(
            "karma_ray_swaps", "Publications that were taken over, or failed", ["result"], **named
        )
        for result in ("done", "failed"):  # from 0, so that the first one is seen as a rise
            self.swaps.labels(result)
        self._arms = Gauge(
            "karma_ray_arm_share", "Share of the users that an arm answers, and with what",
            ["arm", "model_version", "index_version"], **named,
        )  # fmt: skip
        waiting = Gauge("karma_ray_waiting", "Requests that no batch has taken yet", **named)
        waiting.set_function(num_waiting)
        self._histories = Gauge(
            "karma_ray_histories", "Histories that were stored whole, in part, or not at all",
            ["stored"], **named,
        )  # fmt: skip
        self._cache_bytes = Gauge(
            "karma_ray_history_bytes", "Memory of the stored keys and values", **named
        )
        self._cache, self._now, self._shown = cache, arms, set[tuple[str, ...]]()

    def batch(self, size: int, seconds: float) -> None:
        """Note a batch."""
        self.batch_size.observe(size)
        self.batch_seconds.observe(seconds)

    def answered(self, path: str, status: int, seconds: float, arm: str = "") -> None:
        """Note an answered request."""
        self.requests.labels(path, status, arm).inc()
        self.seconds.labels(path, arm).observe(seconds)

    def refused(self, path: str, status: int) -> None:
        """Note a request that was refused before it was read."""
        self.requests.labels(path, status, "").inc()

    def text(self) -> bytes:
        """Return all of it."""
        self.families()
        return generate_latest(self._registry)

    def families(self) -> list[Metric]:
        """Return all of it, by name, as it is now."""
        cache = self._cache()
        if cache is not None:
            for name in ("whole", "part", "none"):
                self._histories.labels(name).set(getattr(cache.counts, name))
            self._cache_bytes.set(cache.num_bytes)
        shares = {(arm.name, *arm.engine.version.values()): arm.share for arm in self._now().arms}
        for gone in self._shown - shares.keys():
            self._arms.remove(*gone)
        for labels, share in shares.items():
            self._arms.labels(*labels).set(share)
        self._shown = set(shares)
        return list(self._registry.collect())
