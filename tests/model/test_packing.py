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


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_attention_of_a_gpu_is_the_plain_one(masked: bool, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(3, heads, 7, 8, generator=draw).to(dtype) for heads in (4, 2, 2)
    )
    visible = torch.ones(7, 7, dtype=torch.bool).tril().repeat(3, 1, 1)
    visible[1, 3:, 1] = not masked
    plan = Packing(torch.ones(3, 7, dtype=torch.bool), visible if masked else None)
    plain = packing._on_grid(query, key, value, plan, 0.3, 0.0)
    fused = packing._fused(query, key, value, plan.visible, 0.3, 0.0)
    torch.testing.assert_close(fused, plain, atol=1e-6 if dtype is torch.float32 else 0.02, rtol=0)


def _row_by_row(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, ends: Tensor, longest: int,
    widest: int, *, scale: float, window_size: tuple[int, int],
) -> Tensor:  # fmt: skip
    """What `varlen_attn` of PyTorch 2.11 computes: as many keys as queries, and no other option."""
    assert query.shape == key.shape == value.shape and window_size == (-1, 0)
    found = []
    for begin, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        parts = (states[begin:end].transpose(0, 1) for states in (query, key, value))
        row = torch.nn.functional.scaled_dot_product_attention(*parts, is_causal=True, scale=scale)
        found.append(row.transpose(0, 1))
    return torch.cat(found)


def test_a_kernel_without_shared_keys_gets_one_key_per_head(monkeypatch) -> None:
    monkeypatch.setattr(packing, "varlen_attn", _row_by_row)
    monkeypatch.setattr(packing, "KNOWS_SHARED_KEYS", False)
    real = torch.arange(6) < torch.tensor([[6], [2], [3]])
    plan, draw = Packing(real), torch.Generator().manual_seed(0)
    grids = [torch.randn(3, heads, 6, 8, generator=draw) for heads in (4, 2, 2)]
    packed = [plan.collect(grid.transpose(1, 2)) for grid in grids]
    plain = packing._on_grid(*grids, Packing(torch.ones_like(real)), 0.3, 0.0)
    found = packing._variable_length(*packed, plan, 0.3)
    torch.testing.assert_close(found, plan.collect(plain.transpose(1, 2)))
