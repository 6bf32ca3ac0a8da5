"""E_phi, equation 2: an item's text -> one embedding token.

Legend: U items, L tokens, D width of h and e.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from karma_ray.model.adapters import rms_normalize
from karma_ray.model.backbone import hidden_size, run_body, token_embeddings
from karma_ray.model.config import ItemEncoderConfig


class ItemEncoder(nn.Module):
    """Backbone, pooling and W_e: e = RMSNorm(W_e e_raw), METHOD 1.2."""

    instruction: Tensor

    def __init__(
        self,
        body: nn.Module,
        config: ItemEncoderConfig,
        width: int,
        instruction: list[int],
        seed: int,
    ) -> None:
        super().__init__()
        self.config, self.body = config, body
        generator = torch.Generator().manual_seed(seed)
        raw = hidden_size(body)
        self.output = nn.Linear(raw, width, bias=False)
        nn.init.orthogonal_(self.output.weight, generator=generator)
        if config.pool == "emb_token":
            self.item_token = nn.Parameter(0.02 * torch.randn(raw, generator=generator))
        self.register_buffer("instruction", torch.tensor(instruction, dtype=torch.long))

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Right-padded tokens [U, L] ending in `<|endoftext|>`, lengths [U] -> e [U, D]."""
        prefix = self.instruction.expand(len(tokens), -1)
        embeddings = token_embeddings(self.body)[torch.cat([prefix, tokens], 1)]
        last = lengths + prefix.shape[1] - 1
        rows = torch.arange(len(tokens), device=tokens.device)
        if self.config.pool == "emb_token":
            at_last = torch.zeros(embeddings.shape[:2], dtype=torch.bool, device=tokens.device)
            at_last[rows, last] = True
            embeddings = torch.where(at_last[..., None], self.item_token, embeddings)
        # Padding lies to the right of a causal model: it changes nothing before it.
        states = run_body(self.body, embeddings)
        if self.config.pool == "mean":
            real = torch.arange(states.shape[1], device=tokens.device) <= last[:, None]
            pooled = (states * real[..., None]).sum(1) / real.sum(1, keepdim=True)
        else:
            pooled = states[rows, last]
        return rms_normalize(self.output(pooled))
