"""Decodability, used only in training: Task 1 and Task 2 decode the target's text from embeddings.

Decoders receive the shared backbone as an argument of the call; serving needs nothing of this.

Task 1 appends branches to positions of the history, in one pass of the decoder:

    PREFIX          attends to itself as its layout says; never to a branch
    TXT_k, IMG_k    attend to the prefix up to the read-out p_k and to themselves, but not to
                    branches of other positions

Legend: B windows, M decoded positions, R = B M rows, L text tokens or slots of a branch, S prefix
slots, E slots of all branches of a window, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from karma_ray.data.batch import Batch, host_of, upload
from karma_ray.data.draws import TEXTS, hashed
from karma_ray.data.prompts import SpecialIds
from karma_ray.errors import InputError
from karma_ray.model.backbone import run_body, token_embeddings, truncated
from karma_ray.model.config import DecodabilityConfig
from karma_ray.model.lora import set_trained
from karma_ray.model.user_decoder import Prefix


@dataclass(frozen=True)
class TextTargets:
    """Teacher-forced text: inputs `<s> w_1..w_L`, labels `w_1..w_L <e>`."""

    inputs: Tensor  # [R, L + 1]
    labels: Tensor  # [R, L + 1]
    mask: Tensor  # [R, L + 1] real labels


def text_targets(
    tokens: Tensor, lengths: Tensor, special: SpecialIds, max_tokens: int
) -> TextTargets:
    """Build targets from item tokens [R, L], which end with the end of text, and lengths [R]."""
    counts = (host_of(lengths) - 1).clamp(max=max_tokens)
    width = int(counts.max()) if len(counts) else 0
    words, text = upload(counts, tokens.device), tokens[:, :width]
    position = torch.arange(width + 1, device=tokens.device)
    mask = upload(torch.arange(width + 1) <= counts[:, None], tokens.device)
    start = torch.full_like(text[:, :1], special.text_start)
    labels = functional.pad(text, (0, 1), value=special.text_end)
    labels = torch.where(position == words[:, None], special.text_end, labels)
    return TextTargets(torch.cat([start, text], 1), labels, mask)


def shuffled_text(targets: TextTargets, items: Tensor, key: int) -> TextTargets:
    """Return the texts of other items among the same rows; items [R] are catalogue rows.

    Rows are sorted in an order drawn from `key`, with equal items adjacent. Each row takes the
    text that is as many rows further as the most frequent item has. A row that still meets its
    own item (if one item fills more than half of the rows) decodes nothing.
    """
    items, wanted, device = host_of(items), host_of(targets.mask), targets.mask.device
    rows = torch.nonzero(wanted.any(1)).flatten()
    if not len(rows):
        return targets
    found = items[rows].numpy()
    order = rows[torch.from_numpy(hashed(key, TEXTS, found).argsort(kind="stable"))]
    source = torch.arange(len(items))
    source[order] = order.roll(-int(np.unique(found, return_counts=True)[1].max()))
    mask = upload(wanted[source] & (items[source] != items)[:, None], device)
    source = upload(source, device)
    return TextTargets(targets.inputs[source], targets.labels[source], mask)


@dataclass(frozen=True)
class Branch:
    """One kind of branch, with one instance at every decoded position."""

    embeddings: Tensor  # [R, L, D]
    real: Tensor  # [R, L]
    causal: bool  # each slot attends to earlier ones; otherwise all attend to all
    after: Branch | None = None  # the branch of the same position that it follows and attends to


def run_branches(
    body: nn.Module, prefix: Prefix, batch: Batch, branches: Sequence[Branch], *, see_readout: bool
) -> tuple[Tensor, list[Tensor]]:
    """Return the prefix states [B, S, D] and those of each branch [R, L, D].

    A branch attends to what its read-out p_k attends to and, with `see_readout`, to p_k itself.
    """
    num_windows, num_decoded = batch.decode_step.shape
    slots = prefix.layout.visible.shape[1]
    readout = prefix.layout.readout.gather(1, batch.decode_step)  # [B, M]
    to_prefix = prefix.layout.visible.gather(1, readout[..., None].expand(-1, -1, slots))
    if not see_readout:
        to_prefix &= torch.arange(slots, device=readout.device) != readout[..., None]
    kind, owner, place = _places(branches, num_decoded, readout.device)  # [E]
    planned = torch.cat([host_of(branch.real).reshape(num_windows, -1) for branch in branches], 1)
    real = upload(planned, readout.device)  # [B, E]
    among = _among(branches, kind, place) & (owner[:, None] == owner)

    total = slots + len(kind)
    visible = torch.zeros(num_windows, total, total, dtype=torch.bool, device=real.device)
    visible[:, :slots, :slots] = prefix.layout.visible
    visible[:, slots:, :slots] = to_prefix[:, owner]
    visible[:, slots:, slots:] = among & real[:, None]
    start = prefix.layout.positions.gather(1, readout)[:, owner] + 1
    behind = torch.cat([_before(branch).reshape(num_windows, -1) for branch in branches], 1)
    width = prefix.embeddings.shape[-1]
    soft = [branch.embeddings.reshape(num_windows, -1, width) for branch in branches]
    states = run_body(
        body,
        torch.cat([prefix.embeddings, *soft], 1),
        visible,
        torch.cat([prefix.layout.positions, start + behind + place], 1),
        upload(torch.cat([host_of(prefix.layout.real), planned], 1), real.device),
    )
    parts = torch.split(states[:, slots:], [part.shape[1] for part in soft], 1)
    return states[:, :slots], [
        part.reshape(*branch.real.shape, -1) for part, branch in zip(parts, branches, strict=True)
    ]


def _places(
    branches: Sequence[Branch], num_decoded: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the branch kind, decoded position and index in the branch of each slot [E]."""
    found = []
    for number, branch in enumerate(branches):
        slot = torch.arange(num_decoded * branch.real.shape[1], device=device)
        length = branch.real.shape[1]
        found.append(torch.stack([torch.full_like(slot, number), slot // length, slot % length]))
    kind, owner, place = torch.cat(found, 1)
    return kind, owner, place


def _among(branches: Sequence[Branch], kind: Tensor, place: Tensor) -> Tensor:
    """Return the attention mask [E, E] between slots of the same position."""
    earlier = place[:, None] >= place
    among = torch.zeros_like(earlier)
    for row, branch in enumerate(branches):
        for column, other in enumerate(branches):
            pairs = (kind == row)[:, None] & (kind == column)
            if row == column:
                among |= pairs & earlier if branch.causal else pairs
            elif other is branch.after:
                among |= pairs
    return among


def _before(branch: Branch) -> Tensor:
    """Count, for each slot [R, L], the real slots of its position between p_k and the branch."""
    if branch.after is None:
        return torch.zeros_like(branch.real, dtype=torch.long)
    return branch.after.real.sum(1, keepdim=True).expand(branch.real.shape)


def history_to_text(
    body: nn.Module, prefix: Prefix, batch: Batch, targets: TextTargets, *, see_readout: bool
) -> tuple[Tensor, Tensor]:
    """Task 1, equation 6: returns prefix states [B, S, D] and text states [R, L + 1, D]."""
    text = text_branch(body, targets)
    states, (found,) = run_branches(body, prefix, batch, [text], see_readout=see_readout)
    return states, found


def text_branch(body: nn.Module, targets: TextTargets) -> Branch:
    """Return the causal branch with `<s>` and the target's text."""
    return Branch(token_embeddings(body)[targets.inputs], targets.mask, causal=True)


def vector_to_text(
    body: nn.Module,
    prompt: Tensor,
    vectors: Tensor,
    inputs: Tensor,
    mask: Tensor,
    condition: Tensor | None = None,
    condition_mask: Tensor | None = None,
) -> Tensor:
    """Decode rows `[prompt] P(x) <s> [query] w_1..w_L`: Task 2 (x = h_t), warm-up (x = e_i).

    prompt [n], vectors [R, D] already projected, inputs [R, L + 1] with a `mask` of the wanted
    ones, condition [R, Lq] query tokens. Returns the states [R, L + 1, D] at the text, starting
    with the token before w_1.
    """
    embed = token_embeddings(body)
    count = len(vectors)
    parts = [embed[prompt].expand(count, -1, -1), vectors[:, None].to(embed.dtype)]
    if condition is None or condition_mask is None:
        wanted = host_of(mask)
        real = functional.pad(wanted, (len(prompt) + 1, 0), value=True) & wanted[:, :1]
        states = run_body(
            body, torch.cat([*parts, embed[inputs]], 1), real=upload(real, mask.device)
        )
        return states[:, len(prompt) + 1 :]
    # `<s>` precedes the query and the text follows it: w_1 is predicted at the query's last token.
    parts += [embed[inputs[:, :1]], embed[condition], embed[inputs[:, 1:]]]
    soft = torch.cat(parts, 1)
    head = torch.ones(count, len(prompt) + 2, dtype=torch.bool)
    used = torch.cat([upload(head, soft.device), condition_mask, torch.ones_like(mask[:, 1:])], 1)
    wanted = host_of(mask)
    planned = torch.cat([head, host_of(condition_mask), wanted[:, 1:]], 1) & wanted[:, :1]
    order = torch.arange(soft.shape[1], device=soft.device)
    visible = (order[:, None] >= order[None, :]) & used[:, None, :]
    positions = used.long().cumsum(1) - 1
    real = upload(planned, mask.device)
    states = run_body(body, soft, visible, positions.clamp(min=0), real)
    first = len(prompt) + 1 + condition_mask.sum(1)  # last real slot before w_1
    begin = states[torch.arange(count, device=soft.device), first]
    return torch.cat([begin[:, None], states[:, len(prompt) + 2 + condition.shape[1] :]], 1)


class Decodability(nn.Module):
    """Modules of Task 2's variants; the default (`shared`) has no weights."""

    prompt: Tensor

    def __init__(
        self, config: DecodabilityConfig, body: nn.Module, projector: nn.Module, prompt: list[int]
    ) -> None:
        """Create private copies, if any, from the (warmed-up) `body` and `projector`."""
        super().__init__()
        self.config = config
        self.register_buffer("prompt", torch.tensor(prompt, dtype=torch.long))
        kind, _, layers = config.recon_decoder.partition(":")
        if kind in ("separate", "frozen") and not layers:
            self.body = copy.deepcopy(body)
            set_trained(self.body, kind == "separate")
        elif kind == "light" and layers.isdigit():
            self.body = truncated(body, int(layers))
        elif config.recon_decoder != "shared":
            raise InputError(
                "model.decodability.recon_decoder", config.recon_decoder,
                choices=["shared", "separate", "frozen", "light:K"],
            )  # fmt: skip
        if not config.share_projector:
            self.projector = copy.deepcopy(projector)

    def decoder(self, shared: nn.Module) -> nn.Module:
        """Return the body that decodes in Task 2."""
        return self.body if hasattr(self, "body") else shared

    def project(self, shared: nn.Module, vectors: Tensor) -> Tensor:
        """Apply P or its private copy: [R, D] -> soft tokens [R, D]."""
        projector = self.projector if hasattr(self, "projector") else shared
        projected: Tensor = projector(vectors)
        return projected
