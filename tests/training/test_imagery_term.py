"""L_img in a step: it falls, counts images only, and is absent where its weight is 0."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from karma_ray.data.draws import row_keys
from karma_ray.objectives.losses import ObjectiveConfig
from karma_ray.runs.warm_up import TokenCollate, token_table
from karma_ray.training.imagery_term import image_flops, num_images
from karma_ray.training.step import JointStep
from karma_ray.training.warmup_step import TokenBatch, WarmupStep
from tests import pictures, tiny

ACTION_ONLY = ObjectiveConfig(generation=0.0, reconstruction=0.0)
WITH_IMAGES = ObjectiveConfig(lambda_img=0.3)


def _warmup_batch(count: int = 16) -> TokenBatch:
    collate = TokenCollate(tiny.catalog(), pictures.features())
    table = token_table(tiny.catalog(), *tiny.item_tokens()).slice(0, count)
    return collate(table, row_keys(count, 0))


@pytest.mark.parametrize("head", ["fm", "ddpm_eps", "ddpm_v", "ddpm_x0", "edm", "mse"])
@pytest.mark.parametrize("more", [{}, {"img_connector": 1, "img_cond": "task2"}])
def test_thirty_steps_lower_the_image_term(head: str, more: dict[str, Any]) -> None:
    karma = pictures.model(imagery={"img_head": head, **more})
    batch, step = pictures.batch(num_decoded=2), JointStep(replace(WITH_IMAGES, lambda_img=1.0))
    before = step(karma, batch).logs
    tiny.train(karma, lambda: step(karma, batch).loss, steps=30)
    after = step(karma, batch).logs
    assert after["loss/image"] < 0.8 * before["loss/image"]
    assert after["loss/reconstruction"] < before["loss/reconstruction"]


@pytest.mark.parametrize("head", ["fm", "mse"])
def test_the_warm_up_lowers_the_image_term_from_the_item_alone(head: str) -> None:
    karma, batch = pictures.model(imagery={"img_head": head}), _warmup_batch()
    step = WarmupStep(lambda_img=1.0)
    before = step(karma, batch).logs
    tiny.train(karma, lambda: step(karma, batch).loss, steps=30)
    after = step(karma, batch).logs
    for name in ("loss/warmup", "loss/image"):
        assert after[name] < 0.9 * before[name]


def test_the_warm_up_is_the_text_and_lambda_times_the_image() -> None:
    karma, batch = pictures.model(), _warmup_batch()
    assert batch.images is not None
    plain = WarmupStep()(karma, batch)
    assert set(plain.logs) == {"loss/warmup", "tokens"}
    output = WarmupStep(lambda_img=0.3)(karma, batch)
    image = float(output.logs["loss/image"])
    assert output.loss.item() == pytest.approx(plain.loss.item() + 0.3 * image, rel=1e-5)
    items = karma.interest.encode_items(batch.tokens, batch.lengths)
    expected = karma.image_losses(items, batch.images)[batch.images.mask].mean()
    assert image == pytest.approx(expected.item(), rel=1e-5)
    absent = [row for row in range(16) if not batch.images.mask[row]]
    assert absent == [row for row in pictures.MISSING if row < 16]


def test_the_total_is_equation_9_and_terms_are_logged_raw() -> None:
    karma, batch = pictures.model(), pictures.batch()
    objective = replace(WITH_IMAGES, lambda_dec=0.5)
    logs = {k: float(v) for k, v in JointStep(objective)(karma, batch).logs.items()}
    texts = logs["loss/generation"] + logs["loss/reconstruction"]
    total = logs["loss/action"] + 0.5 * (texts + 0.3 * logs["loss/image"])
    assert logs["loss/total"] == pytest.approx(total, rel=1e-5)
    rest = JointStep(replace(objective, lambda_img=0.0))(karma, batch).logs
    for name in ("loss/action", "loss/generation", "loss/reconstruction"):
        assert logs[name] == pytest.approx(float(rest[name]), rel=1e-4)


def _gradients(karma: Any, objective: ObjectiveConfig, batch: Any) -> dict[str, Tensor]:
    return tiny.gradients(karma, JointStep(objective)(karma, batch).loss)


def test_without_its_weight_loss_and_gradients_are_those_of_action_only_bit_by_bit() -> None:
    plain = _gradients(tiny.model(decodes=False), ACTION_ONLY, tiny.batch())
    for objective in (ACTION_ONLY, replace(WITH_IMAGES, lambda_dec=0.0)):
        found = _gradients(pictures.model(decodes=False), objective, pictures.batch())
        assert found.keys() == plain.keys()
        for name, value in found.items():
            assert torch.equal(value, plain[name]), name


def test_only_images_are_counted() -> None:
    karma, batch = pictures.model(), pictures.batch()
    assert 0 < int(num_images(batch)) < int(batch.decode_mask.sum())
    items = karma.interest.encode_items(batch.item_tokens, batch.item_lengths)
    losses = karma.forward_with_images(batch, items, text=True)[2]
    logs = JointStep(WITH_IMAGES)(karma, batch).logs
    expected = losses[losses != 0].mean()
    assert float(logs["image/task1"]) == pytest.approx(expected.item(), rel=1e-5)


def test_a_batch_without_any_image_has_no_image_loss_and_keeps_its_graph() -> None:
    karma, batch = pictures.model(), pictures.batch()
    blank = replace(batch, visual_mask=torch.zeros_like(batch.visual_mask))
    output = JointStep(WITH_IMAGES)(karma, blank)
    assert float(output.logs["loss/image"]) == 0
    found = tiny.gradients(karma, output.loss)
    assert all(value.isfinite().all() for value in found.values())
    for name, _ in karma.named_parameters():
        if name.startswith("imagery."):
            assert name in found and not found[name].any()


@torch.no_grad()
def test_more_draws_are_the_same_loss_with_less_noise() -> None:
    batch = pictures.batch()

    def losses(draws: int) -> list[float]:
        step = JointStep(WITH_IMAGES)
        karma = pictures.model(imagery={"img_draws": draws})
        keys = [replace(batch, row_key=batch.row_key + 1000 * n) for n in range(24)]
        return [float(step(karma, other).logs["loss/image"]) for other in keys]

    one, many = torch.tensor(losses(1)), torch.tensor(losses(16))
    assert float(many.std()) < 0.5 * float(one.std())
    assert float(many.mean()) == pytest.approx(float(one.mean()), rel=0.1)


def test_half_precision_leaves_the_loss_in_float32_and_about_the_same() -> None:
    karma, batch = pictures.model(imagery={"img_connector": 1}), pictures.batch()
    exact = JointStep(WITH_IMAGES)(karma, batch).logs["loss/image"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = JointStep(WITH_IMAGES)(karma, batch)
    assert output.loss.dtype == torch.float32
    assert float(output.logs["loss/image"]) == pytest.approx(float(exact), rel=0.05)


def test_the_probe_says_whether_the_head_listens_to_h() -> None:
    karma, batch = pictures.model(imagery={"img_head": "mse"}), pictures.batch(num_decoded=2)
    step = JointStep(replace(WITH_IMAGES, generation=0.0, lambda_img=3.0))
    before = step.probe(karma, batch)["image_gap"]
    tiny.train(karma, lambda: step(karma, batch).loss, steps=100)
    assert step.probe(karma, batch)["image_gap"] > max(0.2, 2 * abs(before))
    assert "image_gap" not in step.probe(tiny.model(), tiny.batch())


def test_the_visual_terms_operations_are_about_what_the_counter_says() -> None:
    karma, batch = pictures.model(), pictures.batch()
    assert image_flops(tiny.model(), tiny.batch()) == 0
    totals = []
    for objective in (ObjectiveConfig(), WITH_IMAGES):
        with FlopCounterMode(display=False) as counter:
            JointStep(objective)(karma, batch).loss.backward()  # type: ignore[no-untyped-call]
        totals.append(counter.get_total_flops())
    # Padding and logits are in the difference too.
    assert image_flops(karma, batch) == pytest.approx(totals[1] - totals[0], rel=0.5)


def test_a_warm_up_batch_moves_with_its_images() -> None:
    batch = _warmup_batch(4).to("cpu")
    assert batch.images is not None
    keys = batch.images.key.numpy()
    assert len(np.unique(keys)) == 4
