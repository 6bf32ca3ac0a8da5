"""One training step, with one optimisation turned off or timed part by part, by patching.

Turning an optimisation off leaves the mathematics as it is (`engine.py equality`).

Legend: B windows, T steps, U items, R rows, S prefix slots, K text slots, M decoded positions,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.engine_workload import Workload
from karma_ray.data.batch import Batch
from karma_ray.model import decodability, karma, packing
from karma_ray.model.backbone import run_body, token_embeddings
from karma_ray.model.decodability import TextTargets
from karma_ray.model.interest import InterestModel
from karma_ray.model.karma import KarmaModel
from karma_ray.model.layers import RMSNorm
from karma_ray.model.user_decoder import Prefix
from karma_ray.objectives import text
from karma_ray.training import step as training_step
from karma_ray.training.placement import bodies
from karma_ray.training.step import Step


@dataclass(frozen=True)
class Variant:
    """What is different while a step runs, and what batch it gets."""

    patched: Callable[[], AbstractContextManager[Any]] = nullcontext
    batch: Callable[[Batch], Batch] = lambda batch: batch


def one_use_each(batch: Batch) -> Batch:
    """Every use of an item, and of a query, is an item or query of its own.

    Uses keep the order of their items, so that the pool keeps the same representatives.
    """
    masks = [batch.item_mask, batch.hard_mask]
    used = torch.cat([batch.item_index[masks[0]], batch.hard_index[masks[1]]])
    order = used.argsort(stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    items, hard = (torch.zeros_like(i) for i in (batch.item_index, batch.hard_index))
    count = int(masks[0].sum())
    items[masks[0]], hard[masks[1]] = places[:count], places[count:]
    query = batch.query_index[batch.step_mask]
    queries = torch.zeros_like(batch.query_index)
    queries[batch.step_mask] = torch.arange(len(query), device=query.device)
    rows = used[order]
    return replace(
        batch,
        item_rows=batch.item_rows[rows],
        item_tokens=batch.item_tokens[rows],
        item_lengths=batch.item_lengths[rows],
        item_content=batch.item_content[rows],
        item_index=items,
        hard_index=hard,
        query_tokens=batch.query_tokens[query],
        query_lengths=batch.query_lengths[query],
        query_index=queries,
    )


def padded() -> AbstractContextManager[Any]:
    """Layers run on padding too."""
    return patch.object(packing, "worth_packing", lambda real: False)


def rows_of_their_own() -> AbstractContextManager[Any]:
    """Task 1 without the shared prefix: each text has its own copy of the history."""
    return patch.object(karma, "history_to_text", _copied_prefixes)


@contextmanager
def logits_everywhere() -> Iterator[None]:
    """Logits at every slot of both decoding tasks, at once; the loss picks its targets."""
    stack: list[Tensor] = []  # Task 1 runs first and its loss is taken last

    def recorded(*arguments: Any, **options: Any) -> Tensor:
        stack.append(run_body(*arguments, **options))
        return stack[-1]

    def dense(states: Tensor, head: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        everything = stack.pop()  # [B or R, slots], texts stand last
        kept = labels.masked_fill(~mask, -100).view(len(everything), -1)
        missing = everything.shape[1] - kept.shape[1]
        wanted = functional.pad(kept, (missing, 0), value=-100)
        logits = (everything @ head.T.to(everything.dtype)).float()
        values = functional.cross_entropy(
            logits.flatten(0, 1), wanted.flatten(), ignore_index=-100, reduction="none"
        )
        return values.view(wanted.shape)[:, missing:].reshape(mask.shape)

    with (
        patch.object(decodability, "run_body", recorded),
        patch.object(training_step, "token_cross_entropy", dense),
    ):
        yield


def fused_attention() -> AbstractContextManager[Any]:
    """PyTorch's fused attention where ours takes plain products (on a CPU)."""
    return patch.object(packing, "_on_grid", _fused)


def stock_norms() -> AbstractContextManager[Any]:
    """Norms as transformers writes them: float32 out, many passes; rotation follows in float32."""
    return patch.object(RMSNorm, "forward", _stock_norm)


def stock_cross_entropy() -> AbstractContextManager[Any]:
    """PyTorch's cross-entropy of logits turned to float32."""
    return patch.object(text, "_chunk", _stock_chunk)


OFF: dict[str, Variant] = {
    "dedup": Variant(batch=one_use_each),
    "packing": Variant(padded),
    "prefix": Variant(rows_of_their_own),
    "logits": Variant(logits_everywhere),
    "attention": Variant(fused_attention),
    "norms": Variant(stock_norms),
    "cross_entropy": Variant(stock_cross_entropy),
}
"""Optimisation -> the engine without it."""


def compiled(model: KarmaModel) -> Variant:
    """The engine with compiled layers, as `training.compile` makes them."""
    layers = [layer for body in bodies(model) for layer in body.layers]
    for layer in layers:
        layer.compile(dynamic=True)
    calls = [layer._compiled_call_impl for layer in layers]

    def switch(on: bool) -> None:
        for layer, call in zip(layers, calls, strict=True):
            layer._compiled_call_impl = call if on else None

    @contextmanager
    def patched() -> Iterator[None]:
        switch(True)
        try:
            yield
        finally:
            switch(False)

    switch(False)
    return Variant(patched)


def train_step(
    work: Workload, model: KarmaModel, optimizer: torch.optim.Optimizer, step: Step, batch: Batch
) -> float:
    """Seconds of one whole training step."""
    started = work.now()
    optimizer.zero_grad(set_to_none=True)
    output = work.forward(model, step, batch)
    if output.loss.requires_grad:
        torch.autograd.backward(output.loss)
    nn.utils.clip_grad_norm_(model.parameters(), work.config.training.grad_clip)
    optimizer.step()
    work.finish()
    return work.now() - started


def breakdown(
    work: Workload, model: KarmaModel, optimizer: torch.optim.Optimizer, step: Step
) -> dict[str, float]:
    """Shares of the step's time: encoder, decoder with Task 1, Task 2, losses, backward, rest."""
    spent: dict[str, float] = {}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            work.finish()
            started = work.now()
            result = function(*arguments, **options)
            work.finish()
            spent[name] = spent.get(name, 0.0) + work.now() - started
            return result

        return call

    places: list[tuple[Any, str, str]] = [
        (InterestModel, "encode_items", "encode"),
        (KarmaModel, "forward_with_text", "decode_and_task_1"),
        (KarmaModel, "decode_interest", "task_2"),
        (training_step, "decoded_losses", "logits"),
        (training_step, "action_term", "action"),
        (torch.autograd, "backward", "backward"),
        (nn.utils, "clip_grad_norm_", "clip"),
        (optimizer, "step", "optimizer"),
    ]
    with ExitStack() as stack:
        for owner, attribute, name in places:
            wrapped = timed(name, getattr(owner, attribute))
            stack.enter_context(patch.object(owner, attribute, wrapped))
        total = sum(train_step(work, model, optimizer, step, batch) for batch in work.batches)
    shares = {name: round(value / total, 4) for name, value in spent.items()}
    return {**shares, "rest": round(1 - sum(spent.values()) / total, 4)}


def _copied_prefixes(
    body: nn.Module, prefix: Prefix, batch: Batch, targets: TextTargets, *, see_readout: bool
) -> tuple[Tensor, Tensor]:
    """As `history_to_text`: prefix states [B, S, D] and text states [R, K, D], in two passes."""
    layout, copies = prefix.layout, batch.decode_step.shape[1]
    states = run_body(
        body, prefix.embeddings, layout.visible, layout.positions, layout.real
    )  # the pass that h is read from
    readout = layout.readout.gather(1, batch.decode_step).flatten()  # [R]
    among, positions, history = (
        value.repeat_interleave(copies, 0)
        for value in (layout.visible, layout.positions, prefix.embeddings)
    )
    rows = torch.arange(len(readout), device=readout.device)
    seen = among[rows, readout]  # [R, S]
    start = positions[rows, readout][:, None] + 1
    slots, width = seen.shape[1], targets.inputs.shape[1]
    order = torch.arange(slots + width, device=readout.device)
    if not see_readout:
        seen = seen & (order[:slots] != readout[:, None])
    visible = (order[:, None] >= order).repeat(len(rows), 1, 1)
    visible[:, :slots, :slots] = among
    visible[:, slots:, :slots] = seen[:, None]
    text = run_body(
        body,
        torch.cat([history, token_embeddings(body)[targets.inputs]], 1),
        visible,
        torch.cat([positions, start + order[:width]], 1),
        torch.cat([seen & targets.mask[:, :1], targets.mask], 1),
    )
    return states, text[:, slots:]


def _stock_norm(self: RMSNorm, x: Tensor) -> Tensor:
    exact = x.float()
    exact = exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + self.eps)
    return self.weight * exact.to(x.dtype)


def _stock_chunk(states: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    logits = (states @ head.T.to(states.dtype)).float()
    return functional.cross_entropy(logits, labels, reduction="none")


def _fused(
    query: Tensor, key: Tensor, value: Tensor, plan: packing.Packing, scaling: float, dropout: float
) -> Tensor:
    mask = None if plan.visible is None else plan.visible[:, None]
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=mask is None,
        scale=scaling, enable_gqa=True,
    )  # fmt: skip
