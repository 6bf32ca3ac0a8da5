"""The visual term, equation 8: learnable image queries, a light connector and a diffusion head.

Queries `<boi> Q <eoi>` follow the history (Task 1) or P(h_t) alone (Task 2) in the text decoder.
Their states condition a head that denoises the target's frozen visual features (method 1.9).
`<boi>` and `<eoi>` are learned vectors instead of vocabulary tokens, since they are never needed
in serving.

Legend: B windows, M decoded positions, R = B M rows (or items of the warm-up), N_v image tokens
of width d_v, as many queries, K = N_v + 2 slots of a branch, D width of the decoder.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from karma_ray.data.batch import Batch
from karma_ray.data.draws import LEVEL, NOISE, hashed, normal, uniform
from karma_ray.model.backbone import run_body
from karma_ray.model.config import ImageryConfig
from karma_ray.model.decodability import Branch
from karma_ray.model.denoiser import Denoiser
from karma_ray.objectives.denoising import denoising


@dataclass(frozen=True)
class ImageShape:
    """Shape of one item's visual feature."""

    num_tokens: int  # N_v
    width: int  # d_v


@dataclass(frozen=True)
class ImageTargets:
    """Features to reconstruct, one row per decoded position or warm-up item."""

    feature: Tensor  # [R, N_v, d_v] zero where there is no image
    mask: Tensor  # [R]
    key: Tensor  # [R] for the random draws of the row

    @classmethod
    def of(cls, batch: Batch) -> ImageTargets:
        """Return the targets of the decoded positions, R = B M."""
        keys = hashed(batch.row_key.cpu().numpy()[:, None], batch.decode_step.cpu().numpy())
        return cls(
            batch.visual_feature.flatten(0, 1),
            (batch.visual_mask & batch.decode_mask).flatten(),
            torch.from_numpy(keys).flatten().to(batch.row_key.device),
        )

    def to(self, device: torch.device | str) -> ImageTargets:
        """Return the same targets on another device."""
        return ImageTargets(self.feature.to(device), self.mask.to(device), self.key.to(device))


class Imagery(nn.Module):
    """Image queries, connector and head; serving needs none of them."""

    def __init__(
        self, config: ImageryConfig, shape: ImageShape, embedding_rows: Tensor, seed: int
    ) -> None:
        """Initialise the queries at the scale of the decoder's input-embedding rows [V, D]."""
        super().__init__()
        self.config, self.shape = config, shape
        config.check()
        self.denoising = denoising(config.img_head, config.denoiser.times, config.denoiser.shift)
        self.num_draws = 1 if config.img_head == "mse" else config.img_draws
        width = embedding_rows.shape[1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            scale = embedding_rows.detach().float().pow(2).mean().sqrt().item()
            self.queries = nn.Parameter(scale * torch.randn(shape.num_tokens, width))
            self.begin = nn.Parameter(scale * torch.randn(width))
            self.end = nn.Parameter(scale * torch.randn(width))
            self.connector = nn.ModuleList(
                nn.TransformerEncoderLayer(
                    width, max(1, width // 64), 4 * width, 0.0, "gelu",
                    batch_first=True, norm_first=True,
                )
                for _ in range(config.img_connector)
            )  # fmt: skip
            noisy = config.img_head != "mse"
            self.head = Denoiser(shape.width, width, config.denoiser, sees_noise=noisy)

    @property
    def in_task1(self) -> bool:
        """Whether image queries follow the history."""
        return self.config.img_cond in ("both", "task1")

    @property
    def in_task2(self) -> bool:
        """Whether image queries follow h_t alone."""
        return self.config.img_cond in ("both", "task2")

    def block(self, count: int) -> Tensor:
        """Return `<boi> Q <eoi>` as decoder input, `count` times [count, K, D]."""
        return torch.cat([self.begin[None], self.queries, self.end[None]]).expand(count, -1, -1)

    def vector_states(self, body: nn.Module, vectors: Tensor, mask: Tensor) -> Tensor:
        """Run rows `P(x) <boi> Q <eoi>` of Task 2 and the warm-up, without text or history.

        vectors [R, D] already projected, mask [R] of the wanted rows -> states [R, K, D]. The
        queries attend to everything; P(x) attends to itself only.
        """
        count, slots = len(vectors), self.shape.num_tokens + 3
        block = self.block(count)
        soft = torch.cat([vectors[:, None].to(block.dtype), block], 1)
        visible = torch.ones(slots, slots, dtype=torch.bool, device=soft.device)
        visible[0, 1:] = False
        real = mask[:, None].expand(-1, slots)
        return run_body(body, soft, visible.expand(count, -1, -1), real=real)[:, 1:]

    def branch(self, mask: Tensor, after: Branch | None) -> Branch:
        """Return Task 1's bidirectional branch for rows [R] that have an image.

        Under `img_sees_text` it follows the text and attends to it.
        """
        block = self.block(len(mask))
        real = mask[:, None].expand(block.shape[:2])
        seen = after if self.config.img_sees_text else None
        return Branch(block, real, causal=False, after=seen)

    def conditions(self, states: Tensor) -> Tensor:
        """Map the states of a branch [R, K, D] to the head's conditions [R, N_v, D]."""
        told = states[:, 1:-1]
        for layer in self.connector:
            told = layer(told)
        return told

    def losses(self, states: Tensor, targets: ImageTargets) -> Tensor:
        """Return L_img per row [R], 0 without an image, from the states [R, K, D] of a branch.

        Noises and noise levels are drawn from the row's key, so that they do not depend on workers
        or micro-batches; both tasks of a step use the same ones. The levels of an image are
        stratified into `num_draws` equal parts.
        """
        mask, draws = targets.mask, self.num_draws
        # Without images the result keeps a zero gradient, so that all workers run the backward.
        clean, keys = targets.feature[mask], targets.key[mask].cpu().numpy()
        levels = (uniform(keys, LEVEL)[:, None] + np.arange(draws)) / draws
        level = torch.from_numpy(levels).flatten().to(mask.device, torch.float32)
        eps = normal(hashed(keys, NOISE), (draws, *clean.shape[1:]), mask.device).flatten(0, 1)
        conditions = self.conditions(states)[mask].repeat_interleave(draws, 0)
        clean = clean.repeat_interleave(draws, 0)
        values = self.denoising.loss(self.head, clean, conditions, level, eps)
        values = values.view(-1, draws).mean(1)
        return values.new_zeros(len(mask)).masked_scatter(mask, values)
