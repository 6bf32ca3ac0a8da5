"""An LLM with summary tokens behind an item's text (QARM V2, 2602.08559): embedding and generation.

A row is [text of an item][K summary tokens][text of a related item] under the mask of
`three_segments`. The summary tokens stand where the end of text stood, each at that position; their
states become the item's embedding, and the related text is predicted from them alone.
Legend: R rows, L tokens of a text, K summary tokens, G generated tokens, d width of the LLM, D
learned width of e.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from karma_ray.codes.segments import GENERATED, PADDING, SUMMARY, TEXT, three_segments
from karma_ray.data.batch import host_of, upload
from karma_ray.model.adapters import rms_normalize
from karma_ray.model.backbone import hidden_size, run_body, token_embeddings
from karma_ray.model.decodability import TextTargets
from karma_ray.model.item_encoder import ItemEncoder
from karma_ray.objectives.text import token_cross_entropy

APART = 0.1
"""Scale, relative to the rows for tokens, of what tells the second and later summary tokens apart
from the first; without it all of them would learn the same."""
RIDGE = 1e-3
"""Share of the mean variance that is added where a map to the run's own vectors is fitted."""


class Summarizer(nn.Module):
    """e = RMSNorm(W s + b), where s is the mean of the summary states.

    It shares the LLM of an item encoder. It starts from the encoder's pooled token and from its map
    of pooled states, so that with one summary token e is the encoder's own, unless that takes the
    mean of all states or reads pictures: then see `fit`. The head [V, d] of the LLM is its rows for
    tokens where none is given.
    """

    instruction: Tensor

    def __init__(
        self, encoder: ItemEncoder, end_of_text: int, num_summary: int, head: Tensor | None = None,
        seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.body = encoder.body
        learned = encoder.config.pool == "emb_token"
        rows = token_embeddings(self.body).detach()
        start = encoder.item_token.detach() if learned else rows[end_of_text]
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(num_summary, hidden_size(self.body), generator=generator)
        noise[0] = 0.0
        scale = APART * float(rows.float().pow(2).mean().sqrt())
        self.summary = nn.Parameter(start + scale * noise.to(start))
        weight, mean = encoder.output.weight.detach(), encoder.mean
        self.output = nn.Linear(weight.shape[1], weight.shape[0])
        with torch.no_grad():
            self.output.weight.copy_(weight)
            self.output.bias.copy_(-(weight @ mean))
        if head is not None:
            self.lm_head = nn.Parameter(head)
        self.register_buffer("instruction", encoder.instruction.clone())

    @property
    def head(self) -> Tensor:
        """The output embeddings [V, d]."""
        return self.lm_head if hasattr(self, "lm_head") else token_embeddings(self.body)

    def forward(
        self, tokens: Tensor, lengths: Tensor, targets: TextTargets | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return s [R, d], and the states [R, G, d] that predict `targets`, G = 0 without any.

        Takes right-padded tokens [R, L] with an end of text, and lengths [R], as an item encoder.
        """
        rows, device = len(tokens), tokens.device
        num_summary = len(self.summary)
        prefix = self.instruction.expand(rows, -1)
        text = torch.cat([prefix, tokens[:, :-1]], 1)  # the end of text gives way
        ends = host_of(lengths) + prefix.shape[1] - 1
        is_text = torch.arange(text.shape[1]) < ends[:, None]
        parts = [torch.where(is_text, TEXT, PADDING), torch.full((rows, num_summary), SUMMARY)]
        places = [
            torch.arange(text.shape[1]).expand(rows, -1),
            ends[:, None].expand(-1, num_summary),
        ]
        embed = token_embeddings(self.body)
        soft = [embed[text], self.summary.to(embed.dtype).expand(rows, -1, -1)]
        if targets is not None:
            generated = torch.arange(targets.inputs.shape[1])
            parts.append(torch.where(host_of(targets.mask), GENERATED, PADDING))
            places.append(ends[:, None] + 1 + generated)
            soft.append(embed[targets.inputs])
        segments = torch.cat(parts, 1)
        states = run_body(
            self.body, torch.cat(soft, 1), upload(three_segments(segments), device),
            upload(torch.cat(places, 1), device), upload(segments != PADDING, device),
        )  # fmt: skip
        behind = text.shape[1] + num_summary
        return states[:, text.shape[1] : behind].float().mean(1), states[:, behind:]

    def embed(self, summaries: Tensor) -> Tensor:
        """Return e [R, D] of s [R, d]."""
        return rms_normalize(self.output(summaries))

    def text_losses(self, states: Tensor, targets: TextTargets) -> Tensor:
        """Return the cross-entropy [R, G] of targets in nats, 0 where none is."""
        return token_cross_entropy(states, self.head, targets.labels, targets.mask)

    @torch.no_grad()
    def fit(self, summaries: Tensor, vectors: Tensor) -> None:
        """Set W and b to the least squares from s [R, d] to the run's own e [R, D]."""
        found, wanted = summaries.double(), vectors.double()
        centred = found - found.mean(0)
        square = centred.T @ centred
        ridge = RIDGE * square.diagonal().mean() * torch.eye(len(square), dtype=square.dtype)
        weight = torch.linalg.solve(square + ridge.to(square), centred.T @ wanted).T
        self.output.weight.copy_(weight)
        self.output.bias.copy_(wanted.mean(0) - weight @ found.mean(0))
