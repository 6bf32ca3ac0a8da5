"""What a checkpoint holds: equal on resume, keyed by names, whole weights, no pickle."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from karma_ray.errors import InputError, StorageError
from karma_ray.training.checkpoints import checkpoint
from karma_ray.training.checkpoints.checkpoint import (
    Progress,
    load_checkpoint,
    load_weights,
    save_weights,
    take_snapshot,
)
from karma_ray.training.checkpoints.store import CheckpointStore
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


def _step(model: nn.Module, ids: Tensor, *_: object) -> StepOutput:
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


def _save(folder: Path, model: nn.Module, optimizer: Any, *, step: int = 1, **more: Any) -> Path:
    store = CheckpointStore(str(folder))
    store.save(model, optimizer, Progress(step, 1, 2), **more)
    store.finish()
    return folder / f"step-{step:07d}"


def test_a_resumed_training_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    model, optimizer = _start()
    generator = np.random.default_rng(5)
    _train(model, optimizer, _batches(generator, 4), 0)
    saved = _save(tmp_path, model, optimizer, step=4, generator=generator)
    expected = _train(model, optimizer, _batches(generator, 4), 4)

    resumed, fresh_optimizer = _start()
    other = np.random.default_rng(99)
    torch.manual_seed(1234)
    progress = load_checkpoint(saved, resumed, fresh_optimizer, generator=other)
    assert progress == Progress(4, 1, 2)
    assert _train(resumed, fresh_optimizer, _batches(other, 4), 4) == expected
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name])


def test_moments_follow_their_parameters_into_other_groups(tmp_path: Path) -> None:
    model, optimizer = _start()
    _train(model, optimizer, _batches(np.random.default_rng(5), 2), 0)
    saved = _save(tmp_path, model, optimizer)
    other, _ = _start()
    single = torch.optim.AdamW([other.scale, other.embedding.weight], lr=0.1)
    load_checkpoint(saved, other, single)
    for theirs, mine in ((model.scale, other.scale), (model.head.weight, other.head.weight)):
        assert torch.equal(optimizer.state[theirs]["exp_avg"], single.state[mine]["exp_avg"])
    assert single.param_groups[0]["lr"] == 0.1


def test_a_parameter_without_moments_is_an_input_error(tmp_path: Path) -> None:
    model, _ = _start()
    saved = _save(tmp_path, model, torch.optim.AdamW([model.scale]))
    with pytest.raises(InputError, match=r"does not train the parameter embedding\.weight"):
        load_checkpoint(saved, *_start())


def test_every_random_state_comes_back(tmp_path: Path) -> None:
    model, optimizer = _start()
    generator = np.random.default_rng(1)
    saved = _save(tmp_path, model, optimizer, generator=generator)
    expected = (torch.rand(2).tolist(), random.random(), generator.random())
    load_checkpoint(saved, model, optimizer, generator=generator)
    assert (torch.rand(2).tolist(), random.random(), generator.random()) == expected


def test_only_the_first_worker_writes_what_all_of_them_hold(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(checkpoint, "rank", lambda: 1)
    names = [name for name, _ in take_snapshot(*_start(), Progress(0)).files()]
    assert names == ["random-1.safetensors", "random-1.json"]


def test_a_snapshot_does_not_follow_the_training() -> None:
    model, optimizer = _start()
    snapshot = take_snapshot(model, optimizer, Progress(0))
    before = model.scale.detach().clone()
    _train(model, optimizer, _batches(np.random.default_rng(5), 2), 0)
    assert torch.equal(snapshot.tensors["model"]["scale"], before)
    assert not torch.equal(model.scale, before)


def test_large_parts_are_split_into_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 100)
    model, optimizer = _start()
    _train(model, optimizer, _batches(np.random.default_rng(5), 2), 0)
    saved = _save(tmp_path, model, optimizer)
    assert len(list(saved.glob("model-*"))) == 2
    other, fresh = _start()
    load_checkpoint(saved, other, fresh)
    assert torch.equal(other.embedding.weight, model.embedding.weight)


def test_names_do_not_tell_how_layers_were_wrapped() -> None:
    assert checkpoint.canonical("layers.0._orig_mod.mlp.weight") == "layers.0.mlp.weight"
    assert checkpoint.canonical("a._checkpoint_wrapped_module.b") == "a.b"


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    model, _ = _start()
    save_weights(str(tmp_path), model)
    other = _Tied()
    load_weights(str(tmp_path), other)
    assert torch.equal(other.embedding.weight, model.embedding.weight)
    assert other.head.weight is other.embedding.weight


def test_another_architecture_is_an_input_error(tmp_path: Path) -> None:
    saved = _save(tmp_path, *_start())
    with pytest.raises(InputError, match="another architecture"):
        load_checkpoint(saved, *_start(width=7))
    bare = nn.Linear(3, 1, bias=False)
    with pytest.raises(InputError, match=r"another architecture \(missing: \['weight'\]"):
        load_checkpoint(saved, bare, build_optimizer(bare, learning_rate=1.0))


def test_final_weights_that_cannot_be_written_are_an_error_that_says_where(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"final weights: no access to '.*file/final'"):
        save_weights(str(tmp_path / "file" / "final"), _start()[0])
