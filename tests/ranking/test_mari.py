"""A model whose request side runs once per request answers as the plain one, with less work.

Covers mari.py, request_side.py, row_wise.py and split_linear.py.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from karma_ray.errors import InputError
from karma_ray.ranking.mari import Report, with_request_side
from karma_ray.ranking.split_linear import SplitLinear

D, H = 6, 10


class Batch(NamedTuple):
    """R requests, N candidates, histories of T."""

    history: Tensor  # [R, T, D]
    query: Tensor  # [R, D]
    request: Tensor  # [N]
    candidate: Tensor  # [N, D]


def batch(requests: int = 3, each: int = 4, steps: int = 5, seed: int = 0) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    shapes = [(requests, steps, D), (requests, D), (requests * each, D)]
    history, query, candidate = (torch.randn(shape, generator=draw) for shape in shapes)
    request = torch.arange(requests).repeat_interleave(each)
    return Batch(history, query, request[torch.randperm(len(request), generator=draw)], candidate)


class Deep(nn.Module):
    """All side by side, then layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3 * D, H), nn.Linear(H, 1)

    def forward(self, b: Batch) -> Tensor:
        user = torch.cat([b.query, b.history.mean(1)], -1)[b.request]
        return self.last(F.relu(self.first(torch.cat([user, b.candidate], -1)))).squeeze(-1)


class Din(nn.Module):
    """Target attention over (key, item, key - item, key x item), as in 1706.06978."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.Linear(4 * D, H), nn.Sigmoid(), nn.Linear(H, 1))
        self.fusion = nn.Sequential(nn.Linear(3 * D, H), nn.PReLU(), nn.Linear(H, 1))

    def forward(self, b: Batch) -> Tensor:
        own = b.history[b.request]
        item = b.candidate.unsqueeze(1).expand(-1, own.shape[1], -1)
        weights = self.attention(torch.cat([own, item, own - item, own * item], -1))
        interest = (weights * own).sum(1)
        whole = [b.query.index_select(0, b.request), interest, b.candidate]
        return self.fusion(torch.cat(whole, -1)).squeeze(-1)


class Residual(nn.Module):
    """Layers over a request's own values after they were repeated, with two kinds of norm."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, H), nn.Linear(H, D)
        self.norm, self.batch_norm = nn.LayerNorm(D), nn.BatchNorm1d(D)
        self.last = nn.Linear(2 * D, 1)
        self.drop = nn.Dropout(0.5)

    def forward(self, b: Batch) -> Tensor:
        user = b.query[b.request]
        user = self.norm(user + self.drop(self.down(F.gelu(self.up(user)))))
        user = self.batch_norm(user)
        return self.last(torch.cat([b.candidate, user], 1)).squeeze(-1)


class Scattered(nn.Module):
    """Parts of request and candidate in turn, and one Linear used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4 * D, 4 * D)
        self.last = nn.Linear(4 * D, 1)

    def forward(self, b: Batch) -> Tensor:
        user, mean = b.query[b.request], torch.tanh(b.history.sum(1))[b.request]
        x = torch.cat([user, b.candidate, mean, b.candidate * user], -1)
        return self.last(self.mix(F.relu(self.mix(x)))).squeeze(-1)


class OneRequest(nn.Module):
    """A single request whose row is repeated by `expand`."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(2 * D, H), nn.Linear(H, 1)

    def forward(self, b: Batch) -> Tensor:
        user = b.query.expand(b.candidate.shape[0], -1)
        return self.last(torch.relu(self.first(torch.cat([user, b.candidate], -1))))


MODELS: dict[str, Callable[[], nn.Module]] = {
    model.__name__: model for model in (Deep, Din, Residual, Scattered)
}


def built(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = make().to(dtype).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    return model


def in_dtype(b: Batch, dtype: torch.dtype) -> Batch:
    return Batch(*(x if x.dtype == torch.int64 else x.to(dtype) for x in b))


def fast_of(model: nn.Module, **options) -> tuple[nn.Module, Report]:
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    return with_request_side(
        model, (in_dtype(batch(), dtype),), request_inputs=("history", "query"), **options
    )


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("name", MODELS)
def test_it_answers_as_the_plain_model_for_any_number_of_requests(name, dtype, limit) -> None:
    model = built(MODELS[name], dtype)
    fast, report = fast_of(model)
    assert report.reason is None and report.split
    for shape in [(3, 4, 5), (1, 9, 5), (7, 1, 1), (1, 1, 3), (2, 0, 4)]:
        b = in_dtype(batch(*shape, seed=1), dtype)
        for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with mode():
                torch.testing.assert_close(fast(b), model(b), rtol=limit, atol=limit)


@pytest.mark.parametrize("name", MODELS)
def test_its_gradients_are_those_of_the_plain_model(name) -> None:
    model = built(MODELS[name], torch.float64)
    fast, _ = fast_of(model)
    b = in_dtype(batch(), torch.float64)
    found = []
    for one in (model, fast):
        inputs = Batch(*(x if x.dtype == torch.int64 else x.clone().requires_grad_() for x in b))
        leaves = [*model.parameters(), inputs.history, inputs.query, inputs.candidate]
        found.append(torch.autograd.grad(one(inputs).square().sum(), leaves, allow_unused=True))
    torch.testing.assert_close(found[1], found[0], rtol=1e-11, atol=1e-12)


def test_it_follows_the_weights_when_they_change() -> None:
    model = built(Deep)
    fast, _ = fast_of(model)
    with torch.no_grad():
        before = fast(batch())
        model.first.weight.mul_(2)
        assert not torch.allclose(before, fast(batch()))
        torch.testing.assert_close(fast(batch()), model(batch()))


def test_the_work_is_that_of_the_formula() -> None:
    model = built(Deep)
    fast, report = fast_of(model)
    du, di, requests, candidates = 2 * D, D, 3, 12
    assert report.before.of(requests, candidates) == candidates * ((du + di) * H + H)
    assert report.after.of(requests, candidates) == (requests * du * H + candidates * (di * H + H))
    assert report.split == ("first",)
    for one, expected in ((model, report.before), (fast, report.after)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            one(batch())
        assert counter.get_total_flops() == 2 * expected.of(requests, candidates)


def test_target_attention_multiplies_only_the_product_for_every_step_of_every_candidate() -> None:
    model = built(Din)
    fast, report = fast_of(model)
    steps, requests, candidates = 5, 3, 12
    assert report.before.of(requests, candidates) == candidates * (
        steps * (4 * D * H + H) + 3 * D * H + H
    )
    assert report.after.of(requests, candidates) == (
        requests * (steps * D * H + D * H)
        + candidates * (steps * (D * H + H) + D * H + 2 * D * H + H)
    )
    assert report.saved(1, 1000) == pytest.approx(0.63, abs=0.02)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        fast(batch())
    assert counter.get_total_flops() == 2 * report.after.of(requests, candidates)


def test_the_parts_of_the_candidate_share_one_block_of_weights() -> None:
    found = {}
    for contiguous in (True, False):
        model = built(Scattered)
        fast, _ = fast_of(model, contiguous=contiguous)
        torch.testing.assert_close(fast(batch()), model(batch()), rtol=1e-5, atol=1e-6)
        split = next(m for m in fast.modules() if isinstance(m, SplitLinear))
        with torch.no_grad():
            found[contiguous] = [tuple(block.shape) for block in split.blocks()]
            assert all(block.is_contiguous() for block in split.blocks())
    assert found[True] == [(4 * D, 2 * D), (4 * D, 2 * D)]
    assert found[False] == [(4 * D, D)] * 4


def test_layers_over_repeated_rows_run_once_per_request() -> None:
    _, report = fast_of(built(Residual))
    assert {"up", "gelu", "down", "drop", "add", "norm", "batch_norm"} <= set(report.moved)
    assert report.after.per_request == 2 * D * H + D


def test_a_single_repeated_request_is_found_by_its_expand() -> None:
    model = built(OneRequest)
    example = batch(requests=1, each=6)
    fast, report = with_request_side(model, (example,), request_inputs=("history", "query"))
    assert report.split == ("first",)
    for each in (1, 3, 50):
        b = batch(requests=1, each=each, seed=2)
        torch.testing.assert_close(fast(b), model(b), rtol=1e-6, atol=1e-6)


class Asks(nn.Module):
    """Looks at its data, so it has no graph."""

    def forward(self, b: Batch) -> Tensor:
        return b.candidate.sum(1) if b.query.sum() > 0 else b.candidate.mean(1)


class Alone(nn.Module):
    """Reads nothing of the request."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(D, 1)

    def forward(self, b: Batch) -> Tensor:
        return self.last(b.candidate)


class InPlace(Deep):
    """Writes over what it repeated."""

    def forward(self, b: Batch) -> Tensor:
        user = b.query[b.request]
        user.mul_(2)
        return user


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Asks().eval(), "traced"), (Alone().eval(), "no operation"), (InPlace().eval(), "place"),
        (Deep().train(), "training mode"),
    ],
    ids=["asks", "alone", "in place", "training"],
)  # fmt: skip
def test_what_cannot_be_split_is_returned_unchanged_with_a_reason(model, reason) -> None:
    found, report = fast_of(model)
    assert found is model and reason in (report.reason or "")
    assert not report.split and report.saved(1, 100) == 0.0


@pytest.mark.parametrize("wrong", [{"request_inputs": ("histroy",)}, {"request_index": "page"}])
def test_an_input_that_does_not_exist_is_refused_by_name(wrong) -> None:
    options = {"request_inputs": ("history", "query"), **wrong}
    with pytest.raises(InputError, match=r"'(histroy|page)' is no input .* history, query"):
        with_request_side(built(Deep), (batch(),), **options)


class Mixing(nn.Module):
    """Everything that would be wrong if it were moved: sums over the candidates themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(2 * D, 1)

    def forward(self, b: Batch) -> Tensor:
        user = b.query[b.request]
        user = torch.softmax(user, 0) + user.mean(0, keepdim=True) + user.cumsum(0)
        scale = torch.softmax(user.sum(1), -1).unsqueeze(-1)
        first = user[0].unsqueeze(0).expand_as(user)
        return self.last(torch.cat([user * scale, b.candidate + first], -1)) + user[..., :1].max()


def test_what_mixes_candidates_stays_where_it_is() -> None:
    model = built(Mixing)
    fast, _ = fast_of(model)
    b = batch(seed=3)
    torch.testing.assert_close(fast(b), model(b), rtol=1e-6, atol=1e-6)


class Drawn(nn.Module):
    """A random architecture: operations over what there is so far, of both sides."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        self.plan: list[tuple[str, int, int]] = []
        self.layers = nn.ModuleList()
        for _ in range(draw.randint(4, 14)):
            name = draw.choice(
                ["linear", "join", "join", "add", "sub", "mul", "act", "norm", "gate", "mean"]
            )
            first, second = draw.randrange(100), draw.randrange(100)
            self.plan.append((name, first, second))
            layer = {
                "linear": nn.Linear(D, D),
                "join": nn.Linear(3 * D, D),
                "norm": nn.LayerNorm(D),
            }
            self.layers.append(layer.get(name, nn.Identity()))
        self.attention = nn.Linear(4 * D, 1)
        self.last = nn.Linear(3 * D, 1)

    def forward(self, history: Tensor, query: Tensor, request: Tensor, candidate: Tensor) -> Tensor:
        own = history[request]
        other = candidate.unsqueeze(1).expand_as(own)
        weights = self.attention(torch.cat([own * other, own, other - own, other], -1))
        known = [query[request], candidate, history.mean(1)[request], (weights * own).sum(1)]
        for (name, first, second), layer in zip(self.plan, self.layers, strict=True):
            a, b = known[first % len(known)], known[second % len(known)]
            known.append(_applied(name, layer, a, b))
        return self.last(torch.cat([known[-1], known[-2], known[1]], dim=1)).squeeze(1)


def _applied(name: str, layer: nn.Module, a: Tensor, b: Tensor) -> Tensor:
    if name == "join":
        return layer(torch.cat([a, b, a - b], -1))
    if name in ("add", "sub", "mul"):
        return {"add": a + b, "sub": a - b, "mul": 0.5 * a * b}[name]
    if name == "act":
        return torch.tanh(a)
    if name == "gate":
        return torch.sigmoid(a) * b
    return a.mean(-1, keepdim=True) + b if name == "mean" else layer(a)


@pytest.mark.parametrize("seed", range(60))
def test_any_drawn_architecture_is_exact_and_never_more_work(seed: int) -> None:
    torch.manual_seed(seed)
    model = Drawn(seed).double().eval()
    names = ("history", "query")
    example = in_dtype(batch(), torch.float64)
    fast, report = with_request_side(model, example, request_inputs=names)
    assert report.reason is None
    assert report.after.of(1, 100) <= report.before.of(1, 100)
    for shape in [(3, 4, 5), (1, 8, 2), (4, 1, 1)]:
        b = in_dtype(batch(*shape, seed=seed + 1), torch.float64)
        torch.testing.assert_close(fast(*b), model(*b), rtol=1e-10, atol=1e-10)
