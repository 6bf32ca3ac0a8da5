"""Publishing under traffic: no request fails, no answer is mixed, and the last word counts."""

from __future__ import annotations

import gc
import itertools
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from karma_ray.artifacts import read_manifest
from karma_ray.errors import SkewError
from karma_ray.retrieval.index_build import index_run
from karma_ray.retrieval.kinds import InvertedLists
from karma_ray.retrieval.retriever import Retriever
from karma_ray.serving.app import build_app
from karma_ray.serving.following import Follower, load_engine
from karma_ray.serving.live import live_file, read_live
from karma_ray.serving.publishing import publish, roll_back
from karma_ray.serving.service import Service
from tests import tiny_run

CACHE = 2**20


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[str]:
    roots = [tmp_path_factory.mktemp(f"run{seed}") for seed in range(2)]
    return [tiny_run.write_run(root, seed) for seed, root in enumerate(roots)]


@pytest.fixture
def let(tmp_path: Path) -> Callable[..., str]:
    counter = itertools.count()

    def do(run: str, **options) -> str:
        folder = str(tmp_path / "live")
        publish(folder, run, now="now", fresh=lambda: f"{next(counter)}", force=True, **options)
        return folder

    return do


def versions(run: str) -> tuple[str, str]:
    bundle, index = (read_manifest(f"{run}/{part}")["content_hash"] for part in ("bundle", "index"))
    return bundle, index


def of_answer(found: dict) -> tuple[str, str]:
    return found["model_version"], found["index_version"]


class Followed:
    """A service that looks at its pointer when it is told."""

    def __init__(self, folder: str) -> None:
        self.follower = Follower(folder, lambda arm: load_engine(arm, CACHE))
        self.service = Service(self.follower.arms, cache_bytes=CACHE, max_waiting=1000)

    def look(self) -> None:
        self.follower.look(self.service.swap, self.service.measures)


@pytest.fixture
def followed(runs, let) -> Iterator[Followed]:
    found = Followed(let(runs[0]))
    yield found
    found.service.close()


def test_a_stream_of_requests_meets_no_failure_and_no_mixture(runs, let, followed) -> None:
    expected = {
        versions(run): [
            (item.item_id, item.score)
            for item in Retriever.load(run).recall("red mug", [], 5).items
        ]
        for run in runs
    }
    answers: list[tuple[bool, int, dict]] = []  # begun after the last swap, status, answer
    stop, swapped = threading.Event(), threading.Event()

    with TestClient(build_app(followed.service)) as client:

        def ask() -> None:
            while not stop.is_set():
                after = swapped.is_set()
                answer = client.post("/v1/recall", json={"query": "red mug", "k": 5})
                answers.append((after, answer.status_code, answer.json()))

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for turn in range(6):
            let(runs[(turn + 1) % 2])
            followed.look()
        let(runs[1])
        followed.look()
        count = len(answers)
        swapped.set()
        while len(answers) < count + 40:
            stop.wait(0.01)
        stop.set()
        for thread in threads:
            thread.join()

    assert {status for _, status, _ in answers} == {200}
    for _, _, found in answers:
        items = expected[of_answer(found)]
        assert [item["item_id"] for item in found["items"]] == [name for name, _ in items]
        assert [i["score"] for i in found["items"]] == pytest.approx(
            [s for _, s in items], abs=1e-4
        )
    assert {of_answer(found) for _, _, found in answers} == set(expected)
    assert {of_answer(found) for after, _, found in answers if after} == {versions(runs[1])}


def test_a_rollback_loads_nothing_and_older_engines_are_freed(
    runs, let, followed, tmp_path
) -> None:
    first = followed.service.engine
    folder = let(runs[1])
    followed.look()
    second = weakref.ref(next(followed.service.engine.retriever.interest.parameters()))
    roll_back(folder)
    load, followed.follower._load = followed.follower._load, None
    followed.look()
    assert followed.service.engine is first and second() is not None
    followed.follower._load = load
    let(tiny_run.write_run(tmp_path, 7))
    gc.disable()  # an endpoint tells the collector to leave alone what is loaded
    try:
        followed.look()
        assert second() is None
    finally:
        gc.enable()
    assert followed.service.engine is not first


def test_clicks_of_users_survive_and_stored_histories_do_not(runs, let, followed) -> None:
    with TestClient(build_app(followed.service)) as client:
        for item in ("i3", "i21"):
            client.post("/v1/events", json={"user_id": "u", "item_id": item})
        let(runs[1])
        followed.look()
        assert followed.service.engine.cache is not None
        assert len(followed.service.engine.cache) == 0
        kept = client.post("/v1/recall", json={"user_id": "u"}).json()
        history = [{"item_id": "i3"}, {"item_id": "i21"}]
        told = client.post("/v1/recall", json={"history": history}).json()
        assert of_answer(kept) == versions(runs[1])
        ids = [[item["item_id"] for item in answer["items"]] for answer in (kept, told)]
        assert ids[0] == ids[1]


@pytest.mark.parametrize("broken", ["pointer", "gone", "run", "other model"])
def test_what_cannot_be_followed_is_logged_and_what_answers_goes_on(
    runs, let, followed, tmp_path, caplog, broken: str
) -> None:
    before = followed.service.engine
    run = tiny_run.write_run(tmp_path, 5)
    folder = let(run)
    pointer = Path(live_file(folder))
    good = pointer.read_text()
    if broken == "pointer":
        pointer.write_text(good[:50])
    elif broken == "gone":
        pointer.unlink()
    elif broken == "run":
        Path(run, "bundle", "config.json").write_text("{}")
    else:
        pointer.write_text(good.replace(versions(run)[0], "another"))
    followed.look()
    assert followed.service.engine is before
    assert "what answers goes on" in caplog.text
    assert b'karma_ray_swaps_total{result="failed"} 1.0' in followed.service.measures.text()
    with TestClient(build_app(followed.service)) as client:
        assert of_answer(client.post("/v1/recall", json={}).json()) == versions(runs[0])
        if broken in ("pointer", "gone"):
            pointer.write_text(good)
        else:
            run = runs[1]
            let(run)
        followed.look()
        assert of_answer(client.post("/v1/recall", json={}).json()) == versions(run)


def test_a_replica_that_starts_later_serves_what_was_published(tmp_path, let) -> None:
    run = tiny_run.write_run(tmp_path, 6)
    folder = let(run)
    published = read_live(folder).arms[0]
    index_run(run, InvertedLists())
    assert load_engine(published, CACHE).version == published.version
    index_run(run)  # by now the published index is gone, and the model is the same
    late = load_engine(published, CACHE).version
    assert late["model_version"] == published.model_version
    with pytest.raises(SkewError, match="publish the run again"):
        load_engine(replace(published, model_version="another"), CACHE)


def test_a_service_follows_by_itself(runs, let) -> None:
    service = Service.load(let(runs[0]), max_waiting=1000)
    with TestClient(build_app(service)) as client:
        let(runs[1])
        for _ in range(600):
            found = client.get("/v1/version").json()
            if of_answer(found) == versions(runs[1]):
                break
            time.sleep(0.1)
        assert of_answer(client.post("/v1/recall", json={}).json()) == versions(runs[1])


def test_users_of_an_arm_are_answered_by_its_run_and_told_so(runs, let, followed) -> None:
    let(runs[1], arm="new", share=0.5)
    followed.look()
    run_of = {"main": runs[0], "new": runs[1]}
    with TestClient(build_app(followed.service)) as client:
        found = {}
        for user in [None, *(f"u{n}" for n in range(40))]:
            answer = client.post("/v1/recall", json={"user_id": user})
            found[user] = answer.headers["x-karma-arm"]
            assert of_answer(answer.json()) == versions(run_of[found[user]])
            assert found[user] == followed.service.arms.of(user).name
        assert found[None] == "main" and set(found.values()) == {"main", "new"}
        arms = client.get("/v1/version").json()["arms"]
        assert [(arm["arm"], of_answer(arm)) for arm in arms] == [
            (name, versions(run)) for name, run in run_of.items()
        ]
        text = client.get("/metrics").text
    assert 'karma_ray_requests_total{arm="new",path="/v1/recall",status="200"}' in text
