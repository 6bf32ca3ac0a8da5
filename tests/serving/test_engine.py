"""What the endpoint answers is what the retriever ranks, whatever is stored and batched."""

from __future__ import annotations

import datetime as dt
import random

import numpy as np
import pytest

from karma_ray.retrieval.filters import Filter
from karma_ray.retrieval.requests import HistoryItem, Request, request_table
from karma_ray.retrieval.retriever import Retriever
from karma_ray.serving import prefix_cache
from karma_ray.serving.engine import (
    CandidateFeatures,
    Engine,
    FeaturesCall,
    RecallCall,
    RememberCall,
    ScoreCall,
)
from karma_ray.serving.histories import window_start
from tests import tiny_run

START = dt.datetime(2024, 1, 1, tzinfo=dt.UTC)


@pytest.fixture(scope="module")
def retriever(tmp_path_factory) -> Retriever:
    return Retriever.load(tiny_run.write_run(tmp_path_factory.mktemp("engine")))


def requests_of(count: int, longest: int, seed: int = 0) -> list[Request]:
    """Random ones: unknown items, missing queries, times that are equal, unordered or missing."""
    draw = random.Random(seed)
    texts = [None, "", "red mug", "lamp", "blue chair", "scarf"]
    found = []
    for _ in range(count):
        timed = draw.random() < 0.7
        history = [
            HistoryItem(
                draw.choice([f"i{draw.randrange(40)}", "gone"]),
                draw.choice(texts),
                START + dt.timedelta(hours=draw.randrange(4)) if timed else None,
            )
            for _ in range(draw.randrange(longest + 1))
        ]
        found.append(Request(draw.choice(texts), history))
    return found


@pytest.mark.parametrize("cache_bytes", [0, 4000, 2**20], ids=["none", "a few", "all"])
def test_any_batch_of_any_requests_is_ranked_as_in_evaluation(
    retriever: Retriever, cache_bytes: int
) -> None:
    engine = Engine(retriever, cache_bytes)
    asked = requests_of(60, engine.limit)
    measured = retriever.score(request_table(asked))
    draw = random.Random(1)
    for _ in range(12):
        places = [draw.randrange(60) for _ in range(draw.randrange(1, 9))]
        answers = engine.answer([RecallCall(asked[n], 40) for n in places])
        for n, answer in zip(places, answers, strict=True):
            scores = np.array([item.score for item in answer.items])
            rows = [retriever.table.row(item.item_id) for item in answer.items]
            assert np.allclose(scores, measured[n][rows], atol=1e-4)
            assert np.all(np.diff(scores) <= 1e-5) and len(set(rows)) == 40
            assert answer.ignored_item_ids == (
                ["gone"] if any(c.item_id == "gone" for c in asked[n].history) else []
            )
    assert engine.cache is not None and engine.cache.num_bytes <= cache_bytes
    if cache_bytes == 2**20:
        assert engine.cache.counts.whole > 10 and engine.cache.counts.part > 0


def test_calls_of_all_kinds_share_a_batch(retriever: Retriever) -> None:
    engine = Engine(retriever, 2**20)
    request = Request("red mug", [HistoryItem("i3"), HistoryItem("i21"), HistoryItem("i3")])
    ids = ["i1", "nobody", "i3"]
    recalled, scored, features, remembered, excluding = engine.answer(
        [
            RecallCall(request, 40),
            ScoreCall(request, ids),
            FeaturesCall(request, ids),
            RememberCall(request),
            RecallCall(request, 5, Filter().without_history(request)),
        ]
    )
    score_of = {item.item_id: item.score for item in recalled.items}
    assert remembered is None
    assert scored.scores[1] is None
    for place in (0, 2):
        assert scored.scores[place] == pytest.approx(score_of[ids[place]], abs=1e-4)
    assert isinstance(features, CandidateFeatures) and features.features[1] is None
    others = [item.item_id for item in recalled.items if item.item_id not in ("i3", "i21")]
    assert [item.item_id for item in excluding.items] == others[:5]
    vectors = retriever.table.embeddings
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = unit[1] @ unit[[3, 21, 3]].T
    found = features.features[0]
    assert found is not None
    assert found["max"] == pytest.approx(cosines.max(), abs=1e-5)
    assert found["mean"] == found["top5_mean"] == pytest.approx(cosines.mean(), abs=1e-5)
    assert sum(found["tiers"]) == pytest.approx(1)
    last = features.features[2]
    assert last is not None and last["max"] == pytest.approx(1, abs=1e-5) and last["tiers"][9] > 0.6


def test_a_window_is_never_longer_than_in_training_and_begins_anew_with_half() -> None:
    lengths = [count - window_start(count, 5) for count in range(13)]
    assert lengths == [0, 1, 2, 3, 4, 5, 3, 4, 5, 3, 4, 5, 3]
    assert [count - window_start(count, 1) for count in range(4)] == [0, 1, 1, 1]
    for limit in (4, 50):  # where a store of clicks drops the older half, the window begins too
        assert window_start(2 * limit - 1, limit) == limit
    assert window_start(7, 0) == 7


def test_a_growing_history_runs_its_new_click_only(retriever: Retriever) -> None:
    engine = Engine(retriever, 2**20)
    clicks = [HistoryItem(f"i{n}", "lamp") for n in range(9)]
    for size in range(1, 10):
        engine.answer([RecallCall(Request("mug", clicks[:size]), 3)])
    assert engine.cache is not None
    counts = engine.cache.counts
    assert (counts.none, counts.part, counts.whole) == (3, 6, 0)  # anew at 6 and 9 clicks of 5
    engine.answer([RecallCall(Request("lamp", clicks), 3)])
    assert counts.whole == 1


def test_a_history_is_hashed_once_however_it_is_answered(retriever: Retriever, monkeypatch) -> None:
    hashed: list[int] = []
    chain = prefix_cache._chain
    monkeypatch.setattr(
        prefix_cache, "_chain", lambda steps: hashed.append(len(steps)) or chain(steps)
    )
    engine = Engine(retriever, 2**20)
    clicks = [HistoryItem(f"i{n}", "lamp") for n in range(5)]
    for size in (3, 3, 5, 0):
        engine.answer([RecallCall(Request("mug", clicks[:size]), 3)])
    assert hashed == [3, 3, 5, 0]
    assert engine.cache is not None and engine.cache.counts.part == 1 and len(engine.cache) == 2


def test_only_what_is_searched_for_gets_search_vectors(retriever: Retriever, monkeypatch) -> None:
    counts: list[int] = []
    search = retriever.interest.search_vectors
    monkeypatch.setattr(
        retriever.interest, "search_vectors",
        lambda interests, keys: counts.append(len(interests)) or search(interests, keys),
    )  # fmt: skip
    engine = Engine(retriever, 2**20)
    click = Request(None, [HistoryItem("i3")])
    assert engine.answer([RememberCall(click)]) == [None]
    mixed = engine.answer([RememberCall(click), RecallCall(click, 3), RememberCall(click)])
    assert counts == [1] and len(mixed[1].items) == 3 and mixed[0] is mixed[2] is None
    assert engine.cache is not None and engine.cache.counts.whole == 3


def test_a_request_whose_vectors_are_not_finite_fails_alone(tmp_path) -> None:
    broken = Retriever.load(tiny_run.write_run(tmp_path))
    broken.embeddings[3] = float("nan")
    engine = Engine(broken, 2**20)
    bad, good = engine.answer(
        [RecallCall(Request("mug", [HistoryItem("i3")]), 3), RecallCall(Request("mug"), 3)]
    )
    assert "not finite" in str(bad) and len(good.items) == 3
