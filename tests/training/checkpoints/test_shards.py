"""Checkpoints of sharded models over other numbers of workers: real gloo processes, FSDP2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from karma_ray.artifacts import read_json
from karma_ray.training.checkpoints.checkpoint import (
    Progress,
    load_checkpoint,
    load_weights,
    save_weights,
)
from karma_ray.training.checkpoints.shards import is_sharded
from karma_ray.training.checkpoints.store import CheckpointStore
from tests.gloo import leave, start_workers

STEPS = 3


class _Tiny(nn.Module):
    """Rows that four workers cannot share evenly (7, 5 and 2), tied weights, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 5)
        self.inner = nn.Linear(5, 5)
        self.few = nn.Linear(5, 2)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.full((5,), 1.5))

    def forward(self, ids: Tensor) -> Tensor:
        states = torch.tanh(self.inner(self.embedding(ids))) * self.scale
        scores: Tensor = self.head(states)
        return scores + self.few(states).sum(-1, keepdim=True) * torch.arange(7)


def _built(workers: int, sharded: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(workers)  # every start has other weights: what is equal was restored
    model = _Tiny()
    if sharded:
        mesh = init_device_mesh("cpu", (workers,))
        fully_shard(model.inner, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int) -> list[float]:
    """The same batch on every worker, so that the number of workers changes nothing."""
    losses = []
    for step in range(first, first + STEPS):
        ids = (torch.arange(6) * (step + 2)) % 7
        loss = nn.functional.cross_entropy(model(ids), ids.roll(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def _whole(tensors: Any) -> dict[str, Tensor]:
    return {
        name: (t.full_tensor() if is_sharded(t) else t).detach().clone()
        for name, t in tensors.items()
    }


def _part(rank: int, folder: str, workers: int, sharded: bool, first: int) -> None:
    torch.set_num_threads(1)
    if workers > 1 or sharded:
        method = f"file://{folder}/group-{first}"
        dist.init_process_group("gloo", init_method=method, rank=rank, world_size=workers)
    model, optimizer = _built(workers, sharded)
    store = CheckpointStore(f"{folder}/steps", keep=9)
    found = store.restore(lambda local: load_checkpoint(local, model, optimizer))
    assert (found.step if found else 0) == first
    started = _whole(model.state_dict())
    losses = _train(model, optimizer, first)
    store.save(model, optimizer, Progress(first + STEPS))
    store.finish()
    assert store.failed == []
    save_weights(f"{folder}/final-{first}", model)
    ended = _whole(model.state_dict())
    moments = {n: optimizer.state[p]["exp_avg"] for n, p in model.named_parameters()}
    ended |= {f"exp_avg/{name}": value for name, value in _whole(moments).items()}
    if rank == 0:
        torch.save((started, ended, losses), f"{folder}/found-{first}.pt")
    leave()


def _run(folder: Path, workers: int, sharded: bool, first: int) -> Any:
    start_workers(_part, workers, str(folder), workers, sharded, first)
    return torch.load(folder / f"found-{first}.pt", weights_only=False)


@pytest.mark.parametrize(
    "chain",
    [
        [(4, True), (2, True), (1, False), (2, True)],
        [(2, False), (3, True), (1, True), (2, False)],
    ],
    ids=["sharded-first", "replicated-first"],
)
def test_a_checkpoint_is_resumed_on_another_number_of_workers(
    tmp_path: Path, chain: list[tuple[int, bool]]
) -> None:
    before: dict[str, Tensor] | None = None
    losses: list[float] = []
    for place, (workers, sharded) in enumerate(chain):
        started, ended, found = _run(tmp_path, workers, sharded, place * STEPS)
        if before is not None:
            for name, tensor in started.items():
                assert torch.equal(tensor, before[name]), name
        before = ended
        losses += found
        final = _Tiny()
        load_weights(str(tmp_path / f"final-{place * STEPS}"), final)
        for name, tensor in final.state_dict().items():
            assert torch.equal(tensor, ended[name]), name
    # As if one worker had done it all: moments and steps came along, too.
    torch.manual_seed(chain[0][0])
    whole = _Tiny()
    optimizer = torch.optim.AdamW(whole.parameters(), lr=0.1)
    expected = [loss for n in range(len(chain)) for loss in _train(whole, optimizer, n * STEPS)]
    torch.testing.assert_close(losses, expected, rtol=1e-3, atol=1e-4)


def test_every_worker_writes_its_rows(tmp_path: Path) -> None:
    _run(tmp_path, 2, True, 0)
    manifest = read_json(str(tmp_path / f"steps/step-{STEPS:07d}/checkpoint.json"))
    assert manifest["num_workers"] == 2
    sizes = {
        name: facts["size"] for name, facts in manifest["files"].items() if name.startswith("model")
    }
    assert list(sizes) == [f"model-{rank:05d}-of-00002-0000.safetensors" for rank in (0, 1)]
    assert min(sizes.values()) > 0.5 * max(sizes.values())
