"""A model's measures, put together from chunks; and collapse, planted and found."""

from __future__ import annotations

import math

import pytest
import torch

from karma_ray.errors import InputError
from karma_ray.evaluation import diagnosis
from karma_ray.evaluation.diagnosis import (
    ModelDiagnosis,
    ProbeSet,
    chosen_heads,
    content_sink,
    diagnose,
    diagnose_items,
    diagnose_words,
    shown_heads,
)
from karma_ray.evaluation.probe_sets import item_sample, vector_sample, word_sample
from karma_ray.metrics.attention import MEASURES, content_columns, sink_measures
from karma_ray.model.attention_maps import item_attention
from karma_ray.model.karma import KarmaModel
from karma_ray.objectives.losses import ObjectiveConfig
from karma_ray.training.step import JointStep
from tests import tiny
from tests.evaluation.test_probe_sets import COLD, clicks, sample


def probe_set() -> ProbeSet:
    requests = sample([2, 4, 4, 5, 6, 7, 9, 9])
    items = item_sample(tiny.collator(), tiny.catalog(), COLD, 24, seed=0)
    vectors = vector_sample(tiny.collator(), tiny.catalog(), 49, 0)
    return ProbeSet(items, vectors, requests, None, 0)


def whitened(**options: str) -> KarmaModel:
    """A model whose items have all their directions, as every run starts."""
    model = tiny.model(**options)  # type: ignore[arg-type]
    tokens, lengths = tiny.item_tokens()
    model.interest.item_encoder.whiten(
        torch.from_numpy(tokens).long(), torch.from_numpy(lengths), torch.arange(len(lengths))
    )
    return model


def measured(model: KarmaModel) -> ModelDiagnosis:
    return diagnose(model, probe_set(), JointStep(ObjectiveConfig()).probe)


@torch.no_grad()
def test_chunks_add_up_to_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model, items = tiny.model().eval(), probe_set().items
    monkeypatch.setattr(diagnosis, "CHUNK", 7)
    found = diagnose_items(model, items)
    maps = item_attention(model.interest.item_encoder, items.tokens, items.lengths)
    content = content_columns(items.template)
    for layer, weights in enumerate(maps):
        expected = sink_measures(weights, content)
        for name in MEASURES:
            mean = expected[name].nanmean(0).tolist()
            assert found.measures[name][layer].tolist() == pytest.approx(mean, rel=1e-4), name
    layer, head = found.heads[-1]
    torch.testing.assert_close(torch.from_numpy(found.mean_maps[-1]), maps[layer][:, head].mean(0))
    torch.testing.assert_close(torch.from_numpy(found.example_maps[-1]), maps[layer][0, head])


def test_every_measure_has_a_flat_key() -> None:
    metrics = measured(whitened()).metrics
    for name in MEASURES:
        for key in (f"collapse/{name}", f"collapse/user/{name}", f"collapse/{name}_l1h1"):
            assert math.isfinite(metrics[key]), key
    for name in ("effective_rank_e", "effective_rank_h", "mean_cosine_e", "mean_cosine_h",
                 "decode_gap", "decode_ce"):  # fmt: skip
        assert math.isfinite(metrics[f"collapse/{name}"])


def test_measuring_twice_gives_the_same_and_leaves_the_weights_alone() -> None:
    model = whitened()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert measured(model).metrics == measured(model).metrics
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_parallel_items_are_found() -> None:
    model = whitened()
    healthy = measured(model).metrics
    with torch.no_grad():
        model.interest.item_encoder.mean += 1000.0
    collapsed = measured(model).metrics
    assert healthy["collapse/mean_cosine_e"] < 0.2 < 0.95 < collapsed["collapse/mean_cosine_e"]
    assert collapsed["collapse/effective_rank_e"] < healthy["collapse/effective_rank_e"] / 4


def test_heads_that_look_at_one_column_only_are_found() -> None:
    model = whitened()
    healthy = measured(model).metrics
    with torch.no_grad():
        for name, value in model.interest.item_encoder.named_parameters():
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                value *= 30.0  # every row on its one favourite
    collapsed = measured(model).metrics
    assert collapsed["collapse/row_entropy"] < 0.1 < healthy["collapse/row_entropy"]
    assert collapsed["collapse/content_sink"] > healthy["collapse/content_sink"]
    assert collapsed["collapse/user/row_entropy"] == pytest.approx(
        healthy["collapse/user/row_entropy"], abs=0.2
    )


@pytest.mark.parametrize(("layout", "query_mode"), tiny.VARIANTS)
def test_every_layout_can_be_diagnosed(layout: str, query_mode: str) -> None:
    found = measured(tiny.model(layout, query_mode)).user_decoder
    assert found is not None
    named = [name for name, there in zip(found.slots, found.content, strict=True) if there]
    assert named and all(name.startswith("item ") for name in named)
    assert found.slots[-1].startswith("query")
    assert found.mean_maps.shape[1:] == (len(found.slots),) * 2


def test_an_instruction_is_no_content() -> None:
    model = tiny.model(instruction="red red red")
    found = diagnose_items(model, probe_set().items)
    count = len(model.interest.item_encoder.instruction)
    assert len(found.slots) == probe_set().items.tokens.shape[1] + count
    assert not found.content[:count].any()


def test_the_probe_of_a_report_is_the_diagnosis_of_its_items() -> None:
    model, items = tiny.model().eval(), probe_set().items
    whole = diagnose_items(model, items).measures["content_sink"].mean()
    assert content_sink(model, items) == pytest.approx(float(whole))


def test_the_papers_heads_are_shown_where_they_exist() -> None:
    assert shown_heads(28, 16) == [(9, 1), (11, 1)]
    assert shown_heads(10, 2) == [(9, 1)]
    assert shown_heads(2, 4) == [(0, 1), (1, 1)]
    assert shown_heads(1, 1) == [(0, 0)]


def test_wanted_heads_are_taken_or_refused() -> None:
    assert chosen_heads([(1, 0), (0, None)], 2, 2) == [(1, 0), (0, 0), (0, 1)]
    with pytest.raises(InputError, match=r"--layers: '9:1' .* layers 0 to 1, heads 0 to 1"):
        chosen_heads([(9, 1)], 2, 2)
    assert chosen_heads([(9, 1)], 2, 2, strict=False) == shown_heads(2, 2)


@torch.no_grad()
def test_words_of_the_click_are_read_from_the_interest_at_the_request() -> None:
    """A user decoder that passes its query on: the probe reads the words that go with it."""
    items = [f"i{n % 5}" for n in range(200)]  # the query asked is a function of the click
    found = word_sample(tiny.collator(), clicks(items), seed=0)
    assert found is not None
    model = whitened().eval()
    read = diagnose_words(model, found)
    assert read["collapse/words_from_query"] > 99.0
    assert read["collapse/words_from_h"] > 90.0
    blind = whitened(query_mode="none").eval()
    assert diagnose_words(blind, found)["collapse/words_from_h"] < 10.0
