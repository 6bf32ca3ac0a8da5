"""Checkpoints without pickle: safetensors for tensors, JSON for everything else.

    FOLDER/ model.safetensors  optimizer.safetensors  state.json   written by rank 0
            random-<rank>.safetensors  random-<rank>.json          written by every rank

Tensors that share storage (tied embeddings, a backbone used twice) are written once; the other
names are aliases in state.json. A checkpoint restores bit by bit, so a resumed training equals
an uninterrupted one.
"""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, load_file, save, save_file
from torch import Tensor, nn

from karma_ray.artifacts import join, open_filesystem, read_json, write_json
from karma_ray.errors import InputError


@dataclass(frozen=True)
class Progress:
    """How far a training came; `batches` of `epoch` are consumed."""

    step: int
    epoch: int = 0
    batches: int = 0
    extra: dict[str, Any] = field(default_factory=dict)


def save_checkpoint(
    folder: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    *,
    generator: np.random.Generator | None = None,
    rank: int = 0,
) -> None:
    """Write this rank's part of a checkpoint into a local folder."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    _save_random(target, generator, rank)
    if rank != 0:
        return
    weights, aliases = distinct_tensors(model)
    save_file(weights, target / "model.safetensors")
    tensors, plain = _flatten_optimizer(optimizer)
    save_file(tensors, target / "optimizer.safetensors")
    state = {"progress": asdict(progress), "aliases": aliases, "optimizer": plain}
    write_json(state, str(target / "state.json"))


def load_checkpoint(
    folder: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    generator: np.random.Generator | None = None,
    rank: int = 0,
) -> Progress:
    """Restore model, optimiser and this rank's random states in place.

    A rank that the checkpoint does not know (more workers than before) keeps its own random
    state. Raises InputError when the weights are those of another architecture.
    """
    source = Path(folder)
    state = read_json(str(source / "state.json"))
    weights = load_file(source / "model.safetensors")
    _restore(model, weights, state["aliases"], str(folder))
    slots = load_file(source / "optimizer.safetensors")
    _load_optimizer(optimizer, slots, state["optimizer"], str(folder))
    if (source / f"random-{rank}.json").exists():
        _load_random(source, generator, rank)
    return Progress(**state["progress"])


def save_weights(folder: str, model: nn.Module) -> None:
    """Write `folder/model.safetensors` and its aliases; `folder` may be a URI."""
    fs, path = open_filesystem(folder)
    fs.makedirs(path, exist_ok=True)
    weights, aliases = distinct_tensors(model)
    with fs.open(f"{path}/model.safetensors", "wb") as sink:
        sink.write(save(weights))
    write_json(aliases, join(folder, "aliases.json"))


def load_weights(folder: str, model: nn.Module) -> None:
    """Restore what `save_weights` wrote; raises InputError on another architecture."""
    fs, path = open_filesystem(folder)
    aliases = read_json(join(folder, "aliases.json"))
    with fs.open(f"{path}/model.safetensors", "rb") as source:
        weights = load(source.read())
    _restore(model, weights, aliases, folder)


def distinct_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """State dict with every storage once, and alias name -> name that holds the values."""
    owners: dict[tuple[Any, ...], str] = {}
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, tensor in model.state_dict().items():
        key = (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        if tensor.numel() and key in owners:
            aliases[name] = owners[key]
            continue
        owners[key] = name
        # A slice of a larger storage is copied: safetensors refuses partial overlaps.
        whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        owned = tensor.detach() if whole else tensor.detach().clone()
        tensors[name] = owned.cpu().contiguous()
    return tensors, aliases


def _restore(
    model: nn.Module, weights: dict[str, Tensor], aliases: dict[str, str], source: str
) -> None:
    complete = weights | {name: weights[owner] for name, owner in aliases.items()}
    try:
        model.load_state_dict(complete, strict=True)
    except RuntimeError as error:
        detail = " ".join(str(error).split())[:400]
        message = f"holds weights of another architecture ({detail})"
        raise InputError("checkpoint", source, message) from None


def _flatten_optimizer(
    optimizer: torch.optim.Optimizer,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for index, slots in state["state"].items():
        for name, value in slots.items():
            key = f"{index}/{name}"
            if isinstance(value, Tensor):
                tensors[key] = value.detach().cpu().contiguous()
            else:
                values[key] = value
    return tensors, {"values": values, "groups": state["param_groups"]}


def _load_optimizer(
    optimizer: torch.optim.Optimizer,
    tensors: dict[str, Tensor],
    plain: dict[str, Any],
    source: str,
) -> None:
    # Moments belong to parameters by their place: other groups would take each other's.
    shapes = [[(sorted(group), len(group["params"])) for group in groups]
              for groups in (optimizer.state_dict()["param_groups"], plain["groups"])]  # fmt: skip
    if shapes[0] != shapes[1]:
        raise InputError("checkpoint", source, "has another optimiser's groups; start a new run")
    slots: dict[int, dict[str, Any]] = {}
    for key, value in [*tensors.items(), *plain["values"].items()]:
        index, name = key.split("/", 1)
        slots.setdefault(int(index), {})[name] = value
    groups = [
        # JSON knows no tuples; AdamW's betas are one.
        {name: tuple(v) if name == "betas" else v for name, v in group.items()}
        for group in plain["groups"]
    ]
    optimizer.load_state_dict({"state": slots, "param_groups": groups})


def _save_random(target: Path, generator: np.random.Generator | None, rank: int) -> None:
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    save_file(tensors, target / f"random-{rank}.safetensors")
    numpy_state = None if generator is None else generator.bit_generator.state
    states = {"python": random.getstate(), "numpy": numpy_state}
    (target / f"random-{rank}.json").write_text(json.dumps(states), encoding="utf-8")


def _load_random(source: Path, generator: np.random.Generator | None, rank: int) -> None:
    tensors = load_file(source / f"random-{rank}.safetensors")
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
    states = json.loads((source / f"random-{rank}.json").read_text(encoding="utf-8"))
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    if generator is not None and states["numpy"] is not None:
        generator.bit_generator.state = states["numpy"]
