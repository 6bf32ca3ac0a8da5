"""The content of a checkpoint, without pickle: safetensors for tensors, JSON for the rest.

    STEP/ model-RANK-of-N-K.safetensors  optimizer-RANK-of-N-K.safetensors   the rank's tensors
          random-RANK.safetensors  random-RANK.json  state.json (rank 0)     the rest
          done-RANK.json  checkpoint.json                                    store.py

* All workers write a sharded tensor, each its own rows; reading concatenates them in rank order.
  Rank 0 writes everything else. Any number of workers can read the result, sharded or not.
* Tensors that share storage (tied embeddings, a backbone used twice) are written once; their other
  names are aliases in state.json.
* Moments of the optimiser are stored under parameter names, so the parameter groups may change.
  The options of the groups are not stored; they follow from the configuration and the step.
* With the same number of workers the restored state is bitwise equal, so a resumed training
  equals an uninterrupted one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load, save
from torch import Tensor, nn

from karma_ray.artifacts import join, open_filesystem, read_json, write_json
from karma_ray.errors import InputError, StorageError
from karma_ray.node_cache import local_copy
from karma_ray.training.checkpoints.outage import reason, redacted, retried
from karma_ray.training.checkpoints.random_states import random_states, restore_random_states
from karma_ray.training.checkpoints.shards import assign, is_sharded, local_part, placed_like, whole
from karma_ray.training.parallel import rank, world_size

MARKER = "checkpoint.json"
FILE_BYTES = 512 * 1024 * 1024
"""Approximate size of a file; each file is copied once more in memory while it is written."""
WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")
"""Name parts that compiling and activation checkpointing add to parameter names."""


@dataclass(frozen=True)
class Progress:
    """How far the training has advanced; `batches` of `epoch` are consumed."""

    step: int
    epoch: int = 0
    batches: int = 0
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Snapshot:
    """One worker's part of a checkpoint, copied to CPU memory so that training can continue."""

    step: int
    rank: int
    num_workers: int
    tensors: dict[str, dict[str, Tensor]]  # `model`, `optimizer` -> name -> values
    small: dict[str, bytes]  # file name -> content

    def files(self) -> Iterator[tuple[str, bytes]]:
        """Yield file names and contents, with one file in memory at a time."""
        for kind, tensors in self.tensors.items():
            for number, names in enumerate(_batched(tensors)):
                name = f"{kind}-{self.rank:05d}-of-{self.num_workers:05d}-{number:04d}.safetensors"
                yield name, save({name: tensors[name] for name in names})
        yield from self.small.items()


def take_snapshot(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    *,
    generator: np.random.Generator | None = None,
) -> Snapshot:
    """Copy this worker's part of all states; this is not a collective."""
    kept, aliases = distinct_tensors(model)
    moments, values = _moments(model, optimizer)
    tensors = {
        kind: {
            name: local_part(tensor).to("cpu", copy=True).contiguous()
            for name, tensor in found.items()
            if rank() == 0 or is_sharded(tensor)
        }
        for kind, found in (("model", kept), ("optimizer", moments))
    }
    small = random_states(generator, rank())
    if rank() == 0:
        parameters = list(_optimised(model, optimizer))
        state = {
            "progress": asdict(progress),
            "names": list(kept),
            "aliases": aliases,
            "optimizer": {"parameters": parameters, "slots": list(moments), "values": values},
        }
        small["state.json"] = json.dumps(state).encode()
    return Snapshot(progress.step, rank(), world_size(), tensors, small)


def load_checkpoint(
    folder: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    generator: np.random.Generator | None = None,
) -> Progress:
    """Restore model, optimiser and this rank's random states in place, from a local folder.

    A rank that the checkpoint does not contain (more workers than before) keeps its own random
    state. Raises InputError when the weights belong to another architecture, or when a trained
    parameter has no moments.
    """
    source = Path(folder)
    state = read_json(str(source / "state.json"))
    files = sorted(read_json(str(source / MARKER))["files"])
    with ExitStack() as opened:
        read = _reader(opened, [source / name for name in files if name.startswith("model-")])
        _restore(model, read, state["names"], state["aliases"], str(folder))
        read = _reader(opened, [source / name for name in files if name.startswith("optimizer-")])
        _load_moments(model, optimizer, read, state["optimizer"], str(folder))
    if f"random-{rank()}.json" in files:
        restore_random_states(source, generator, rank())
    return Progress(**state["progress"])


def save_weights(folder: str, model: nn.Module) -> None:
    """Write `folder/model.safetensors` and its aliases; `folder` may be a URI.

    Every worker must call it, because sharded tensors are gathered. Rank 0 writes, waits for an
    unavailable store, and raises StorageError if the write finally fails.
    """
    kept, aliases = distinct_tensors(model)
    weights: dict[str, Tensor] = {}
    for name, tensor in kept.items():
        complete = whole(tensor)
        if rank() == 0:
            # A slice of a larger storage is copied: safetensors refuses partial overlaps.
            owned = complete.untyped_storage().nbytes() == complete.numel() * complete.itemsize
            weights[name] = (complete if owned else complete.clone()).cpu().contiguous()
    if rank() == 0:
        try:
            retried(partial(_write_weights, folder, weights, aliases))
        except Exception as error:
            raise StorageError("final weights", redacted(folder), reason(error)) from error


def load_weights(folder: str, model: nn.Module) -> None:
    """Restore weights of `save_weights`; raises InputError on another architecture."""
    here = local_copy(folder)
    aliases = read_json(join(here, "aliases.json"))
    weights = load(Path(here, "model.safetensors").read_bytes())
    _restore(model, weights.__getitem__, weights, aliases, folder)


def distinct_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the state dict with every storage once, and a map from aliases to those names.

    Both are the same on every worker, even if it holds no rows of a sharded tensor.
    """
    owners: dict[tuple[Any, ...], str] = {}
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for given, tensor in model.state_dict(keep_vars=True).items():
        name, key = canonical(given), _identity(tensor)
        if tensor.numel() and key in owners:
            aliases[name] = owners[key]
            continue
        owners[key] = name
        tensors[name] = tensor.detach()
    return tensors, aliases


def canonical(name: str) -> str:
    """Return a parameter's name without the parts added by compiling or checkpointing."""
    for part in WRAPPERS:
        name = name.replace(part, "")
    return name


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    if is_sharded(tensor):
        return (id(tensor),)
    local = local_part(tensor)
    return (local.device, local.data_ptr(), tuple(local.shape), local.stride())


def _batched(tensors: dict[str, Tensor]) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        if names and size + tensor.nbytes > FILE_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += tensor.nbytes
    if names:
        yield names


def _reader(opened: ExitStack, files: Iterable[Path]) -> Callable[[str], Tensor]:
    """Return name -> whole tensor, joined in rank order, with one tensor in memory at a time."""
    holders: dict[str, list[Any]] = {}
    for file in files:
        part = opened.enter_context(safe_open(file, framework="pt"))
        for name in part.keys():  # noqa: SIM118  (no mapping)
            holders.setdefault(name, []).append(part)

    def read(name: str) -> Tensor:
        parts: list[Tensor] = [holder.get_tensor(name) for holder in holders[name]]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    return read


def _restore(
    model: nn.Module,
    read: Callable[[str], Tensor],
    names: Iterable[str],
    aliases: dict[str, str],
    source: str,
) -> None:
    targets = {canonical(name): tensor for name, tensor in model.state_dict().items()}
    saved = {*names, *aliases}
    if saved != targets.keys():
        message = (
            f"holds weights of another architecture (missing: {sorted(targets.keys() - saved)[:5]},"
            f" unknown: {sorted(saved - targets.keys())[:5]})"
        )
        raise InputError("checkpoint", source, message)
    for name, target in targets.items():
        value = read(aliases.get(name, name))
        if value.shape != target.shape:
            message = (
                f"holds weights of another architecture ({name} has shape {tuple(value.shape)},"
                f" the model {tuple(target.shape)})"
            )
            raise InputError("checkpoint", source, message)
        assign(target, value)


def _optimised(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    """Name -> parameter, in the order of the optimiser's groups."""
    names = {id(p): canonical(name) for name, p in model.named_parameters()}
    return {names[id(p)]: p for group in optimizer.param_groups for p in group["params"]}


def _moments(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return `parameter/slot` -> tensor, and another mapping for slots with plain numbers."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for name, parameter in _optimised(model, optimizer).items():
        for slot, value in optimizer.state.get(parameter, {}).items():
            (tensors if isinstance(value, Tensor) else values)[f"{name}/{slot}"] = value
    return tensors, values


def _load_moments(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    read: Callable[[str], Tensor],
    saved: dict[str, Any],
    source: str,
) -> None:
    keys: dict[str, list[str]] = {name: [] for name in saved["parameters"]}
    for key in [*saved["slots"], *saved["values"]]:
        keys[key.rsplit("/", 1)[0]].append(key)
    state: dict[int, dict[str, Any]] = {}
    for index, (name, parameter) in enumerate(_optimised(model, optimizer).items()):
        if name not in keys:
            message = f"does not train the parameter {name}; start a new run"
            raise InputError("checkpoint", source, message)
        for key in keys[name]:
            known = key in saved["values"]
            value = saved["values"][key] if known else placed_like(parameter, read(key))
            state.setdefault(index, {})[key.rsplit("/", 1)[1]] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _write_weights(folder: str, weights: dict[str, Tensor], aliases: dict[str, str]) -> None:
    fs, path = open_filesystem(folder)
    fs.makedirs(path, exist_ok=True)
    with fs.open(f"{path}/model.safetensors", "wb") as sink:
        sink.write(save(weights))
    write_json(aliases, join(folder, "aliases.json"))
