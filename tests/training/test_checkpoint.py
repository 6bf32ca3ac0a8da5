from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from karma_ray.artifacts import read_json, write_json
from karma_ray.errors import InputError
from karma_ray.training.checkpoint import (
    Progress,
    load_checkpoint,
    load_weights,
    save_checkpoint,
    save_weights,
)
from karma_ray.training.loop import fit
from karma_ray.training.optim import build_optimizer
from karma_ray.training.step import StepOutput


class _Tied(nn.Module):
    """Dropout uses torch's random state; head and embedding share their weight."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, width)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(width, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, ids: Tensor) -> Tensor:
        scores: Tensor = self.head(self.dropout(self.embedding(ids)) * self.scale)
        return scores


def _step(model: nn.Module, ids: Tensor) -> StepOutput:
    return StepOutput(nn.functional.cross_entropy(model(ids).float(), ids.roll(1)), {})


def _start(width: int = 6) -> tuple[_Tied, torch.optim.Optimizer]:
    torch.manual_seed(3)
    model = _Tied(width)
    return model, build_optimizer(model, learning_rate=1e-2)


def _batches(generator: np.random.Generator, count: int) -> list[Tensor]:
    return [torch.from_numpy(generator.integers(0, 11, size=8)) for _ in range(count)]


def _train(model: nn.Module, optimizer: Any, batches: list[Tensor], start: int) -> list[float]:
    losses: list[float] = []
    fit(
        model,
        _step,
        optimizer,
        batches,
        lambda record: losses.append(record["loss/total"]),
        steps=start + len(batches),
        start_step=start,
        schedule=lambda step: 1.0 / (1 + step),
        report_every=1,
    )
    return losses


def test_a_resumed_training_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    model, optimizer = _start()
    generator = np.random.default_rng(5)
    _train(model, optimizer, _batches(generator, 4), 0)
    save_checkpoint(tmp_path, model, optimizer, Progress(4, 1, 2), generator=generator)
    expected = _train(model, optimizer, _batches(generator, 4), 4)

    resumed, fresh_optimizer = _start()
    other = np.random.default_rng(99)
    torch.manual_seed(1234)
    progress = load_checkpoint(tmp_path, resumed, fresh_optimizer, generator=other)
    assert progress == Progress(4, 1, 2)
    assert _train(resumed, fresh_optimizer, _batches(other, 4), 4) == expected
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name])


def test_a_checkpoint_with_other_optimiser_groups_is_an_input_error(tmp_path: Path) -> None:
    model, optimizer = _start()
    save_checkpoint(tmp_path, model, optimizer, Progress(1))
    state = read_json(str(tmp_path / "state.json"))
    for group in state["optimizer"]["groups"]:
        del group["start"]  # as an earlier version wrote it
    write_json(state, str(tmp_path / "state.json"))
    with pytest.raises(InputError, match="another optimiser's groups"):
        load_checkpoint(tmp_path, model, optimizer)


def test_every_random_state_comes_back(tmp_path: Path) -> None:
    model, optimizer = _start()
    generator = np.random.default_rng(1)
    save_checkpoint(tmp_path, model, optimizer, Progress(0), generator=generator)
    expected = (torch.rand(2).tolist(), random.random(), generator.random())
    load_checkpoint(tmp_path, model, optimizer, generator=generator)
    assert (torch.rand(2).tolist(), random.random(), generator.random()) == expected


def test_only_the_first_rank_writes_weights(tmp_path: Path) -> None:
    model, optimizer = _start()
    save_checkpoint(tmp_path, model, optimizer, Progress(0), rank=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "random-1.json",
        "random-1.safetensors",
    ]


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    model, _ = _start()
    save_weights(str(tmp_path), model)
    other = _Tied()
    load_weights(str(tmp_path), other)
    assert torch.equal(other.embedding.weight, model.embedding.weight)
    assert other.head.weight is other.embedding.weight


def test_another_architecture_is_an_input_error(tmp_path: Path) -> None:
    model, optimizer = _start()
    save_checkpoint(tmp_path, model, optimizer, Progress(0))
    wider, wider_optimizer = _start(width=7)
    with pytest.raises(InputError, match="another architecture"):
        load_checkpoint(tmp_path, wider, wider_optimizer)
