"""A decoder that computes in bfloat16 finds what the one in float32 finds, or nearly."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from karma_ray.errors import InputError
from karma_ray.retrieval.retriever import Retriever
from karma_ray.serving.engine import Engine, RecallCall, ScoreCall
from karma_ray.serving.precision import chosen
from karma_ray.serving.service import Service
from tests import tiny_run
from tests.serving.test_engine import requests_of


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> str:
    return tiny_run.write_run(tmp_path_factory.mktemp("precision"))


@pytest.fixture(scope="module")
def engines(run: str) -> list[Engine]:
    return [Engine(Retriever.load(run), 2**20, name) for name in ("float32", "bfloat16")]


def test_only_the_decoders_layers_and_what_is_stored_of_histories_are_halved(engines) -> None:
    whole, half = engines
    assert (whole.precision, half.precision) == ("float32", "bfloat16")
    call = RecallCall(requests_of(1, 5, seed=3)[0], 3)
    for engine in engines:
        engine.answer([call])
    kept = [next(iter(engine.cache._states.values())).memory for engine in engines]
    assert [memory.dtype for memory in kept] == [torch.float32, torch.bfloat16]
    types = {name: value.dtype for name, value in half.retriever.interest.named_parameters()}
    halved = {name for name, dtype in types.items() if dtype == torch.bfloat16}
    layers = {n for n in types if n.startswith(("user_decoder.body.layers", "user_decoder.body.n"))}
    assert halved == layers


def test_half_precision_ranks_nearly_as_full_precision(engines) -> None:
    asked = requests_of(80, 8)
    both = [engine.answer([RecallCall(r, 10) for r in asked]) for engine in engines]
    overlaps, places = [], []
    for exact, rounded in zip(*both, strict=True):
        ids = [[item.item_id for item in answer.items] for answer in (exact, rounded)]
        overlaps.append(len(set(ids[0]) & set(ids[1])) / 10)
        places.append(ids[1].index(ids[0][0]) if ids[0][0] in ids[1] else 10)
    assert np.mean(overlaps) > 0.95 and min(overlaps) >= 0.8
    assert np.mean(np.array(places) == 0) > 0.9 and max(places) <= 2
    ids = [f"i{n}" for n in range(40)]
    scored = [
        np.array([answer.scores for answer in engine.answer([ScoreCall(r, ids) for r in asked])])
        for engine in engines
    ]
    spread = scored[0].std(1).mean()
    assert 0 < np.abs(scored[0] - scored[1]).mean() < 0.02 * spread


def test_a_stored_history_changes_no_answer_in_half_precision_either(engines) -> None:
    half = engines[1]
    fresh = Engine(half.retriever, 0, "bfloat16")
    for request in requests_of(20, 6, seed=5):
        ids = [f"i{n}" for n in range(40)]
        for size in range(len(request.history) + 1):
            part = type(request)(request.query, request.history[:size])
            grown, whole = (e.answer([ScoreCall(part, ids)])[0].scores for e in (half, fresh))
            assert np.allclose(grown, whole, atol=0.1)


def test_without_a_word_gpus_halve_and_cpus_do_not(run: str) -> None:
    assert chosen("auto", torch.device("cpu")) == "float32"
    assert chosen("bfloat16", torch.device("cpu")) == "bfloat16"
    assert chosen("float32", torch.device("cuda")) == "float32"
    with pytest.raises(InputError, match="precision"):
        chosen("half", torch.device("cpu"))
    if not torch.cuda.is_available():
        service = Service.load(run)
        assert service.engine.precision == "float32"
        service.close()
