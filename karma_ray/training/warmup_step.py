"""The training step of the warm-up (stage 1), and the batches of texts that it reads.

Legend: R texts, L tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from karma_ray.data.batch import host_of, upload
from karma_ray.model.imagery import ImageTargets
from karma_ray.model.karma import KarmaModel
from karma_ray.training.parallel import global_sum
from karma_ray.training.step import StepOutput, decoded_losses
from karma_ray.training.step_state import AT_THE_END, StepState


@dataclass(frozen=True)
class TokenBatch:
    """Item texts of pretraining and warm-up."""

    tokens: Tensor  # [R, L]
    lengths: Tensor  # [R]
    images: ImageTargets | None = None
    rows: Tensor | None = None  # [R] of the catalogue, for multimodal item encoders

    def to(self, device: torch.device | str) -> TokenBatch:
        """Return the same batch on another device."""
        images = None if self.images is None else self.images.to(device)
        rows = None if self.rows is None else upload(self.rows, device)
        return TokenBatch(upload(self.tokens, device), upload(self.lengths, device), images, rows)


@dataclass(frozen=True)
class WarmupStep:
    """Stage 1 (method 1.10): decode an item's text, and image, from its embedding alone."""

    lambda_img: float = 0.0  # L_warm = CE + lambda_img L_img

    def __call__(
        self, model: nn.Module, batch: TokenBatch, state: StepState = AT_THE_END
    ) -> StepOutput:
        """Return the mean over items of the token-mean cross-entropy, plus L_img if built."""
        assert isinstance(model, KarmaModel)
        items = model.interest.encode_items(batch.tokens, batch.lengths, batch.rows)
        values = decoded_losses(
            model.decode_items(batch.tokens, batch.lengths, items), "token_mean"
        )
        loss = values.sum() / global_sum(values.new_tensor(float(len(values))))
        logs: dict[str, Tensor | float] = {"loss/warmup": global_sum(loss.detach())}
        if batch.images is not None and self.lambda_img:
            count = global_sum(batch.images.mask.sum()).clamp(min=1)
            image = model.image_losses(items, batch.images).sum() / count
            logs["loss/image"] = global_sum(image.detach())
            loss = loss + self.lambda_img * image
        return StepOutput(loss, {**logs, "tokens": float(host_of(batch.lengths).sum())})

    @torch.no_grad()
    def gap(self, model: KarmaModel, batch: TokenBatch) -> float:
        """Return CE(shuffled e) - CE(e) in nats per token: 0 when the decoder ignores e."""
        items = model.interest.encode_items(batch.tokens, batch.lengths, batch.rows)
        own = decoded_losses(model.decode_items(batch.tokens, batch.lengths, items), "token_mean")
        other = items.roll(1, 0)
        shuffled = decoded_losses(
            model.decode_items(batch.tokens, batch.lengths, other), "token_mean"
        )
        return float((shuffled - own).mean())
