"""One worker, many workers, and a batch in parts: the same loss and the same gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from karma_ray.data.batch import Batch
from karma_ray.model.karma import KarmaModel
from karma_ray.model.lora import set_encoder_trained
from karma_ray.objectives.losses import ObjectiveConfig
from karma_ray.retrieval.encode import encode_catalog
from karma_ray.training import action_term as action
from karma_ray.training.gradient_cache import micro_batches, narrow
from karma_ray.training.item_table import share_items
from karma_ray.training.meters import COUNTS
from karma_ray.training.parallel import global_sum, sum_gradients
from karma_ray.training.step import JointStep
from karma_ray.training.step_state import AT_THE_END, StepState
from tests import generating, pictures, tiny
from tests.gloo import run_workers

ROWS = [
    tiny.window(["i0", "i1", "i2"], [0, 0, 1], hard=[["i9", "i1"], ["i8"], []], user="a"),
    tiny.window(["i5", "copy"], queries=[None, "mug"], user="b"),
    tiny.window([f"i{n}" for n in range(10, 17)], loss=[False] * 5 + [True] * 2, user="c"),
    tiny.window(["i1", "i5"], hard=[["i0"], ["i7", "i6"]], user="d"),
    tiny.window(["i20", "i0", "i21", "i9"], user="e"),
]
STEP = JointStep(ObjectiveConfig())
LOGQ = JointStep(ObjectiveConfig(action_loss="infonce", logq=True))
STATE = StepState(shares=torch.linspace(0.001, 0.1, tiny.catalog().num_items))
IMAGES = JointStep(ObjectiveConfig(lambda_img=0.5))
Found = tuple[Tensor, dict[str, Tensor], dict[str, float]]


def _batch(rows: slice = slice(None)) -> Batch:
    return tiny.batch(tiny.sequences(*ROWS[rows]))


def _pictured(rows: slice = slice(None)) -> Batch:
    """With images of most items; a row's random draws stay its own wherever it goes."""
    return pictures.batch(tiny.sequences(*ROWS[rows]), first=rows.start or 0)


def _step(step: JointStep, batch: Batch, build: Callable[[], KarmaModel] = tiny.model) -> Found:
    """Global loss, summed gradients and logs of one step."""
    model, state = build(), STATE
    if step.encoder_grad == "head":
        encoder, texts = model.interest.item_encoder, tiny.item_tokens()
        set_encoder_trained(encoder, True, head_only=True)
        features = encode_catalog(model.interest, *texts, encode=encoder.features)
        state = replace(STATE, bank=torch.from_numpy(features))
    output = step(model, batch, state)
    if output.loss.requires_grad:
        output.loss.backward()
    sum_gradients(model.parameters())
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    logs = {name: float(value) for name, value in output.logs.items()}
    return global_sum(output.loss), gradients, logs


def _assert_close(found: Found, wanted: Found) -> None:
    torch.testing.assert_close(found[0], wanted[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[1], wanted[1], atol=1e-5, rtol=1e-4)
    for name, value in wanted[2].items():
        if not name.startswith("work/") and name not in COUNTS:
            assert found[2][name] == pytest.approx(value, rel=1e-4), name


# --- in parts --------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4, 100])
@pytest.mark.parametrize("micro_tokens", [0, 1, 30])
def test_a_batch_in_parts_is_the_whole_batch(micro_batch_size: int, micro_tokens: int) -> None:
    parts = JointStep(
        ObjectiveConfig(), micro_batch_size=micro_batch_size, micro_tokens=micro_tokens
    )
    _assert_close(_step(parts, _batch()), _step(STEP, _batch()))


@pytest.mark.parametrize(
    "changes",
    [
        {"encoder_grad": "targets_only"},
        {"encoder_grad": "frozen"},
        {"encoder_grad": "head"},
        {"objective": ObjectiveConfig(generation=0.0, reconstruction=0.0)},
        {"objective": ObjectiveConfig(act_positions="last", action_loss="infonce")},
        {"objective": LOGQ.objective},
    ],
)
def test_every_variant_of_the_step_goes_in_parts(changes: dict[str, Any]) -> None:
    options = {"objective": ObjectiveConfig(), **changes}
    parts = JointStep(**options, micro_batch_size=2, micro_tokens=30)
    _assert_close(_step(parts, _batch()), _step(JointStep(**options), _batch()))


@pytest.mark.parametrize(("layout", "query_mode"), tiny.VARIANTS)
def test_every_layout_goes_in_parts(layout: str, query_mode: str) -> None:
    def build() -> KarmaModel:
        return tiny.model(layout, query_mode, recon_cond="fig1")

    parts = JointStep(ObjectiveConfig(), micro_batch_size=2, micro_tokens=30)
    _assert_close(_step(parts, _batch(), build), _step(STEP, _batch(), build))


@pytest.mark.parametrize("head", ["fm", "mse"])
@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_the_visual_term_goes_in_parts(head: str, micro_batch_size: int) -> None:
    def build() -> KarmaModel:
        return pictures.model(imagery={"img_head": head})

    parts = replace(IMAGES, micro_batch_size=micro_batch_size, micro_tokens=30)
    _assert_close(_step(parts, _pictured(), build), _step(IMAGES, _pictured(), build))


def test_the_encoders_random_numbers_are_replayed() -> None:
    """Gradients are those of the vectors that the users saw, dropout and all."""

    def build() -> KarmaModel:
        model = tiny.model()
        for layer in model.interest.item_encoder.body.layers:  # type: ignore[union-attr]
            layer.self_attn.attention_dropout = 0.5
        torch.manual_seed(7)
        return model.train()

    # One chunk on both sides, so that both draw alike.
    parts = JointStep(ObjectiveConfig(), micro_batch_size=2, micro_tokens=10_000)
    batch = _batch()
    order = batch.item_lengths.argsort(stable=True)
    sorted_batch = replace(
        batch, **{f"item_{name}": getattr(batch, f"item_{name}")[order]
                  for name in ("rows", "tokens", "lengths", "content")},
        item_index=order.argsort()[batch.item_index], hard_index=order.argsort()[batch.hard_index],
    )  # fmt: skip
    found, wanted = _step(parts, sorted_batch, build), _step(STEP, sorted_batch, build)
    _assert_close(found, wanted)
    assert float(found[0]) != float(_step(STEP, batch)[0])
    torch.manual_seed(7)
    model = build()
    before = torch.get_rng_state()
    JointStep(ObjectiveConfig())(model, sorted_batch)
    plain = torch.get_rng_state()
    torch.set_rng_state(before)
    parts(model, sorted_batch)
    assert torch.equal(plain, torch.get_rng_state())  # the replay leaves the stream alone


def test_scores_in_pieces_are_the_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _step(STEP, _batch())
    monkeypatch.setattr(action, "MAX_PAIRS", 1)
    _assert_close(_step(STEP, _batch()), whole)


def test_parts_hold_every_window_once_and_near_equal_lengths_together() -> None:
    batch = _batch()
    parts = [part for part, _ in micro_batches(batch, 2)]
    assert [part.num_windows for part in parts] == [2, 2, 1]
    assert [part.step_mask.shape[1] for part in parts] == [2, 4, 7]
    assert sum(int(part.loss_mask.sum()) for part in parts) == int(batch.loss_mask.sum())


def test_a_narrowed_batch_is_the_batch_collated_alone() -> None:
    rows = torch.tensor([3, 1])
    part, used = narrow(_batch(), rows)
    alone = tiny.batch(tiny.sequences(ROWS[3], ROWS[1]))
    for name in ("item_mask", "step_mask", "loss_mask", "hard_mask", "group"):
        width = alone.step_mask.shape[1]
        assert torch.equal(getattr(part, name)[:, :width], getattr(alone, name)), name
    items = part.item_rows[part.item_index][part.item_mask]
    assert torch.equal(items, alone.item_rows[alone.item_index][alone.item_mask])
    assert torch.equal(part.item_rows, _batch().item_rows[used])


# --- on several workers ----------------------------------------------------------------------


SHARES = {2: (slice(0, 2), slice(2, 5)), 3: (slice(0, 1), slice(1, 2), slice(2, 5))}
STEPS = {
    "whole": STEP,
    "parts": JointStep(ObjectiveConfig(), micro_batch_size=2, micro_tokens=30),
    "frozen": JointStep(ObjectiveConfig(), encoder_grad="frozen", micro_batch_size=1),
    "targets_only": JointStep(ObjectiveConfig(), encoder_grad="targets_only"),
    "head": JointStep(ObjectiveConfig(), encoder_grad="head"),
    "head_in_parts": JointStep(ObjectiveConfig(), encoder_grad="head", micro_batch_size=2),
    "logq": LOGQ,
    "logq_in_parts": replace(LOGQ, micro_batch_size=2, micro_tokens=30),
}
GENERATED = {
    "generator": STEP,
    "generator_in_parts": JointStep(ObjectiveConfig(gen_mode="replace"), micro_batch_size=2),
}
PICTURED = {"images": IMAGES, "images_in_parts": replace(IMAGES, micro_batch_size=1)}


def _worker(rank: int, size: int) -> dict[str, Any]:
    batch = _batch(SHARES[size][rank])
    found: dict[str, Any] = {name: _step(step, batch) for name, step in STEPS.items()}
    pictured = _pictured(SHARES[size][rank])
    found |= {name: _step(step, pictured, pictures.model) for name, step in PICTURED.items()}
    found |= {name: _step(step, pictured, generating.model) for name, step in GENERATED.items()}
    shared = share_items(batch)
    found["own"] = shared.batch.item_rows[shared.own]
    return found


@pytest.fixture(scope="module", params=[2, 3])
def workers(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """What each worker found."""
    return run_workers(_worker, request.param, request.param)


@pytest.mark.parametrize("name", list(STEPS))
def test_many_workers_are_one_worker(workers: list[dict[str, Any]], name: str) -> None:
    wanted = _step(STEPS[name], _batch())
    for found in workers:
        _assert_close(found[name], wanted)


@pytest.mark.parametrize("name", list(PICTURED))
def test_many_workers_are_one_worker_with_images(workers: list[dict[str, Any]], name: str) -> None:
    wanted = _step(PICTURED[name], _pictured(), pictures.model)
    for found in workers:
        _assert_close(found[name], wanted)


@pytest.mark.parametrize("name", list(GENERATED))
def test_many_workers_are_one_worker_with_a_generator(
    workers: list[dict[str, Any]], name: str
) -> None:
    whole = replace(GENERATED[name], micro_batch_size=0)
    wanted = _step(whole, _pictured(), generating.model)
    for found in workers:
        _assert_close(found[name], wanted)


def test_every_item_is_encoded_by_one_worker(workers: list[dict[str, Any]]) -> None:
    encoded = torch.cat([found["own"] for found in workers])
    assert sorted(encoded.tolist()) == _batch().item_rows.tolist()
    sizes = [len(found["own"]) for found in workers]
    assert max(sizes) - min(sizes) <= 1


def test_a_wrong_gather_order_would_be_noticed(workers: list[dict[str, Any]]) -> None:
    """The losses above are not blind to which vector belongs to which item."""
    model, batch = tiny.model(), _batch()
    items = model.interest.encode_items(batch.item_tokens, batch.item_lengths)
    step = JointStep(ObjectiveConfig())
    count = step._counts(batch)
    pool = share_items(batch).pool

    def loss(vectors: Tensor) -> float:
        candidates = action.Pool(vectors[pool], batch.item_content[pool])
        return float(step._sums(model, batch, vectors, vectors, candidates, count, AT_THE_END)[1])

    assert loss(items) == pytest.approx(float(workers[0]["whole"][0]), rel=1e-4)
    assert abs(loss(items.roll(1, 0)) - loss(items)) > 1e-2
