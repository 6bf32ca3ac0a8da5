"""SASRec and HSTU over ids: the networks' formulas, what h may see, learning, export."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from karma_ray.baselines.hstu import HstuBlock
from karma_ray.baselines.sasrec import SasRecBlock
from karma_ray.baselines.sequential import IdModel, IdRecommender, IdSizes
from karma_ray.data.catalog import Catalog
from karma_ray.errors import InputError
from karma_ray.evaluation.checks import hidden_item_effect
from karma_ray.model.config import IdModelConfig, ModelConfig, ScoreConfig
from karma_ray.objectives.losses import ObjectiveConfig
from karma_ray.retrieval.encode import encode_catalog
from karma_ray.retrieval.export import load_bundle, save_bundle
from karma_ray.retrieval.retriever import Retriever
from karma_ray.training.action_step import ActionStep
from karma_ray.training.gradient_cache import narrow
from karma_ray.training.step import JointStep
from karma_ray.training.step_state import StepState
from tests import tiny

KINDS = ("sasrec", "hstu")
both_kinds = pytest.mark.parametrize("kind", KINDS)
IDS = IdModelConfig(width=16, num_layers=2, num_heads=2, dropout=0.0)
ALONE = ObjectiveConfig(lambda_dec=0.0)


def recommender(kind: str, seed: int = 0, ids: IdModelConfig = IDS) -> IdRecommender:
    """Wide enough that attention attends, and that every part differs."""
    config = ModelConfig(kind=kind, ids=ids, score=ScoreConfig(scale=10.0))  # type: ignore[arg-type]
    words = tiny.tokenizer().backend_tokenizer.get_vocab_size()
    model = IdRecommender(config, IdSizes(tiny.catalog().num_items, words, 21), seed)
    model.know(tiny.catalog().item_ids)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.3 * torch.randn(value.shape, generator=generator))
    return model.eval()


def trainee(kind: str) -> IdModel:
    return IdModel(recommender(kind), tiny.tokenizer())


def encoded(model: IdRecommender, batch) -> Tensor:
    return model.encode_items(batch.item_tokens, batch.item_lengths, batch.item_rows)


def test_a_block_of_sasrec_is_the_paper_s_formula() -> None:
    torch.manual_seed(0)
    block, x = SasRecBlock(replace(IDS, num_heads=1)), torch.randn(1, 5, 16)
    visible = torch.ones(5, 5).tril().bool()
    normed = functional.layer_norm(x[0], (16,), eps=1e-8)
    query, key, value = (normed @ part.weight.T for part in (block.query, block.key, block.value))
    wanted = []
    for row in range(5):
        weights = torch.stack([query[row] @ key[j] / math.sqrt(16) for j in range(row + 1)])
        y = x[0, row] + (weights.softmax(0)[:, None] * value[: row + 1]).sum(0)
        hidden = block.inner(functional.layer_norm(y, (16,), eps=1e-8)).clamp(min=0)
        wanted.append(y + block.outer(hidden))
    torch.testing.assert_close(block(x, visible[None])[0], torch.stack(wanted))


def test_a_block_of_hstu_is_the_paper_s_formula() -> None:
    torch.manual_seed(0)
    block, x, silu = HstuBlock(replace(IDS, num_heads=1), 10), torch.randn(1, 5, 16), torch.sigmoid
    with torch.no_grad():
        block.position_bias.copy_(torch.randn(10))
    order = torch.arange(5)
    normed = functional.layer_norm(x[0], (16,), eps=1e-6)
    mapped = normed @ block.f1.weight.T
    u, v, q, k = (mapped * silu(mapped)).split(16, -1)
    wanted = []
    for row in range(5):
        total = torch.zeros(16)
        for j in range(row + 1):
            a = q[row] @ k[j] + block.position_bias[row - j]
            total = total + a * silu(a) * v[j] / 10
        pooled = functional.layer_norm(total, (16,), eps=1e-6)
        wanted.append(x[0, row] + block.f2(pooled * u[row]))
    distance = (order[:, None] - order[None]).clamp(min=0)[None]
    found = block(x, torch.ones(1, 5, 5).tril().bool(), distance)
    torch.testing.assert_close(found[0], torch.stack(wanted))


@both_kinds
def test_items_that_h_must_not_see_do_not_change_it(kind: str) -> None:
    """Of later groups, and of the same page: the windows have two clicks a page."""
    effect = hidden_item_effect(recommender(kind), tiny.batch())
    assert effect == {"future_perturbation_max_abs": 0, "same_step_perturbation_max_abs": 0}


@both_kinds
def test_the_gradient_of_h_reaches_earlier_groups_alone(kind: str) -> None:
    model, batch = recommender(kind), tiny.batch()
    soft = encoded(model, batch)[batch.item_index].detach().flatten(0, 1).requires_grad_()
    windows, steps = batch.item_index.shape
    places = torch.arange(windows * steps).view(windows, steps)
    h = model.interest(replace(batch, item_index=places), soft)
    for step in range(steps):
        (gradient,) = torch.autograd.grad(h[:, step].square().sum(), soft, retain_graph=True)
        reached = gradient.view(windows, steps, -1).abs().sum(-1) > 0
        earlier = (batch.group < batch.group[:, step : step + 1]) & batch.item_mask
        exists = batch.step_mask[:, step]
        assert torch.equal(reached[exists], earlier[exists])


@both_kinds
def test_h_depends_on_its_query_and_on_the_history_s_order(kind: str) -> None:
    model = recommender(kind)

    def h(history: list[str], query: str | None) -> Tensor:
        batch = tiny.collator().requests(tiny.examples(tiny.request(history, query)))
        return model.last_interest(batch, encoded(model, batch))[0]

    start = h(["i1", "i2", "i3"], "mug")
    others = [h(["i1", "i2", "i3"], "boots"), h(["i1", "i2", "i3"], None),
              h(["i2", "i1", "i3"], "mug"), h([], "mug")]  # fmt: skip
    assert all((start - other).abs().max() > 1e-3 for other in others)
    assert torch.isfinite(h([], None)).all()


@both_kinds
def test_padding_changes_nothing(kind: str) -> None:
    model, batch = recommender(kind), tiny.batch()
    whole = model.interest(batch, encoded(model, batch))
    for row in range(batch.num_windows):
        part, _ = narrow(batch, torch.tensor([row]))
        steps = int(part.step_mask.sum())
        alone = model.interest(part, encoded(model, part))[0, :steps]
        torch.testing.assert_close(alone, whole[row, :steps], atol=1e-5, rtol=1e-5)


@both_kinds
def test_a_request_gives_the_h_of_its_step_in_training(kind: str) -> None:
    model = recommender(kind)
    ids, queries = ["i3", "i7", "i9"], ["mug", "boots", "lamp"]
    batch = tiny.batch(tiny.sequences(tiny.window(ids, queries=queries)))
    trained = model.interest(batch, encoded(model, batch))[0]
    for step in range(3):
        row = tiny.request(ids[:step], queries[step], queries=queries[:step])
        asked = tiny.collator().requests(tiny.examples(row))
        h = model.last_interest(asked, encoded(model, asked))[0]
        torch.testing.assert_close(h, trained[step], atol=1e-5, rtol=1e-5)


@both_kinds
def test_a_few_dozen_steps_lower_the_loss_and_leave_untouched_items_as_they_were(
    kind: str,
) -> None:
    model, batch, step = trainee(kind), tiny.batch(), ActionStep(ALONE)
    before = model.interest.items.weight.detach().clone()
    touched = torch.zeros(len(before), dtype=torch.bool)
    touched[batch.item_rows] = True
    losses = tiny.train(model, lambda: step(model, batch).loss, steps=40, learning_rate=1e-2)
    assert losses[-1] < 0.5 * losses[0]
    after = model.interest.items.weight.detach()
    # Weight decay shortens a vector; its direction, all that the score sees, stays.
    turned = 1 - functional.cosine_similarity(before, after)
    assert turned[touched].min() > 1e-3 and turned[~touched].max() < 1e-6
    assert not touched.all()


@both_kinds
@pytest.mark.parametrize("logq", [False, True])
def test_the_loss_is_the_one_that_karma_would_take(kind: str, logq: bool) -> None:
    """The same scores in `JointStep` without decodability give the same loss and negatives."""
    model, batch = trainee(kind), tiny.batch()
    objective = replace(ALONE, action_loss="infonce", logq=True) if logq else ALONE
    state = StepState(shares=torch.linspace(0.001, 0.1, tiny.catalog().num_items))
    found = ActionStep(objective)(model, batch, state)
    karma = tiny.model(decodes=False)
    inside = model.interest
    karma.interest.encode_items = inside.encode_items  # type: ignore[method-assign]
    karma.interest.interest = inside.interest  # type: ignore[method-assign]
    karma.interest.score = inside.score
    wanted = JointStep(objective)(karma, batch, state)
    torch.testing.assert_close(found.loss, wanted.loss)
    for name in ("loss/action", "negatives/hard_per_step", "negatives/surviving",
                 "negatives/pool", "examples"):  # fmt: skip
        assert float(found.logs[name]) == pytest.approx(float(wanted.logs[name])), name
    assert {*found.logs} <= {*wanted.logs}


@both_kinds
def test_every_parameter_learns(kind: str) -> None:
    model = trainee(kind)
    batch = tiny.batch(drop_query=0.5)
    found = tiny.gradients(model, ActionStep(ALONE)(model, batch).loss)
    assert {*found} == {name for name, _ in model.named_parameters()}
    assert all(gradient.abs().max() > 0 for gradient in found.values())


@both_kinds
def test_a_bundle_scores_as_the_model_did(kind: str, tmp_path: Path) -> None:
    model, uri = recommender(kind), str(tmp_path / "bundle")
    collator, catalog = tiny.collator(), tiny.catalog()
    save_bundle(model, tiny.tokenizer(), collator.config, uri)
    bundle = load_bundle(uri)
    table = tiny.examples(tiny.request(["i1", "i4"], "mug"), tiny.request([], None))
    scores = [
        Retriever.from_model(
            some, collator, catalog, encode_catalog(some, *collator.catalog_tokens())
        ).score(table)
        for some in (model, bundle.interest)
    ]
    assert scores[0].shape == (2, catalog.num_items)
    np.testing.assert_array_equal(*scores)


def test_another_catalogue_is_refused(tmp_path: Path) -> None:
    model, catalog = recommender("sasrec"), tiny.catalog()
    model.attach_catalog(catalog, "here")
    moved = Catalog(catalog.table.take(pa.array([*range(1, 49), 0])))
    with pytest.raises(InputError, match=r"--data: 'there' has other items than the 49 for which"):
        model.attach_catalog(moved, "there")


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(InputError, match=r"model\.ids\.width: 16 is not a multiple of .*=3"):
        recommender("hstu", ids=replace(IDS, num_heads=3))
