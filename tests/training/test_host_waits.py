"""How often the host waits for the device in a training step, counted on a CPU.

Uploads are copied and marked as tensors of a device, and so is whatever is computed from them or
from parameters. An operator whose result the host must know (a number, the places where a mask is
set) would make the host wait for all work before it, and is counted if its input is marked.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from karma_ray.data import batch as batches
from karma_ray.objectives import text
from karma_ray.objectives.losses import ObjectiveConfig
from karma_ray.training.loop import fit
from karma_ray.training.optim import build_optimizer
from karma_ray.training.step import JointStep
from tests import tiny, top_layers

WAITING = {
    "_local_scalar_dense", "nonzero", "is_nonzero", "_unique2", "unique_dim", "bincount",
    "masked_select", "unique_consecutive", "equal",
}  # fmt: skip
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


def _is_marked(value: Any) -> bool:
    return isinstance(value, Tensor) and getattr(value, "marked", False)


class Waits(TorchDispatchMode):
    """Counts waits by operator and place while `on`."""

    def __init__(self) -> None:
        super().__init__()
        self.on, self.found = False, Counter[str]()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        inputs = tree_leaves((args, kwargs or {}))
        marked = any(_is_marked(value) for value in inputs)
        if self.on and marked:
            # A mask as an index is its nonzero places, also in the backward pass.
            masked = name in INDEXING and any(
                isinstance(value, Tensor) and value.dtype == torch.bool
                for value in tree_leaves(args[1])
            )
            if masked or name in WAITING:
                self.note(name)
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if marked and isinstance(value, Tensor):
                value.marked = True
        return result

    def note(self, name: str) -> None:
        lines = [line for line in traceback.extract_stack() if "/karma_ray/" in line.filename]
        place = lines[-1]
        self.found[f"{name} in {place.filename.split('/karma_ray/')[-1]}:{place.name}"] += 1


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Waits]:
    waits = Waits()

    def copied(tensor: Tensor, device: torch.device) -> Tensor:
        moved = tensor.clone()
        moved.marked = True  # type: ignore[attr-defined]
        return moved

    def watch(name: str) -> None:
        original = getattr(Tensor, name)

        def call(self: Tensor, *arguments: Any, **options: Any) -> Any:
            if waits.on and _is_marked(self):
                waits.note(name)
            return original(self, *arguments, **options)

        monkeypatch.setattr(Tensor, name, call)

    monkeypatch.setattr(batches, "_copied", copied)
    for name in ("cpu", "numpy", "tolist"):  # not dispatched on a CPU
        watch(name)
    with waits:
        yield waits


def waits_of_a_step(
    monkeypatch: pytest.MonkeyPatch, step: JointStep, karma: Any = None
) -> Counter[str]:
    """Of one step, whose report at the end is not counted."""
    karma = karma or tiny.model()
    for value in [*karma.parameters(), *karma.buffers()]:
        value.marked = True

    def over(number: int) -> None:
        waits.on = False

    def before(model: Any, number: int, state: Any) -> Any:
        waits.on = number == 0
        return state

    with counted(monkeypatch) as waits:
        fit(
            karma, step, build_optimizer(karma, learning_rate=1e-3),
            [tiny.batch(tiny.shop(4)).to("cpu")], lambda record: None, steps=2, report_every=4,
            before_step=before, after_step=over, precision="float32",
        )  # fmt: skip
    return waits.found


def test_a_wait_is_counted(monkeypatch) -> None:
    """If uploads did not remember their originals, the plan of a step would wait for them."""
    monkeypatch.setattr(text, "host_of", lambda tensor: tensor.cpu())
    found = waits_of_a_step(monkeypatch, JointStep(ObjectiveConfig()))
    assert found["cpu in objectives/text.py:token_cross_entropy"] == 2  # one for each task
    assert found["nonzero in objectives/text.py:token_cross_entropy"] == 2


ONCE = {"tolist in training/loop.py:_backward": 1}
"""At the end of a step: whether loss terms and gradients are finite, before weights change."""


@pytest.mark.parametrize("micro", [0, 3])
@pytest.mark.parametrize("loss", ["pairwise", "infonce"])
def test_a_joint_step_waits_once(monkeypatch, micro: int, loss: str) -> None:
    step = JointStep(ObjectiveConfig(action_loss=loss), micro_batch_size=micro, micro_tokens=100)
    assert waits_of_a_step(monkeypatch, step) == ONCE


@pytest.mark.parametrize(
    ("layout", "query_mode"),
    [("interleaved", "encoder"), ("query_last", "tokens"), ("items_only", "none")],
)
def test_no_layout_waits_more_often(monkeypatch, layout: str, query_mode: str) -> None:
    karma = tiny.model(
        layout, query_mode, recon_text="shuffled", recon_token_dropout=0.2, recon_cond="fig1",
        lexical=8, pool="mean",
    )  # fmt: skip
    assert waits_of_a_step(monkeypatch, JointStep(ObjectiveConfig()), karma) == ONCE


def test_states_of_frozen_layers_are_gathered_without_waiting(monkeypatch, tmp_path) -> None:
    karma = top_layers.model()
    karma.interest.item_encoder.states = top_layers.states(karma, tmp_path / "states")
    step = JointStep(ObjectiveConfig(), micro_batch_size=3, micro_tokens=100)
    assert waits_of_a_step(monkeypatch, step, karma) == ONCE
