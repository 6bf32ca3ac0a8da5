"""Runs and the pointer may lie in a store, which keeps nothing of a folder in a cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from karma_ray.artifacts import join, write_table
from karma_ray.data.schema import ITEMS
from karma_ray.node_cache import upload
from karma_ray.retrieval.delta import update_run
from karma_ray.retrieval.index_build import index_run
from karma_ray.retrieval.kinds import InvertedLists
from karma_ray.serving.following import Follower, load_engine
from karma_ray.serving.live import read_live
from karma_ray.serving.publishing import publish, roll_back
from karma_ray.serving.service import Service
from tests import tiny_run
from tests.cluster.stores import BUCKET, running_store


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with running_store(monkeypatch):
        uri = f"s3://{BUCKET}/run"
        upload(Path(tiny_run.write_run(tmp_path)), uri)
        yield uri


def test_an_index_a_new_item_and_a_rollback_are_followed_on_a_store(run, tmp_path) -> None:
    live = f"s3://{BUCKET}/live"
    names = iter("abcd")

    def let() -> dict[str, str]:
        publish(live, run, now="", fresh=lambda: next(names))
        follower.look(service.swap, service.measures)
        assert service.engine.version == read_live(live).arms[0].version
        return service.engine.version

    publish(live, run, now="", fresh=lambda: next(names))
    follower = Follower(live, lambda arm: load_engine(arm, 2**20))
    service = Service(follower.arms)
    try:
        first = service.engine.version
        index_run(run, InvertedLists())
        second = let()
        data = str(tmp_path / "data")
        rows = [*tiny_run.items_table().to_pylist(), {"item_id": "new", "title": "red mug"}]
        write_table(pa.Table.from_pylist(rows, schema=ITEMS), join(data, "items"))
        assert update_run(run, data).encoded == 1
        third = let()
        assert len({found["index_version"] for found in (first, second, third)}) == 3
        found = service.engine.retriever.recall("red mug", [], 50).items
        assert len(found) == 41 and "new" in {item.item_id for item in found}
        roll_back(live)
        follower.look(service.swap, service.measures)
        assert service.engine.version == second
    finally:
        service.close()
