"""What the page shows of the data that a run was trained on. For one thread; all of it is read
when somebody asks, so that a replica does not start later for it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from karma_ray.artifacts import RunFolder, join, read_json, read_manifest, read_table
from karma_ray.baselines.popularity import PopularityRanker, training_clicks
from karma_ray.baselines.ranker import Ranker
from karma_ray.data.catalog import Catalog
from karma_ray.data.fragments import list_fragments, read_fragment
from karma_ray.data.pictures import has_images
from karma_ray.data.prepared import PreparedData
from karma_ray.errors import KarmaRayError
from karma_ray.retrieval.requests import Request, request_table
from karma_ray.serving.page.thumbnails import Thumbnails

LOG = logging.getLogger(__name__)

MAX_USERS = 200
"""People of the test split that are offered."""
MAX_EXAMPLES = 20_000
"""Test examples that are read to find them."""
MAX_FLOOR_ITEMS = 200_000
"""Items beyond which no floors are shown: TF-IDF would hold gigabytes beside the model."""
NO_DATA = "The data that this run was trained on cannot be read from here."
"""Said in place of what needs them; it names no path, because anyone may read it."""


class RunData:
    """People of the test split, floors and pictures of a run."""

    def __init__(self, run: str | None) -> None:
        """`run` is its folder; None, or one whose data are gone, shows none of these."""
        self.run = run

    @cached_property
    def name(self) -> dict[str, str]:
        """The run's recipe and the name of its folder."""
        if self.run is None:
            return {"title": "This run", "folder": ""}
        folder = self.run.rstrip("/").rsplit("/", 1)[-1]
        try:
            recipe = str(read_manifest(self.run).get("recipe") or "")
        except (OSError, ValueError, KarmaRayError):
            recipe = ""
        return {"title": recipe or folder, "folder": folder if recipe else ""}

    @cached_property
    def source(self) -> PreparedData | None:
        """The prepared data, if they can be read."""
        if self.run is None:
            return None
        try:
            facts = read_json(RunFolder(self.run).path("manifest.json"))
            return PreparedData.load(str(facts["data"]))
        except (OSError, ValueError, KeyError, KarmaRayError) as error:
            LOG.info("the page shows no people and no floors: %s", error)
            return None

    @cached_property
    def catalog(self) -> Catalog | None:
        """The items with their texts."""
        return None if self.source is None else self.source.catalog()

    @cached_property
    def thumbnails(self) -> Thumbnails | None:
        """Small pictures of the items, if these have any."""
        if self.source is None or not has_images(self.source.items_uri):
            return None
        return Thumbnails(join(self.source.items_uri, "items"))

    @property
    def no_floors(self) -> str | None:
        """Why there are no floors; None if there are."""
        if self.catalog is None:
            return NO_DATA
        if self.catalog.num_items > MAX_FLOOR_ITEMS:
            return f"Floors are shown for up to {MAX_FLOOR_ITEMS:,} items."
        return None

    @cached_property
    def users(self) -> dict[str, dict[str, Any]]:
        """The last test example of people with a history, by id, in the order of ids."""
        if self.source is None:
            return {}
        folder = join(self.source.uri, "examples", "split=test")
        found: dict[str, dict[str, Any]] = {}
        left = MAX_EXAMPLES
        for part in list_fragments(folder)[0]:
            rows = read_fragment(folder, part.path, part.row_group, _COLUMNS).slice(0, left)
            left -= rows.num_rows
            for row in rows.to_pylist():
                before = found.get(row["user_id"])
                if row["history_item_ids"] and (
                    before is None or row["timestamp"] > before["timestamp"]
                ):
                    found[row["user_id"]] = row
            if left <= 0:
                break
        ids = sorted(found)
        drawn = np.random.default_rng(0).permutation(len(ids))[:MAX_USERS]
        return {ids[n]: found[ids[n]] for n in sorted(drawn.tolist())}

    @cached_property
    def _rankers(self) -> dict[str, Ranker]:
        if self.source is None or self.catalog is None or self.no_floors:
            return {}
        from karma_ray.baselines.tfidf import TfidfRanker  # two seconds, for the page alone

        columns = ["item_ids", "loss_mask"]
        windows = read_table(join(self.source.uri, "sequences"), columns=columns)
        return {
            "popularity": PopularityRanker(training_clicks(windows, self.catalog)),
            "tfidf": TfidfRanker(self.catalog),
        }

    def floors(self, request: Request, k: int, exclude: bool) -> dict[str, list[dict[str, Any]]]:
        """Return the k best items of each floor; none where all scores are 0."""
        table = request_table([request])
        clicked = {click.item_id for click in request.history} if exclude else set()
        return {
            name: self._best(ranker, table, k, clicked) for name, ranker in self._rankers.items()
        }

    def _best(
        self, ranker: Ranker, table: pa.Table, k: int, clicked: set[str]
    ) -> list[dict[str, Any]]:
        assert self.catalog is not None
        scores = ranker.score(table)[0]
        found: list[dict[str, Any]] = []
        for row in np.argsort(-scores, kind="stable")[: k + len(clicked)]:
            item_id, score = self.catalog.item_ids[row], float(scores[row])
            if score > 0 and item_id not in clicked:
                title = self.catalog.titles[row]
                found.append({"item_id": item_id, "score": score, "title": title})
        return found[:k]

    def pictures(self, item_ids: Sequence[str]) -> dict[str, str]:
        """Return small pictures as `data:` addresses, for those items that have one."""
        return {} if self.thumbnails is None else self.thumbnails.of(item_ids)


_COLUMNS = [
    "user_id", "timestamp", "query", "history_queries", "history_item_ids", "history_timestamps",
    "positive_item_id",
]  # fmt: skip
