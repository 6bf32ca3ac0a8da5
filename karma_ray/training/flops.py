"""Useful operations of a joint step and the peak of a device; their quotient is the MFU.

Model FLOPs utilisation (PaLM, 2204.02311, appendix B) counts the matrix products of the formulas,
2 per multiply-add: only real tokens, only pairs that the attention mask allows, each item once.
Padding, gradient caches and recomputed activations and logits are not counted. A backward pass
costs one product for the gradient of the input and one for that of the weight; frozen weights
need only the first.

Frozen layers whose states are kept cost nothing, as the pass that made them is part of no step.

Also not counted are norms, activations, softmax, pooling, look-ups and the optimiser.

Legend: B windows, T steps, U items, V queries, M decoded positions, H hard negatives, D width.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from karma_ray.data.batch import Batch, host_of
from karma_ray.model.backbone import num_layers
from karma_ray.model.backbones.registry import family_of
from karma_ray.model.karma import KarmaModel
from karma_ray.model.lora import rank_of
from karma_ray.objectives.losses import BuiltTerms
from karma_ray.training.action_term import trained_steps

Learns = Literal["all", "adapters", "nothing", "no gradient"]
"""What in a body gets a gradient; `nothing` passes it on to the input, `no gradient` does not."""


@dataclass(frozen=True)
class BodyCost:
    """Operations of one forward pass of a body, without its head and embeddings."""

    linear: float  # per token, in the layers' own weights
    low_rank: float  # per token, in adapters
    attention: float  # per pair of positions that the attention mask allows

    @classmethod
    def of(cls, body: nn.Module, layers: int | None = None) -> BodyCost:
        """Compute the costs of `layers` layers (default: of all) that have the body's adapters."""
        config = cast(Any, body).config
        shape, layers = family_of(body).layer_shape(config), layers or num_layers(body)
        weights = sum(inside * outside for inside, outside in shape.matrices)
        sides = sum(inside + outside for inside, outside in shape.matrices)
        rank, queries = rank_of(body) or 0, shape.attention_width
        return cls(2.0 * layers * weights, 2.0 * layers * rank * sides, 4.0 * layers * queries)

    def forward(self, tokens: float, pairs: float) -> float:
        """Return the cost of one pass over these numbers of real tokens and visible pairs."""
        return (self.linear + self.low_rank) * tokens + self.attention * pairs

    def step(self, tokens: float, pairs: float, learns: Learns = "all") -> float:
        """Return the cost of the forward and backward pass."""
        if learns == "no gradient":
            return self.forward(tokens, pairs)
        own = 3.0 if learns == "all" else 2.0
        low_rank = 2.0 if learns == "nothing" else 3.0
        return (own * self.linear + low_rank * self.low_rank) * tokens + 3 * self.attention * pairs


@dataclass(frozen=True)
class Work:
    """Counts of what the passes of a joint step on one batch process."""

    items: int  # encoded
    item_tokens: int
    item_pairs: int
    queries: int  # unique and not empty
    query_tokens: int  # as the item encoder reads them, with the end of text
    query_pairs: int
    steps: int
    tokens: int  # prompt and slots of the user decoder
    pairs: int
    text_tokens: int  # Task 1's texts, after the user decoder's slots
    text_pairs: int
    rows_tokens: int  # Task 2's rows
    rows_pairs: int
    rows: int
    targets: int  # decoded tokens of one task, including the end
    trained: int  # steps in L_act
    hard: int  # hard negatives of the batch
    pool: int  # in-batch negatives of each trained step

    @classmethod
    def of(
        cls, model: KarmaModel, batch: Batch, *, positions: str = "all", own: Tensor | None = None,
        pool: int | None = None,
    ) -> Work:  # fmt: skip
        """Compute the counts as sums over masks, on the host."""
        batch, own = batch.on_host(), None if own is None else host_of(own)
        encoder = model.interest.item_encoder
        user, config = model.interest.user_decoder, model.decodability.config
        lengths = batch.item_lengths if own is None else batch.item_lengths[own]
        words = batch.query_lengths > 0
        instruction = len(encoder.instruction)
        items, queries = lengths + instruction, (batch.query_lengths + 1 + instruction) * words
        in_items, in_queries = _causal(items), _causal(queries)
        slots, seen, at_readout = _window_counts(model, batch)
        prompt = len(user.prompt)

        index = batch.item_index.gather(1, batch.decode_step)  # [B, M]
        real = batch.decode_mask
        text = ((batch.item_lengths[index] - 1).clamp(max=config.max_target_tokens) + 1) * real
        before = at_readout.gather(1, batch.decode_step) - int(not config.task1_see_readout)
        rows = (text + len(model.decodability.prompt) + 1) * real
        if config.recon_cond == "fig1":
            rows = rows + batch.query_lengths[batch.query_index.gather(1, batch.decode_step)] * real
        clicked = torch.zeros_like(batch.item_lengths)
        clicked[batch.item_index[batch.loss_mask]] = 1
        trained = trained_steps(batch, positions)
        counts = [
            items.sum(), in_items, words.sum(), queries.sum(), in_queries,
            batch.step_mask.sum(), slots.sum(), seen.sum(), text.sum(),
            (text * before).sum() + _causal(text), rows.sum(), _causal(rows), real.sum(),
            trained.sum(), (batch.hard_mask & trained[..., None]).sum(), clicked.sum(),
        ]  # fmt: skip
        found = [int(value) for value in torch.stack(counts).tolist()]
        windows = batch.num_windows
        return cls(
            items=len(lengths), item_tokens=found[0], item_pairs=found[1], queries=found[2],
            query_tokens=found[3], query_pairs=found[4], steps=found[5],
            tokens=found[6] + windows * prompt,
            pairs=found[7] + windows * prompt * (prompt + 1) // 2,
            text_tokens=found[8], text_pairs=found[9], rows_tokens=found[10],
            rows_pairs=found[11], rows=found[12], targets=found[8], trained=found[13],
            hard=found[14], pool=found[15] if pool is None else pool,
        )  # fmt: skip


def joint_flops(
    model: KarmaModel, batch: Batch, built: BuiltTerms, *,
    encoder: Literal["full", "frozen", "bank"], positions: str = "all",
    own: Tensor | None = None, pool: int | None = None,
) -> float:  # fmt: skip
    """Useful operations of one joint step on this worker, forward and backward.

    `encoder` is `full` (it gets gradients, at least from targets), `frozen` (forward only) or
    `bank` (item embeddings are looked up). `positions` is `objective.act_positions`. With several
    workers `batch`, `own` [O] and the size of the `pool` are those of `SharedBatch`; by default
    all items of the batch are encoded here and its own positives are the pool.
    """
    work = Work.of(model, batch, positions=positions, own=own, pool=pool)
    config = model.interest.config.user_decoder
    body = model.interest.user_decoder.body
    width = model.interest.learned_width
    square = 6.0 * width * width  # a D x D layer on one vector, forward and backward
    total = _encoding(model, work, encoder, with_queries=config.query_mode == "encoder")
    tokens = work.tokens + built.generation * work.text_tokens
    pairs = work.pairs + built.generation * work.text_pairs
    total += BodyCost.of(body).step(tokens, pairs, "all" if rank_of(body) is None else "adapters")
    projector = projector_cost(model)
    query = {"embed_pool": 2 * square, "encoder": projector}.get(config.query_mode, 0.0)
    total += projector * len(batch.item_lengths) + query * work.queries + square * work.steps
    if built.generation:
        total += _head(model, body) * work.targets
    if built.reconstruction:
        total += _rows(model, work)
    # Items of a frozen encoder need no gradient.
    factor = 3 if encoder == "full" else 2
    return total + factor * 2.0 * model.interest.width * (work.trained * work.pool + work.hard)


def _encoding(model: KarmaModel, work: Work, encoder: str, *, with_queries: bool) -> float:
    part = model.interest.item_encoder
    body = part.body
    learns: Learns = "no gradient"
    if encoder == "full":
        learns = "all" if rank_of(body) is None else "adapters"
    frozen = part.num_frozen
    upper = BodyCost.of(body, num_layers(body) - frozen)
    lower = replace(BodyCost.of(body, frozen), low_rank=0.0) if frozen else None
    output = 2.0 * part.output.weight.numel() * (3 if encoder == "full" else 1)

    counts = []  # vectors, tokens, pairs, and whether the states below the top are kept
    if encoder != "bank":
        counts.append((work.items, work.item_tokens, work.item_pairs, part.states is not None))
    if with_queries:
        counts.append((work.queries, work.query_tokens, work.query_pairs, False))
    return sum(
        (0.0 if kept or lower is None else lower.forward(tokens, pairs))
        + upper.step(tokens, pairs, learns) + output * vectors
        for vectors, tokens, pairs, kept in counts
    )  # fmt: skip


def projector_cost(model: KarmaModel) -> float:
    """Return the operations of P on one vector, forward and backward."""
    projector = model.interest.user_decoder.projector
    return 6.0 * (projector.inner.weight.numel() + projector.outer.weight.numel())


def _rows(model: KarmaModel, work: Work) -> float:
    """Return the cost of Task 2: projection, the decoder's pass over the rows, and the head."""
    shared = model.interest.user_decoder.body
    body = model.decodability.decoder(shared)
    learns: Learns = "all" if rank_of(body) is None else "adapters"
    if model.decodability.config.recon_decoder == "frozen" and body is not shared:
        learns = "nothing"
    passed = BodyCost.of(body).step(work.rows_tokens, work.rows_pairs, learns)
    return projector_cost(model) * work.rows + passed + _head(model, body) * work.targets


def _head(model: KarmaModel, body: nn.Module) -> float:
    """Return the operations of the output embeddings [V, D] on one target."""
    head = model.head_of(body)
    return 2.0 * head.numel() * (3 if head.requires_grad else 2)


def _causal(lengths: Tensor) -> Tensor:
    """Return the number of causally visible pairs in rows of these lengths."""
    return (lengths * (lengths + 1) // 2).sum()


def _window_counts(model: KarmaModel, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Count for each step [B, T]: slots in use, and positions visible to them and to its read-out.

    The result equals the sums over `model.layout`'s [B, S, S] masks, without building them.
    """
    config = model.interest.user_decoder.config
    prompt = len(model.interest.user_decoder.prompt)
    group, steps, items = batch.group, batch.step_mask.long(), batch.item_mask.long()
    words = torch.ones_like(steps)
    if config.query_mode == "tokens":
        words = batch.query_lengths.clamp(min=1)[batch.query_index]
    words, items = words * steps, items * steps
    # Members of a group are adjacent: what precedes the first of them is visible to all.
    order = torch.arange(group.shape[1], device=group.device).expand_as(group)
    opens = functional.pad(group[:, 1:] != group[:, :-1], (1, 0), value=True)
    first = (order * opens).cummax(1).values
    if config.layout == "items_only":  # an item attends to all items up to itself
        upto = items.cumsum(1)
        return items, (prompt + upto) * items, prompt + (upto - items).gather(1, first)
    held = items + words if config.layout == "interleaved" else items
    earlier = (held.cumsum(1) - held).gather(1, first)
    outside = prompt + earlier
    beside = words if config.layout == "interleaved" else torch.zeros_like(words)
    seen = words * outside + words * (words + 1) // 2 + items * (outside + beside + 1)
    return words + items, seen, outside + words


_PEAKS = {
    "B200": (2250e12, "half"),
    "H200": (989e12, "half"),
    "H100": (989e12, "half"),
    "A100": (312e12, "half"),
    "L40S": (362e12, "half"),
    "L4": (121e12, "half"),
    "V100": (125e12, "float16"),
    "T4": (65e12, "float16"),
}
"""Dense tensor-core operations per second from the maker's data sheets, for SXM cards; `half`
stands for bfloat16 and float16."""
_OTHERS = frozenset({"PCIE", "NVL", "MIG"})
"""Words in the names of slower cards and of partial cards, whose peak is measured instead."""


def peak_flops(device: torch.device | str, dtype: torch.dtype) -> float:
    """Return the operations per second of matrix products in `dtype`, tabled or else measured.

    A measurement is made once per process, device, type and number of threads; it takes about
    0.2 s on a CPU core.
    """
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    if (known := tabled_peak(name, dtype)) is not None:
        return known
    return _measured_peak(device, dtype, torch.get_num_threads())


def tabled_peak(name: str, dtype: torch.dtype) -> float | None:
    """Return the data-sheet peak of an accelerator, or None if the table does not have it."""
    words = set(name.upper().replace("-", " ").split())
    kinds = {torch.bfloat16: ("half",), torch.float16: ("half", "float16")}.get(dtype, ())
    for card, (peak, kind) in _PEAKS.items():
        if card in words and kind in kinds and not words & _OTHERS:
            return peak
    return None


@lru_cache
def _measured_peak(device: torch.device, dtype: torch.dtype, num_threads: int) -> float:
    """Return the best of three products of square matrices, after one to warm up."""
    size = 1024 if device.type == "cpu" else 8192
    own = torch.Generator(device).manual_seed(0)  # dropout draws from the shared one
    left, right = torch.randn(2, size, size, device=device, generator=own).to(dtype)
    times = []
    for _ in range(4):
        started = time.perf_counter()
        (left @ right)[0, 0].item()  # waits for the device
        times.append(time.perf_counter() - started)
    return 2.0 * size**3 / min(times[1:])
