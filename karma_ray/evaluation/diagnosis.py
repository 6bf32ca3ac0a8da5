"""Diagnosis of a model: attention sinks, rank, spread and decodable text (method 1.13).

Every model is measured on the same `ProbeSet`, in float32 and evaluation mode.

Legend: N items, n vectors, B requests, H heads, P chosen heads, S slots, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from karma_ray.data.batch import Batch
from karma_ray.data.prompts import Tokenizer
from karma_ray.errors import InputError
from karma_ray.evaluation.probe_sets import ItemSample, RequestSample, VectorSample, WordSample
from karma_ray.metrics.attention import MEASURES, content_columns, sink_measures
from karma_ray.metrics.collapse import effective_rank, label_probe, mean_cosine
from karma_ray.model.attention_maps import item_attention, user_attention
from karma_ray.model.interest import InterestModel
from karma_ray.model.karma import KarmaModel
from karma_ray.retrieval.encode import encode_catalog

Head = tuple[int, int]
"""(layer, head), both counted from 0 as in transformers."""
Wanted = tuple[int, int | None]
"""A head, or all heads of a layer."""
PAPER_HEADS: tuple[Head, ...] = ((9, 1), (11, 1))
CHUNK = 32
"""Items or requests whose attention maps are in memory at once."""
LAID_OUT = ("query_index", "item_index", "item_mask", "step_mask", "group")
"""Fields of a batch that determine the layout of the user decoder's input."""


@dataclass(frozen=True)
class ProbeSet:
    """Items and requests that every model is measured on."""

    items: ItemSample
    vectors: VectorSample
    requests: RequestSample | None
    words: WordSample | None
    seed: int


@dataclass(frozen=True)
class BodyDiagnosis:
    """Attention measures of one body."""

    measures: dict[str, np.ndarray]  # MEASURES -> [layers, heads], means over the samples
    heads: list[Head]  # the P chosen heads
    mean_maps: np.ndarray  # [P, S, S] mean over the samples
    example_maps: np.ndarray  # [P, S, S] the first sample
    slots: list[str]  # [S] labels of the slots in the first sample
    content: np.ndarray  # [S] its content columns

    def metrics(self, prefix: str) -> dict[str, float]:
        """Return the means over all layers and heads, and the values of the chosen heads."""
        found = {f"{prefix}{name}": float(self.measures[name].mean()) for name in MEASURES}
        for layer, head in self.heads:
            for name in MEASURES:
                found[f"{prefix}{name}_l{layer}h{head}"] = float(self.measures[name][layer, head])
        return found


@dataclass(frozen=True)
class ModelDiagnosis:
    """The diagnosis of one model."""

    metrics: dict[str, float]  # NaN where nothing could be measured
    item_encoder: BodyDiagnosis
    user_decoder: BodyDiagnosis | None
    vectors: Tensor = field(repr=False)  # [n, D] learned dimensions of the vector sample


Probe = Callable[[KarmaModel, Batch], Mapping[str, float]]
"""Measures one batch: the spread of h, and how well text is decoded from it."""


@torch.no_grad()
def diagnose(
    model: KarmaModel,
    probe_set: ProbeSet,
    probe: Probe,
    wanted: Sequence[Wanted] | None = None,
) -> ModelDiagnosis:
    """Measure a model; `wanted` defaults to `shown_heads` of each body.

    `probe` is `JointStep.probe` of the objective that the model was trained with.

    Raises InputError when the item encoder does not have a wanted head.
    """
    model = model.eval()
    sample = probe_set.vectors
    vectors = torch.from_numpy(
        encode_catalog(model.interest, sample.tokens, sample.lengths, rows=sample.rows)
    )
    vectors = vectors[:, : model.interest.learned_width]
    items = diagnose_items(model, probe_set.items, wanted)
    metrics = items.metrics("collapse/")
    metrics["collapse/effective_rank_e"] = effective_rank(vectors)
    metrics["collapse/mean_cosine_e"] = mean_cosine(vectors)
    labels = label_probe(vectors, sample.categories, sample.contents, probe_set.seed)
    if labels is not None:
        metrics["collapse/category_accuracy"] = labels.accuracy
        metrics["collapse/category_majority"] = labels.majority
    user = None
    if probe_set.requests is not None:
        user = diagnose_users(model, probe_set.requests, wanted)
        metrics |= user.metrics("collapse/user/")
        device = next(model.parameters()).device
        probed = probe(model, probe_set.requests.targets.to(device))
        for name in ("collapse/effective_rank_h", "collapse/mean_cosine_h"):
            metrics[name] = probed[name]
        metrics["collapse/decode_gap"] = probed["decode_gap"]
        metrics["collapse/decode_ce"] = probed["decode_ce"]
    if probe_set.words is not None:
        metrics |= diagnose_words(model, probe_set.words)
    return ModelDiagnosis(metrics, items, user, vectors)


@torch.no_grad()
def diagnose_words(model: KarmaModel, sample: WordSample) -> dict[str, float]:
    """Measure how well a linear probe predicts the clicked item's words from h and the query."""
    interest, found = model.interest, []
    device = next(interest.parameters()).device
    for chunk in sample.chunks:
        batch = chunk.to(device)
        found.append(interest.last_interest(batch, _encoded(interest, batch)))
    read = {
        "collapse/words_from_h": sample.read_from(torch.cat(found)),
        "collapse/words_from_query": sample.read_from_query,
    }
    return {name: value for name, value in read.items() if value is not None}


@torch.no_grad()
def diagnose_items(
    model: KarmaModel, sample: ItemSample, wanted: Sequence[Wanted] | None = None
) -> BodyDiagnosis:
    """Measure the item encoder's attention; raises InputError on heads that it does not have."""
    encoder = model.interest.item_encoder
    device = next(encoder.parameters()).device
    num_prompt = len(encoder.instruction)
    template = torch.nn.functional.pad(sample.template, (num_prompt, 0), value=True)
    content = content_columns(template, num_prompt)
    gathered = _Gathered(lambda layers, heads: chosen_heads(wanted, layers, heads))
    for start in range(0, len(sample.rows), CHUNK):
        part = slice(start, start + CHUNK)
        maps = item_attention(
            encoder, sample.tokens[part].to(device), sample.lengths[part].to(device)
        )
        gathered.add(maps, content[part].to(device))
    ids = [*encoder.instruction.tolist(), *sample.tokens[0].tolist()]
    return gathered.finished(_words(model.tokenizer, ids), content[0])


@torch.no_grad()
def diagnose_users(
    model: KarmaModel, sample: RequestSample, wanted: Sequence[Wanted] | None = None
) -> BodyDiagnosis:
    """Measure the user decoder's attention; content slots are the items of the first half.

    Wanted heads that it does not have are ignored.
    """
    interest = model.interest
    device = next(interest.parameters()).device
    batch = sample.requests.to(device)
    items = _encoded(interest, batch)
    gathered = _Gathered(lambda layers, heads: chosen_heads(wanted, layers, heads, strict=False))
    content = torch.zeros(0)
    for start in range(0, batch.num_windows, CHUNK):
        rows = slice(start, start + CHUNK)
        part = replace(batch, **{name: getattr(batch, name)[rows] for name in LAID_OUT})
        found = user_attention(interest, part, items)
        content = content_columns(~found.items, len(interest.user_decoder.prompt))
        gathered.add(found.maps, content, found.visible)
    slots = _words(model.tokenizer, interest.user_decoder.prompt.tolist())
    block = (content.shape[1] - len(slots)) // batch.step_mask.shape[1]
    for step in range(1, batch.step_mask.shape[1] + 1):
        slots += [*[f"query {step}"] * (block - 1), f"item {step}"]
    # The last slot would be the item of the current step, which does not exist yet.
    return gathered.finished(slots[:-1], content[0, :-1].cpu())


def _encoded(interest: InterestModel, batch: Batch) -> Tensor:
    """Return e [U, D] of a batch's items, encoded in chunks."""
    texts = batch.item_tokens.cpu().numpy(), batch.item_lengths.cpu().numpy()
    vectors = encode_catalog(interest, *texts, rows=batch.item_rows.cpu().numpy())
    return torch.from_numpy(vectors).to(batch.item_rows.device)


def content_sink(model: KarmaModel, sample: ItemSample) -> float:
    """Return `content_sink` of the item encoder over all layers and heads, in percent."""
    return float(diagnose_items(model, sample, ()).measures["content_sink"].mean())


def shown_heads(num_layers: int, num_heads: int) -> list[Head]:
    """Return the paper's heads if they exist, else head 1 of the middle and the last layer."""
    paper = [(n, head) for n, head in PAPER_HEADS if n < num_layers and head < num_heads]
    if paper:
        return paper
    head = min(1, num_heads - 1)
    return sorted({((num_layers - 1) // 2, head), (num_layers - 1, head)})


def chosen_heads(
    wanted: Sequence[Wanted] | None, num_layers: int, num_heads: int, strict: bool = True
) -> list[Head]:
    """Return the wanted heads, or `shown_heads`; if `strict`, raises InputError on unknown ones."""
    if wanted is None:
        return shown_heads(num_layers, num_heads)
    found: list[Head] = []
    for layer, head in wanted:
        if layer < num_layers and (head or 0) < num_heads:
            found += [(layer, n) for n in range(num_heads)] if head is None else [(layer, head)]
        elif strict:
            name = f"{layer}" if head is None else f"{layer}:{head}"
            layers, heads = f"layers 0 to {num_layers - 1}", f"heads 0 to {num_heads - 1}"
            raise InputError("--layers", name, "is not in this model", choices=[layers, heads])
    return found or (shown_heads(num_layers, num_heads) if wanted else [])


class _Gathered:
    """Accumulates means over samples, chunk by chunk."""

    def __init__(self, choose: Callable[[int, int], list[Head]]) -> None:
        """`choose(layers, heads)` returns the heads to show."""
        self._choose = choose
        self._heads: list[Head] = []
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}
        self._maps: Any = 0.0
        self._example = torch.zeros(0)
        self._num = 0

    def add(self, maps: list[Tensor], content: Tensor, visible: Tensor | None = None) -> None:
        """Add maps per layer [b, H, S, S], content columns [b, S] and mask [b, S, S]."""
        for name, values in self._measured(maps, content, visible).items():  # [layers, b, H]
            there = ~values.isnan()
            sums, counts = values.nan_to_num().sum(1), there.sum(1)
            self._sums[name] = self._sums.get(name, torch.zeros_like(sums)) + sums
            self._counts[name] = self._counts.get(name, torch.zeros_like(counts)) + counts
        if not self._num:
            self._heads = self._choose(len(maps), maps[0].shape[1])
        if self._heads:
            chosen = torch.stack([maps[layer][:, head].float() for layer, head in self._heads], 1)
            if visible is not None:
                chosen = chosen * visible[:, None]
            if not self._num:
                self._example = chosen[0]
            self._maps = self._maps + chosen.sum(0)
        self._num += len(content)

    def finished(self, slots: list[str], content: Tensor) -> BodyDiagnosis:
        """Return the means (NaN if no sample had a value), with maps cut to the named slots."""
        measures = {
            name: (self._sums[name] / self._counts[name]).cpu().numpy() for name in MEASURES
        }
        size, shown = len(slots), bool(self._heads)
        empty = np.zeros((0, size, size), np.float32)
        mean = (self._maps / self._num)[:, :size, :size].cpu().numpy() if shown else empty
        example = self._example[:, :size, :size].cpu().numpy() if shown else empty
        return BodyDiagnosis(
            measures=measures,
            heads=self._heads,
            mean_maps=mean,
            example_maps=example,
            slots=slots,
            content=content.numpy(),
        )

    @staticmethod
    def _measured(maps: list[Tensor], content: Tensor, visible: Tensor | None) -> dict[str, Tensor]:
        layers = [sink_measures(weights, content, visible) for weights in maps]
        return {name: torch.stack([layer[name] for layer in layers]) for name in MEASURES}


def _words(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Return each token as text."""
    return [tokenizer.decode([token]).strip() or "␣" for token in ids]
