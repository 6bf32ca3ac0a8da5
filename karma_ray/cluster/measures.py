"""What all replicas count, among Ray's own metrics, where one scrape of each node finds it.

`/metrics` of an endpoint with several replicas is that of the replica that happens to answer. Ray
gathers what the processes of a node tell it, and puts `ray_` before each name.
"""

from __future__ import annotations

import math
import threading
import time
from typing import TYPE_CHECKING, Any

from ray.serve import metrics

if TYPE_CHECKING:
    from karma_ray.serving.measures import Measures

EVERY_S = 5.0
"""Seconds between two reports to Ray, which are made beside the requests and not for each."""


class Mirror:
    """Repeats to Ray what a replica counts. For one thread."""

    def __init__(self, measures: Measures) -> None:
        """Must be called in a replica, whose name is then a label of all."""
        self._measures = measures
        self._there: dict[str, Any] = {}
        self._told: dict[tuple[Any, ...], float] = {}

    def start(self) -> None:
        """Tell Ray again and again, in a thread that ends with the process."""
        threading.Thread(target=self._repeat, name="measures", daemon=True).start()

    def _repeat(self) -> None:
        while True:
            time.sleep(EVERY_S)
            self.tell()

    def tell(self) -> None:
        """Tell Ray what has happened since it was told last."""
        for family in self._measures.families():
            if family.type == "histogram":
                self._observe(family)
                continue
            for sample in family.samples:
                if family.type == "gauge":
                    self._metric(metrics.Gauge, family).set(sample.value, tags=sample.labels)
                elif sample.name.endswith("_total") and (new := self._new(sample)):
                    self._metric(metrics.Counter, family).inc(new, tags=sample.labels)

    def _observe(self, family: Any) -> None:
        """Ray takes no counts, so each new value of a bucket is told as the bucket's middle."""
        lower = below = 0.0
        for sample in family.samples:
            if not sample.name.endswith("_bucket"):  # the next ones are of other labels
                lower = below = 0.0
                continue
            labels, new = dict(sample.labels), self._new(sample)
            upper = float(labels.pop("le"))
            middle = (lower + upper) / 2 if math.isfinite(upper) else 2 * lower
            for _ in range(int(new - below)):
                self._metric(metrics.Histogram, family).observe(middle, tags=labels)
            lower, below = upper, new

    def _new(self, sample: Any) -> float:
        """Return by how much a sample has grown."""
        key = (sample.name, *sample.labels.items())
        before = self._told.get(key, 0.0)
        self._told[key] = sample.value
        return float(sample.value - before)

    def _metric(self, kind: Any, family: Any) -> Any:
        """Return Ray's metric of a name, with the labels of its first sample."""
        if family.name not in self._there:
            options = {}
            labels = dict(family.samples[0].labels)
            if labels.pop("le", None) is not None:
                bounds = {float(s.labels["le"]) for s in family.samples if "le" in s.labels}
                options["boundaries"] = sorted(bounds - {math.inf})
            self._there[family.name] = kind(
                family.name, family.documentation, tag_keys=tuple(labels), **options
            )
        return self._there[family.name]
