"""The user decoder D_theta, equation 3: history of (query, item) pairs and query -> interest h_t.

Legend: B windows, T steps, U items, V queries, W query slots, S slots, D width (of e and h:
including the K dimensions of the lexical block, if used).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from karma_ray.data.batch import Batch, host_of, upload
from karma_ray.errors import InputError
from karma_ray.model.adapters import SoftToken, rms_normalize
from karma_ray.model.backbone import hidden_size, run_body, token_embeddings
from karma_ray.model.config import UserDecoderConfig
from karma_ray.model.layout import Layout, build_layout, num_query_slots, other_group_steps
from karma_ray.model.lexical import length_ratio


@dataclass(frozen=True)
class Prefix:
    """The decoder's input for a batch: soft tokens and their layout."""

    embeddings: Tensor  # [B, S, D]
    layout: Layout
    words: Tensor | None = None  # [B, T, K] lexical part of the history, if items have one


class UserDecoder(nn.Module):
    """Backbone, prompt, projector P, query embedding and the read-out W_h.

    If items have a lexical block, h = norm([norm(W_h s) ; w m]): m is the blocks' mean over the
    history, scaled to the length of the learned part, and w is one learned number. A layer from s
    into the lexical part was tried; it memorised the training clicks (docs/log.md, L24).
    """

    prompt: Tensor

    def __init__(
        self, body: nn.Module, config: UserDecoderConfig, prompt: list[int], lexical: int = 0
    ) -> None:
        """`lexical` is the number of dimensions that the lexical block adds to h and e."""
        super().__init__()
        if config.query_mode == "tokens" and config.layout != "query_last":
            raise InputError(
                "model.user_decoder.query_mode", "tokens",
                f"needs layout query_last, not {config.layout}",
                choices=["embed_pool", "encoder", "none"],
            )  # fmt: skip
        if not prompt:
            raise InputError("model.user_decoder.prompt", config.prompt, "needs at least one token")
        self.config, self.body = config, body
        width = hidden_size(body)
        rows = token_embeddings(body)
        self.projector = SoftToken(width + lexical, rows, normalize=True)
        if config.query_mode == "embed_pool":
            self.query_embedding = SoftToken(width, rows, normalize=False)
        self.no_query = nn.Parameter(rows.detach().mean(0).clone())
        self.readout = nn.Linear(width, width, bias=False)
        nn.init.eye_(self.readout.weight)
        if lexical:
            self.lexical_weight = nn.Parameter(torch.ones(()))
            self.lexical_scale = length_ratio(width, lexical)
        self.register_buffer("prompt", torch.tensor(prompt, dtype=torch.long))

    def prefix(self, batch: Batch, items: Tensor, queries: Tensor | None) -> Prefix:
        """Build the input of a batch.

        `items` [U, D] are the embeddings of the batch's unique items. `queries` [V, D] are the
        embeddings of its unique queries by E_phi under query_mode `encoder`, otherwise None.
        """
        width = num_query_slots(self.config, batch.query_lengths)
        query_tokens, lengths = self.soft_queries(
            batch.query_tokens, batch.query_lengths, queries, width
        )  # [V, W, D], [V]
        used = upload(lengths[host_of(batch.query_index)], batch.group.device)
        layout = build_layout(
            self.config.layout, len(self.prompt), used, width,
            batch.group, batch.item_mask, batch.step_mask,
        )  # fmt: skip
        soft_items = self.projector(items)[batch.item_index][:, :, None]  # [B, T, 1, D]
        blocks = torch.cat([query_tokens[batch.query_index], soft_items], 2)  # [B, T, W + 1, D]
        prompt = token_embeddings(self.body)[self.prompt].expand(batch.num_windows, -1, -1)
        words, width = None, prompt.shape[-1]
        if items.shape[1] > width:
            words = history_means(batch, items[:, width:])
        return Prefix(torch.cat([prompt, blocks.flatten(1, 2)], 1), layout, words)

    def run(self, prefix: Prefix) -> Tensor:
        """Return the last hidden states [B, S, D]."""
        return run_body(
            self.body, prefix.embeddings, prefix.layout.visible, prefix.layout.positions,
            prefix.layout.real,
        )  # fmt: skip

    def interest(self, states: Tensor, prefix: Prefix) -> Tensor:
        """Read h [B, T, D] from the states [B, >= S, D] of a prefix."""
        index = prefix.layout.readout[..., None].expand(-1, -1, states.shape[-1])
        return self.read(states.gather(1, index), prefix.words)

    def read(self, states: Tensor, words: Tensor | None) -> Tensor:
        """Read h [..., D] from states at read-out slots; `words` [..., K] as in a Prefix."""
        h = rms_normalize(self.readout(states))
        if words is None:
            return h
        words = self.lexical_weight * self.lexical_scale * words
        return rms_normalize(torch.cat([h, words], -1))

    def soft_queries(
        self, tokens: Tensor, token_counts: Tensor, encoded: Tensor | None, width: int
    ) -> tuple[Tensor, Tensor]:
        """Return soft tokens [V, W, D] of unique queries; their used slots [V] on the host.

        `tokens` [V, Lq] and their counts [V], 0 for no query; `encoded` as in `prefix`.
        """
        missing = (token_counts == 0) | (self.config.query_mode == "none")
        no_query = self.no_query.expand(len(missing), width, -1)
        rows = token_embeddings(self.body)[tokens]  # [V, Lq, D]
        lengths = torch.ones_like(host_of(token_counts))
        if self.config.query_mode == "tokens":
            soft = rows[:, :width]
            soft = functional.pad(soft, (0, 0, 0, width - soft.shape[1]))
            lengths = host_of(token_counts).clamp(min=1)
        elif self.config.query_mode == "encoder" and encoded is not None:
            soft = self.projector(encoded)[:, None]
        elif self.config.query_mode == "embed_pool":
            real = torch.arange(rows.shape[1], device=rows.device) < token_counts[:, None]
            pooled = (rows * real[..., None]).sum(1) / real.sum(1, keepdim=True).clamp(min=1)
            soft = self.query_embedding(pooled)[:, None]
        else:
            soft = no_query
        return torch.where(missing[:, None, None], no_query, soft), lengths


def history_means(batch: Batch, items: Tensor) -> Tensor:
    """Return the mean [B, T, D] of the items of earlier steps, normalised; 0 without any.

    Steps of a step's own group (its result page, or equal times) are excluded.
    """
    seen = other_group_steps(batch.group, batch.item_mask & batch.step_mask).to(items.dtype)
    return rms_normalize(seen @ items[batch.item_index])
