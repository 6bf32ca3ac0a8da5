"""The train-only half: Task 1 and Task 2 ask the embeddings for the target's text.

Decoders receive the shared backbone as a call argument; nothing here is part of what serves.

Legend: B windows, M decoded positions, R = B M rows, L text tokens, S prefix slots, D width.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from karma_ray.data.batch import Batch
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
    """From item tokens [R, L] that end in `<|endoftext|>`, lengths [R]."""
    words = (lengths - 1).clamp(max=max_tokens)
    width = int(words.max()) if len(words) else 0
    text = tokens[:, :width]
    position = torch.arange(width + 1, device=tokens.device)
    start = torch.full_like(text[:, :1], special.text_start)
    labels = functional.pad(text, (0, 1), value=special.text_end)
    labels = torch.where(position == words[:, None], special.text_end, labels)
    return TextTargets(torch.cat([start, text], 1), labels, position <= words[:, None])


def history_to_text(
    body: nn.Module, prefix: Prefix, batch: Batch, targets: TextTargets, *, see_readout: bool
) -> tuple[Tensor, Tensor]:
    """Task 1, equation 6, as branches of one pass.

    Branch k sees the prefix that its read-out p_k sees (with `see_readout`, p_k itself too) and
    its own text causally; its position ids restart at p_k + 1. The prefix sees no branch.
    Returns prefix states [B, S, D] and text states [R, L + 1, D].
    """
    num_windows, num_decoded = batch.decode_step.shape
    length = targets.inputs.shape[1]
    slots = prefix.layout.visible.shape[1]
    text = token_embeddings(body)[targets.inputs].view(num_windows, num_decoded * length, -1)
    readout = prefix.layout.readout.gather(1, batch.decode_step)  # [B, M]

    rows = readout[..., None].expand(-1, -1, slots)
    to_prefix = prefix.layout.visible.gather(1, rows)  # [B, M, S]
    if not see_readout:
        own = torch.arange(slots, device=readout.device) == readout[..., None]
        to_prefix = to_prefix & ~own
    order = torch.arange(num_decoded * length, device=readout.device)
    among = (order[:, None] // length == order[None, :] // length) & (
        order[:, None] >= order[None, :]
    )
    total = slots + len(order)
    visible = torch.zeros(num_windows, total, total, dtype=torch.bool, device=readout.device)
    visible[:, :slots, :slots] = prefix.layout.visible
    visible[:, slots:, :slots] = to_prefix.repeat_interleave(length, 1)
    visible[:, slots:, slots:] = among

    start = prefix.layout.positions.gather(1, readout)[..., None] + 1  # [B, M, 1]
    branch = (start + torch.arange(length, device=readout.device)).flatten(1)
    states = run_body(
        body,
        torch.cat([prefix.embeddings, text], 1),
        visible,
        torch.cat([prefix.layout.positions, branch], 1),
        torch.cat([prefix.layout.real, targets.mask.view(num_windows, -1)], 1),
    )
    return states[:, :slots], states[:, slots:].reshape(-1, length, states.shape[-1])


def vector_to_text(
    body: nn.Module,
    prompt: Tensor,
    vectors: Tensor,
    inputs: Tensor,
    mask: Tensor,
    condition: Tensor | None = None,
    condition_mask: Tensor | None = None,
) -> Tensor:
    """Rows `[prompt] P(x) <s> [query] w_1..w_L`: Task 2 (x = h_t) and the warm-up (x = e_i).

    prompt [n], vectors [R, D] already projected, inputs [R, L + 1] of which `mask` is wanted,
    condition [R, Lq] query tokens. Returns the states [R, L + 1, D] at
    the text, first at the token before w_1.
    """
    embed = token_embeddings(body)
    count = len(vectors)
    parts = [embed[prompt].expand(count, -1, -1), vectors[:, None].to(embed.dtype)]
    if condition is None or condition_mask is None:
        real = functional.pad(mask, (len(prompt) + 1, 0), value=True) & mask[:, :1]
        states = run_body(body, torch.cat([*parts, embed[inputs]], 1), real=real)
        return states[:, len(prompt) + 1 :]
    # `<s>` stands before the query, the text after it: w_1 is predicted at the query's end.
    parts += [embed[inputs[:, :1]], embed[condition], embed[inputs[:, 1:]]]
    soft = torch.cat(parts, 1)
    head = torch.ones(count, len(prompt) + 2, dtype=torch.bool, device=soft.device)
    used = torch.cat([head, condition_mask, torch.ones_like(mask[:, 1:])], 1)
    real = torch.cat([head, condition_mask, mask[:, 1:]], 1) & mask[:, :1]
    order = torch.arange(soft.shape[1], device=soft.device)
    visible = (order[:, None] >= order[None, :]) & used[:, None, :]
    positions = used.long().cumsum(1) - 1
    states = run_body(body, soft, visible, positions.clamp(min=0), real)
    first = len(prompt) + 1 + condition_mask.sum(1)  # last real slot before w_1
    begin = states[torch.arange(count, device=soft.device), first]
    return torch.cat([begin[:, None], states[:, len(prompt) + 2 + condition.shape[1] :]], 1)


class Decodability(nn.Module):
    """Weights that only Task 2's variants need; the default (`shared`) has none of its own."""

    prompt: Tensor

    def __init__(
        self, config: DecodabilityConfig, body: nn.Module, projector: nn.Module, prompt: list[int]
    ) -> None:
        """Private copies start from the (warmed-up) `body` and `projector`."""
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
        """The body that decodes in Task 2."""
        return self.body if hasattr(self, "body") else shared

    def project(self, shared: nn.Module, vectors: Tensor) -> Tensor:
        """P or its private copy: [R, D] -> soft tokens [R, D]."""
        projector = self.projector if hasattr(self, "projector") else shared
        projected: Tensor = projector(vectors)
        return projected
