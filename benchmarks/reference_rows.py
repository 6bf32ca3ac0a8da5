"""Right-padded rows of the reference step, and the stock bodies that run them.

See benchmarks/reference.py. Legend: B windows, T steps, R rows, S slots, K text slots, W query
slots, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional

from karma_ray.data.batch import Batch
from karma_ray.model.backbone import stock_body
from karma_ray.model.karma import KarmaModel

PROMPT, QUERY, ITEM, TEXT = range(4)
NO_LABEL = -100


@dataclass(frozen=True)
class Slots:
    """Rows of decoder input, slot by slot."""

    embeddings: Tensor  # [R, S, D]
    kind: Tensor  # [R, S] PROMPT, QUERY, ITEM or TEXT
    step: Tensor  # [R, S] history step that the slot belongs to; -1: none
    group: Tensor  # [R, S] result page of that step; -1: none
    positions: Tensor  # [R, S]
    labels: Tensor  # [R, S] token to be said after this slot, or NO_LABEL
    real: Tensor  # [R, S]

    def take(self, rows: Tensor) -> Slots:
        """Copies of some rows."""
        return Slots(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    def followed_by(self, other: Slots) -> Slots:
        """Each row of `other` behind the row of the same number."""
        pairs = ((f.name, getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return Slots(**{name: torch.cat([left, right], 1) for name, left, right in pairs})

    def right_padded(self) -> Slots:
        """Real slots first, in their order, and no longer than the longest row."""
        order = (~self.real).long().argsort(dim=1, stable=True)[:, : int(self.real.sum(1).max())]
        rows = torch.arange(len(order), device=order.device)[:, None]
        return Slots(**{f.name: getattr(self, f.name)[rows, order] for f in fields(self)})


def encode_items(model: KarmaModel, tokens: Tensor, lengths: Tensor) -> Tensor:
    """Method 1.2: tokens [R, L], lengths [R] -> e [R, D]."""
    encoder = model.interest.item_encoder
    instruction = encoder.instruction.expand(len(tokens), -1)
    last = instruction.shape[1] + lengths - 1
    embeddings = _embed(encoder.body, torch.cat([instruction, tokens], 1))
    slot = torch.arange(embeddings.shape[1], device=tokens.device)
    if encoder.config.pool == "emb_token":
        at_last = (slot == last[:, None])[..., None]
        embeddings = torch.where(at_last, encoder.item_token, embeddings)
    real = slot <= last[:, None]
    states = run_stock(encoder.body, embeddings, real)
    if encoder.config.pool == "mean":
        pooled = (states * real[..., None]).sum(1) / real.sum(1, keepdim=True)
    else:
        pooled = states[torch.arange(len(tokens), device=tokens.device), last]
    return unit_rms(encoder.output(pooled - encoder.mean))


def encode_uses(model: KarmaModel, batch: Batch, index: Tensor, mask: Tensor) -> Tensor:
    """Items `index` [...] where `mask` holds, each use on its own -> [..., D], else zero."""
    used = index[mask]
    vectors = torch.zeros(*mask.shape, model.interest.width, device=mask.device)
    if not len(used):
        return vectors
    lengths = batch.item_lengths[used]
    found = encode_items(model, batch.item_tokens[used, : int(lengths.max())], lengths)
    return vectors.masked_scatter(mask[..., None], found)


def history_slots(model: KarmaModel, batch: Batch, items: Tensor) -> Slots:
    """Method 1.3: [prompt][q_1, i_1] ... [q_T, i_T], padding included; items [B, T, D]."""
    user, (rows, steps) = model.interest.user_decoder, batch.step_mask.shape
    layout, prompt = user.config.layout, user.prompt
    queries, used = _query_tokens(model, batch)  # [B, T, W, D], [B, T, W]
    width, device = used.shape[-1] + 1, items.device
    if layout == "items_only":
        used = torch.zeros_like(used)
    blocks = torch.cat([queries, user.projector(items)[:, :, None]], 2).flatten(1, 2)
    order = torch.arange(steps, device=device)
    before = earlier_pages(batch)
    offset = torch.arange(width, device=device)
    if layout == "interleaved":
        positions = before[..., None] * width + offset
    elif layout == "query_last":
        positions = before[..., None] + offset * (offset < width - 1)
    else:
        positions = order[:, None].expand(rows, steps, width)
    kinds = torch.tensor([QUERY] * (width - 1) + [ITEM], device=device).repeat(steps)
    body = Slots(
        embeddings=blocks,
        kind=kinds.expand(rows, -1),
        step=order.repeat_interleave(width).expand(rows, -1),
        group=batch.group.repeat_interleave(width, 1),
        positions=len(prompt) + positions.flatten(1),
        labels=torch.full(blocks.shape[:2], NO_LABEL, device=device),
        real=torch.cat([used, batch.item_mask[..., None]], 2).flatten(1)
        & batch.step_mask.repeat_interleave(width, 1),
    )
    return token_slots(user.body, prompt.expand(rows, -1), PROMPT).followed_by(body)


def _query_tokens(model: KarmaModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Soft query tokens [B, T, W, D] of every step, and which of them are used [B, T, W]."""
    user = model.interest.user_decoder
    tokens = batch.query_tokens[batch.query_index]  # [B, T, Lq]
    lengths = batch.query_lengths[batch.query_index]
    mode, slot = user.config.query_mode, torch.arange(tokens.shape[2], device=tokens.device)
    real = slot < lengths[..., None]
    embedded = _embed(user.body, tokens)
    if mode == "tokens":
        missing = (lengths == 0)[..., None, None]
        return torch.where(missing, user.no_query, embedded), real | (slot == 0)
    if mode == "embed_pool":
        total = (embedded * real[..., None]).sum(2)
        soft = user.query_embedding(total / real.sum(2, keepdim=True).clamp(min=1))
    elif mode == "encoder":
        closed = functional.pad(tokens, (0, 1)).masked_fill(
            functional.pad(slot, (0, 1), value=len(slot)) == lengths[..., None],
            model.special.end_of_text,
        )
        real_steps = batch.step_mask
        found = encode_items(model, closed[real_steps], lengths[real_steps] + 1)
        soft = torch.zeros(*lengths.shape, model.interest.width, device=tokens.device)
        soft = soft.masked_scatter(real_steps[..., None], user.projector(found))
    else:
        soft, lengths = user.no_query.expand(*lengths.shape, -1), torch.zeros_like(lengths)
    soft = torch.where((lengths == 0)[..., None], user.no_query, soft)
    return soft[:, :, None], torch.ones_like(real[..., :1])


def text_slots(
    model: KarmaModel, body: nn.Module, batch: Batch, window: Tensor, step: Tensor, *,
    with_query: bool,
) -> Slots:  # fmt: skip
    """`<s> [query] w_1 ... w_L` of the clicked items, and what each slot is to say next."""
    item = batch.item_index[window, step]
    words = (batch.item_lengths[item] - 1).clamp(max=model.decodability.config.max_target_tokens)
    longest = int(words.max()) if len(words) else 0
    text, order = batch.item_tokens[item, :longest], torch.arange(longest + 1, device=item.device)
    labels = functional.pad(text, (0, 1)).masked_fill(order > words[:, None], NO_LABEL)
    labels = labels.masked_fill(order == words[:, None], model.special.text_end)
    query = batch.query_index[window, step]
    given = batch.query_tokens[query][:, : None if with_query else 0]
    known = batch.query_lengths[query].clamp(max=given.shape[1])
    lead = functional.pad(given, (1, 0), value=model.special.text_start)
    place = torch.arange(lead.shape[1], device=item.device)
    says = torch.where(place == known[:, None], labels[:, :1], NO_LABEL)
    slots = token_slots(body, torch.cat([lead, text], 1), TEXT)
    real = torch.cat([place <= known[:, None], order[:-1] < words[:, None]], 1)
    return replace(slots, labels=torch.cat([says, labels[:, 1:]], 1), real=real)


def token_slots(body: nn.Module, tokens: Tensor, kind: int) -> Slots:
    """Plain tokens [R, K] that belong to no step."""
    none = torch.full_like(tokens, -1)
    order = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    return Slots(
        embeddings=_embed(body, tokens), kind=torch.full_like(tokens, kind), step=none, group=none,
        positions=order, labels=torch.full_like(tokens, NO_LABEL),
        real=torch.ones_like(tokens, dtype=torch.bool),
    )  # fmt: skip


def visible(rows: Slots, layout: str) -> Tensor:
    """[R, S, S]: which slot (row) sees which (column); pages do not see their own clicks."""
    order = torch.arange(rows.real.shape[1], device=rows.real.device)
    looks, seen = rows.kind[:, :, None], rows.kind[:, None, :]
    other_page = rows.group[:, :, None] != rows.group[:, None, :]
    same_step = rows.step[:, :, None] == rows.step[:, None, :]
    if layout == "interleaved":
        allowed = other_page | same_step
    elif layout == "query_last":
        own_query = (seen == QUERY) & same_step & (looks == QUERY)
        allowed = (seen == ITEM) & other_page | own_query
    else:
        allowed = seen == ITEM
    allowed = allowed | (seen == PROMPT) | (looks == TEXT)
    earlier = order[:, None] > order[None, :]
    itself = order[:, None] == order[None, :]
    return allowed & earlier & rows.real[:, None, :] | itself


def run_stock(
    body: nn.Module, embeddings: Tensor, mask: Tensor, positions: Tensor | None = None
) -> Tensor:
    """Last hidden states of a stock body: mask [R, S] of real slots, or [R, S, S] who sees whom."""
    output = _stock(body)(
        inputs_embeds=embeddings, position_ids=positions, use_cache=False,
        attention_mask=mask[:, None] if mask.ndim == 3 else mask.long(),
    )  # fmt: skip
    return cast(Tensor, output.last_hidden_state)


_STOCK: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()


def _stock(body: nn.Module) -> nn.Module:
    """The body's weights in transformers' own layers, put together once."""
    if body not in _STOCK:
        _STOCK[body] = stock_body(body, "sdpa")
    return _STOCK[body]


def earlier_pages(batch: Batch) -> Tensor:
    """[B, T] steps of earlier result pages than the step's own."""
    order = torch.arange(batch.group.shape[1], device=batch.group.device)
    other = batch.group[:, :, None] != batch.group[:, None, :]
    return (other & (order[:, None] > order) & batch.step_mask[:, None, :]).sum(-1)


def _embed(body: nn.Module, tokens: Tensor) -> Tensor:
    return cast(Tensor, cast(Any, body).embed_tokens(tokens))


def unit_rms(x: Tensor) -> Tensor:
    return functional.rms_norm(x.float(), x.shape[-1:], eps=1e-6)
