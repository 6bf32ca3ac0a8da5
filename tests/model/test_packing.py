"""Packed == padded == one at a time, in values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from karma_ray.model import packing
from karma_ray.model.backbone import build_tiny, run_body
from karma_ray.model.packing import Packing
from karma_ray.objectives.losses import ObjectiveConfig
from karma_ray.training.step import JointStep
from tests import tiny

LENGTHS = (5, 1, 7, 3)


def _body() -> nn.Module:
    body = build_tiny(tiny.BODY, 320, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in body.parameters():
            value.add_(0.1 * torch.randn(value.shape, generator=generator))
    return body


def _padded() -> tuple[Tensor, Tensor]:
    soft = torch.randn(4, 7, 32, generator=torch.Generator().manual_seed(2))
    return soft, torch.arange(7) < torch.tensor(LENGTHS)[:, None]


def _never(real: Tensor) -> bool:
    return False


def _gradients(body: nn.Module, states: Tensor) -> list[Tensor]:
    wanted = torch.randn(states.shape, generator=torch.Generator().manual_seed(3))
    trained = [value for value in body.parameters() if value.requires_grad]
    found = torch.autograd.grad((states * wanted).sum(), trained, allow_unused=True)
    return [value for value in found if value is not None]


@pytest.mark.parametrize("masked", [False, True])
def test_packed_is_padded_is_one_at_a_time(masked: bool) -> None:
    body, (soft, real) = _body(), _padded()
    visible = None
    if masked:  # the first token is hidden from every third
        visible = torch.ones(7, 7, dtype=torch.bool).tril().expand(4, 7, 7).clone()
        visible[:, ::3, 0] = False
        visible[:, 0, 0] = True
    packed = run_body(body, soft, visible, real=real)[real]
    padded = run_body(body, soft, visible)[real]
    alone = torch.cat([
        run_body(body, soft[row : row + 1, :size],
                 None if visible is None else visible[row : row + 1, :size, :size])[0]
        for row, size in enumerate(LENGTHS)
    ])  # fmt: skip
    wanted = _gradients(body, packed)
    for other in (padded, alone):
        torch.testing.assert_close(other, packed, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(_gradients(body, other), wanted, atol=1e-4, rtol=1e-4)


def test_the_layers_see_the_real_tokens_only() -> None:
    body, (soft, real) = _body(), _padded()
    seen: list[tuple[int, ...]] = []
    layers: list[nn.Module] = list(body.layers)  # type: ignore[arg-type]
    for layer in layers:
        layer.mlp.register_forward_hook(  # type: ignore[union-attr]
            lambda module, inputs, output: seen.append(tuple(output.shape))
        )
    run_body(body, soft, real=real)
    assert seen == [(1, sum(LENGTHS), 32)] * 2


def test_what_padding_holds_changes_nothing() -> None:
    body, (soft, real) = _body(), _padded()
    other = soft.masked_fill(~real[..., None], 1e6)
    assert torch.equal(
        run_body(body, soft, real=real)[real], run_body(body, other, real=real)[real]
    )


def test_spread_and_collect_are_each_others_inverse_and_gradient() -> None:
    soft, real = _padded()
    plan = Packing(real)
    assert torch.equal(plan.spread(plan.collect(soft)), soft * real[..., None])
    assert plan.starts.tolist() == [0, 5, 6, 13, 16]
    tokens = torch.randn(16, 2, dtype=torch.float64, requires_grad=True)
    grid = torch.randn(4, 7, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(plan.spread, tokens)
    assert torch.autograd.gradcheck(plan.collect, grid)


def test_without_any_real_token_the_layers_still_run() -> None:
    body, (soft, real) = _body(), _padded()
    assert torch.isfinite(run_body(body, soft, real=torch.zeros_like(real))).all()


@pytest.mark.parametrize(("layout", "query_mode"), tiny.VARIANTS)
@pytest.mark.parametrize("recon_cond", ["eq7", "fig1"])
def test_a_packed_step_is_a_padded_step(
    monkeypatch: pytest.MonkeyPatch, layout: str, query_mode: str, recon_cond: str
) -> None:
    karma = tiny.model(layout, query_mode, recon_cond=recon_cond)
    batch = tiny.batch(tiny.sequences(
        tiny.window(["i0", "i1", "i2"], [0, 0, 1], hard=[["i9", "i1"], ["i8"], []], user="a"),
        tiny.window(["i5"], queries=[None], user="b"),
        tiny.window([f"i{n}" for n in range(10, 17)], loss=[False] * 5 + [True] * 2, user="c"),
    ))  # fmt: skip
    step = JointStep(ObjectiveConfig())
    loss = step(karma, batch).loss
    packed = tiny.gradients(karma, loss)
    monkeypatch.setattr(packing, "worth_packing", _never)
    padded_loss = step(karma, batch).loss
    padded = tiny.gradients(karma, padded_loss)
    torch.testing.assert_close(loss, padded_loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(packed, padded, atol=1e-4, rtol=1e-4)
