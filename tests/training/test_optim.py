from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from karma_ray.errors import InputError
from karma_ray.training.optim import (
    RateMultiplier,
    build_optimizer,
    learning_rate_factor,
    set_learning_rate,
)


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(3, 3)
        self.projector = nn.Linear(3, 3)


def _by_name(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, float]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: {"rate": group["peak_lr"], "decay": group["weight_decay"]}
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def test_only_matrices_decay_and_new_modules_learn_faster() -> None:
    model = _Model()
    optimizer = build_optimizer(
        model,
        learning_rate=1e-3,
        weight_decay=0.1,
        multiplier_of=lambda name: RateMultiplier(1.0 if name.startswith("backbone") else 5.0),
    )
    assert _by_name(model, optimizer) == {
        "backbone.weight": {"rate": 1e-3, "decay": 0.1},
        "backbone.bias": {"rate": 1e-3, "decay": 0.0},
        "projector.weight": {"rate": 5e-3, "decay": 0.1},
        "projector.bias": {"rate": 5e-3, "decay": 0.0},
    }


def test_frozen_parameters_are_left_out() -> None:
    model = _Model()
    model.backbone.requires_grad_(False)
    assert set(_by_name(model, build_optimizer(model, learning_rate=1.0))) == {
        "projector.weight",
        "projector.bias",
    }


def test_nothing_to_train_is_an_input_error() -> None:
    with pytest.raises(InputError, match="no parameter to train"):
        build_optimizer(_Model().requires_grad_(False), learning_rate=1.0)


def test_the_rate_rises_linearly_then_falls_to_a_tenth() -> None:
    factors = [learning_rate_factor(step, 100, warmup_share=0.1) for step in range(101)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factors[10] == 1.0
    assert all(later <= earlier for earlier, later in itertools.pairwise(factors[10:]))
    assert factors[55] == pytest.approx(0.1 + 0.9 / 2)
    assert factors[100] == pytest.approx(0.1)


def test_every_group_keeps_its_ratio_under_the_schedule() -> None:
    optimizer = build_optimizer(
        _Model(),
        learning_rate=1.0,
        multiplier_of=lambda name: RateMultiplier(1.0 if name[0] == "b" else 3.0),
    )
    set_learning_rate(optimizer, 0.5)
    assert sorted({group["lr"] for group in optimizer.param_groups}) == [0.5, 1.5]


def test_a_delayed_group_stands_still_then_rises() -> None:
    late = RateMultiplier(0.5, start=10, rise=4)
    optimizer = build_optimizer(
        _Model(),
        learning_rate=1.0,
        multiplier_of=lambda name: late if name[0] == "p" else RateMultiplier(),
    )
    found = {}
    for step in (0, 9, 10, 11, 13, 20):
        assert set_learning_rate(optimizer, 0.8, step) == pytest.approx(0.8)
        found[step] = {group["lr"] for group in optimizer.param_groups if group["start"]}.pop()
    expected = {0: 0.0, 9: 0.0, 10: 0.1, 11: 0.2, 13: 0.4, 20: 0.4}
    assert found == pytest.approx(expected)
