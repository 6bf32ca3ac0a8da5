"""What every run of a report is measured on, and what was measured."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from karma_ray.artifacts import content_hash, join, value_hash
from karma_ray.data.prepared import PreparedData
from karma_ray.funnel.finished import Finished
from karma_ray.funnel.matching import Matching
from karma_ray.funnel.outcomes import UserSums
from karma_ray.funnel.preranking import PreRanker, chosen_blend
from karma_ray.funnel.recall import Categories
from karma_ray.funnel.requests import Clicks
from karma_ray.funnel.sizes import Sizes

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """One stage of one run, or of none."""

    stage: str
    arm: str
    name: str
    seed: int
    sums: UserSums
    facts: dict[str, Any]


class Ground:
    """What every run of a report is measured on."""

    def __init__(self, source: PreparedData, out: str, limit: int) -> None:
        self.source, self.catalog = source, source.catalog()
        self.sizes = Sizes.of(self.catalog.num_items)
        self.valid, self.test = (
            Clicks.read(source, self.catalog, split, limit) for split in ("valid", "test")
        )
        self.matching = Matching(source, self.catalog, self.sizes, join(out, "matching"))
        self.matching.check()
        self.categories = Categories(self.catalog)
        folders = [content_hash(join(source.uri, name)) for name in ("examples", "sequences")]
        self.finished = Finished(out, value_hash([folders, asdict(self.sizes), limit]))

    @cached_property
    def blend(self) -> tuple[PreRanker, list[float]]:
        """The pre-ranker without KARMA, and its rates on validation."""
        LOG.info("pre-ranker: its blend is chosen on %d validation clicks", len(self.valid.targets))
        return chosen_blend(self.matching, self.valid)
