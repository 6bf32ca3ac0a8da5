"""The joint step as one would write it without our tricks: what the engine is measured against.

The same mathematics (method 1.2 to 1.8) on the same weights and the same batch, with stock
transformers bodies and stock PyTorch:

* `Qwen3Model.forward` with SDPA on right-padded rows, no packing
* every use of an item is encoded anew, history step and hard negative alike; queries likewise
* Task 1 in rows of its own, each with its own copy of [prompt, q_1, i_1, ..., q_t]
* logits at every slot over the whole vocabulary, then a masked cross-entropy

Rows that are all padding are left out, as anybody would. Nothing of our step, encoder, layout,
packing or decoders is called, only small modules and formulas (projector, score, pair losses),
so it is an oracle as well: tests/training/test_reference.py.

Legend: B windows, T steps, R rows, S slots, N trained steps, P pool, H hard negatives, K text
slots, W query slots, D width, V vocabulary.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.reference_rows import (
    ITEM,
    NO_LABEL,
    PROMPT,
    QUERY,
    Slots,
    earlier_pages,
    encode_uses,
    history_slots,
    run_stock,
    text_slots,
    token_slots,
    unit_rms,
    visible,
)
from karma_ray.data.batch import Batch
from karma_ray.model.karma import KarmaModel
from karma_ray.objectives.action import ACTION_LOSSES, pair_weights
from karma_ray.objectives.losses import ObjectiveConfig, hard_weight_at
from karma_ray.training.step import StepOutput
from karma_ray.training.step_state import AT_THE_END, StepState


@dataclass(frozen=True)
class ReferenceStep:
    """L_act + lambda_dec (L_gen + L_recon) on one worker, the item encoder trained throughout."""

    objective: ObjectiveConfig

    def __call__(self, model: nn.Module, batch: Batch, state: StepState = AT_THE_END) -> StepOutput:
        """Equations 4 to 7 on one batch; called as `JointStep` is."""
        assert isinstance(model, KarmaModel)
        objective = self.objective
        weighted = replace(objective, hard_weight=hard_weight_at(objective, state.progress))
        items = encode_uses(model, batch, batch.item_index, batch.item_mask)  # [B, T, D]
        hard = encode_uses(model, batch, batch.hard_index, batch.hard_mask)  # [B, T, H, D]
        history = history_slots(model, batch, items)
        interest = next_interest(model, batch, history)  # [B, T, D]
        terms = {"loss/action": action_loss(model, batch, interest, items, hard, weighted)}
        total = terms["loss/action"]
        if weight := objective.lambda_dec * objective.generation:
            rows, states = history_to_text(model, batch, history)
            head = model.head_of(model.interest.user_decoder.body)
            terms["loss/generation"] = text_loss(states, head, rows, objective)
            total = total + weight * terms["loss/generation"]
        if weight := objective.lambda_dec * objective.reconstruction:
            rows, states = interest_to_text(model, batch, interest)
            head = model.head_of(model.decodability.decoder(model.interest.user_decoder.body))
            terms["loss/reconstruction"] = text_loss(states, head, rows, objective)
            total = total + weight * terms["loss/reconstruction"]
        shown = {name: value.detach() for name, value in {**terms, "loss/total": total}.items()}
        return StepOutput(total, {**shown, "examples": float(batch.num_windows)})


def next_interest(model: KarmaModel, batch: Batch, history: Slots) -> Tensor:
    """h [B, T, D]: read at the end of a step's query, or at the last item before its page."""
    user, rows = model.interest.user_decoder, history.right_padded()
    seen = visible(rows, user.config.layout)
    states = run_stock(user.body, rows.embeddings, seen, rows.positions)
    if user.config.layout == "items_only":
        slot = len(user.prompt) + earlier_pages(batch) - 1
    else:
        order = torch.arange(rows.real.shape[1], device=rows.real.device)
        steps = torch.arange(batch.step_mask.shape[1], device=order.device)
        queries = (rows.kind == QUERY) & rows.real
        mine = queries[:, None] & (rows.step[:, None] == steps[:, None])  # [B, T, S]
        slot = (mine * order).amax(-1)
    windows = torch.arange(len(slot), device=slot.device)[:, None]
    return unit_rms(user.readout(states[windows, slot]))


def action_loss(
    model: KarmaModel, batch: Batch, interest: Tensor, items: Tensor, hard: Tensor,
    objective: ObjectiveConfig,
) -> Tensor:  # fmt: skip
    """Equation 5 on dense scores [N, H + P]; the pool holds one click of each content."""
    content = batch.item_content[batch.item_index]  # [B, T]
    trained = batch.loss_mask
    if objective.act_positions == "last":
        later = trained.flip(1).cumsum(1).flip(1)
        trained = trained & (later == 1)
    window, step = trained.nonzero(as_tuple=True)
    pool = pool_of_clicks(batch)
    with torch.autocast(content.device.type, enabled=False):
        score = model.interest.score
        queries, vectors = score.query_vectors(interest), score.index_vectors(items)  # [B, T, D]
        queries = queries[window, step]  # [N, D]
        positive = (queries * vectors[window, step]).sum(-1)
        exposed = (queries[:, None] * score.index_vectors(hard[window, step])).sum(-1)
        scores = torch.cat([exposed, queries @ vectors[pool[0], pool[1]].T], 1)
    clicked = content.masked_fill(~batch.item_mask, -1)
    same = content[pool[0], pool[1]][None, :, None] == clicked[:, None, :]  # [B, P, T]
    free = ~same.any(-1)[window]
    taken = batch.item_content[batch.hard_index][..., None] == clicked[:, None, None]
    wrong = (batch.hard_mask & ~taken.any(-1))[window, step]
    weights = pair_weights(
        wrong, free, objective.act_reduction, objective.hard_weight, objective.batch_weight
    )
    losses = ACTION_LOSSES[objective.action_loss](positive, scores, weights)
    return losses.sum() / trained.sum().clamp(min=1)


def pool_of_clicks(batch: Batch) -> Tensor:
    """Windows and steps [2, P] of one click of each content, that of the smallest catalogue row."""
    item = batch.item_index[batch.loss_mask]
    order = item.argsort(descending=True, stable=True)
    contents = batch.item_content[item[order]].tolist()
    last = {content: place for place, content in enumerate(contents)}
    chosen = order[torch.tensor(list(last.values()), dtype=torch.long, device=order.device)]
    return batch.loss_mask.nonzero()[chosen].T


def history_to_text(model: KarmaModel, batch: Batch, history: Slots) -> tuple[Slots, Tensor]:
    """Task 1, equation 6: rows [what q_t sees, q_t][<s> w_1 ... w_L] and their states [R, S, D]."""
    user, layout = model.interest.user_decoder, model.interest.user_decoder.config.layout
    window, step = _decoded(batch)
    rows = history.take(window)
    earlier = (rows.step < step[:, None]) & (rows.group != batch.group[window, step][:, None])
    if layout == "query_last":
        earlier = earlier & (rows.kind == ITEM)
    own = (rows.kind == QUERY) & (rows.step == step[:, None])
    kept = rows.real & (earlier | own | (rows.kind == PROMPT))
    start = rows.positions.masked_fill(~kept, -1).amax(1, keepdim=True) + 1
    if not model.decodability.config.task1_see_readout:
        kept = kept & (kept.flip(1).cumsum(1).flip(1) > 1)
    text = text_slots(model, user.body, batch, window, step, with_query=False)
    text = replace(text, positions=start + text.positions)
    rows = replace(rows, real=kept).followed_by(text).right_padded()
    seen = visible(rows, layout)
    return rows, run_stock(user.body, rows.embeddings, seen, rows.positions)


def interest_to_text(model: KarmaModel, batch: Batch, interest: Tensor) -> tuple[Slots, Tensor]:
    """Task 2, equation 7: rows [prompt] P(h_t) [<s> (query) w_1 ... w_L] and their states."""
    user, task = model.interest.user_decoder, model.decodability
    body, (window, step) = task.decoder(user.body), _decoded(batch)
    vectors = interest[window, step]
    if task.config.recon_detach_h:
        vectors = vectors.detach()
    prompt = token_slots(body, task.prompt.expand(len(window), -1), PROMPT)
    soft = task.project(user.projector, vectors)[:, None]
    first = token_slots(body, torch.zeros(len(window), 1).to(window), PROMPT)
    first = replace(first, embeddings=soft)
    with_query = task.config.recon_cond == "fig1"
    text = text_slots(model, body, batch, window, step, with_query=with_query)
    rows = prompt.followed_by(first).followed_by(text).right_padded()
    return rows, run_stock(body, rows.embeddings, rows.real)


def text_loss(states: Tensor, head: Tensor, rows: Slots, objective: ObjectiveConfig) -> Tensor:
    """Cross-entropy of states [R, S, D] with logits at all slots; a mean over rows."""
    logits = (states @ head.T).float()  # [R, S, V]
    values = functional.cross_entropy(
        logits.flatten(0, 1), rows.labels.flatten(), ignore_index=NO_LABEL, reduction="none"
    ).view(rows.labels.shape)
    if objective.ce_reduction == "token_mean":
        values = values / (rows.labels != NO_LABEL).sum(1, keepdim=True)
    return values.sum() / max(1, len(values))


def _decoded(batch: Batch) -> tuple[Tensor, Tensor]:
    """Windows [R] and steps [R] whose clicked item is decoded."""
    window, place = batch.decode_mask.nonzero(as_tuple=True)
    return window, batch.decode_step[window, place]
