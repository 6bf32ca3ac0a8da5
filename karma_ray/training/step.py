"""One training step of each stage: a batch in, a loss and its logs out.

A loss is this worker's *sum* divided by a *global* count, so gradients are to be summed over
workers, and one worker, many workers and accumulation agree.

Legend: B windows, T steps, N trained steps, P pool of positives, H hard negatives, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from karma_ray.data.batch import Batch
from karma_ray.metrics.collapse import effective_rank, mean_cosine
from karma_ray.model.backbone import run_body, token_embeddings
from karma_ray.model.karma import Decoded, KarmaModel
from karma_ray.objectives.action import ACTION_LOSSES, pair_weights
from karma_ray.objectives.losses import (
    LossTerms,
    ObjectiveConfig,
    builds_generation,
    builds_reconstruction,
    hard_weight_at,
)
from karma_ray.objectives.negatives import first_occurrences, hard_negative_mask, in_batch_mask
from karma_ray.objectives.text import reduce_tokens, token_cross_entropy
from karma_ray.training.parallel import all_gather_ints, all_gather_rows, global_sum


@dataclass(frozen=True)
class StepOutput:
    """What the loop needs of a step."""

    loss: Tensor  # scalar: this worker's share of the global loss
    logs: dict[str, Tensor | float]  # global values; `tokens` and `examples` are this worker's


Step = Callable[[nn.Module, Any], StepOutput]


@dataclass(frozen=True)
class TokenBatch:
    """Item texts of pretraining and warm-up."""

    tokens: Tensor  # [R, L]
    lengths: Tensor  # [R]

    def to(self, device: torch.device | str) -> TokenBatch:
        """The same batch on another device."""
        return TokenBatch(self.tokens.to(device), self.lengths.to(device))


@dataclass(frozen=True)
class PretrainStep:
    """Causal language modelling of `text <|endoftext|>` on a bare body with tied head."""

    def __call__(self, body: nn.Module, batch: TokenBatch) -> StepOutput:
        """Mean cross-entropy per token."""
        embed = token_embeddings(body)
        states = run_body(body, embed[batch.tokens[:, :-1]])
        labels = batch.tokens[:, 1:]
        mask = torch.arange(labels.shape[1], device=labels.device) < batch.lengths[:, None] - 1
        values = token_cross_entropy(states, embed, labels, mask)
        loss = values.sum() / global_sum(mask.sum()).clamp(min=1)
        return StepOutput(
            loss, {"loss/pretrain": global_sum(loss.detach()), "tokens": float(batch.lengths.sum())}
        )


@dataclass(frozen=True)
class WarmupStep:
    """Stage 1 (METHOD 1.10): decode an item's text from its isolated embedding."""

    train: str = "decoder"

    def __call__(self, model: nn.Module, batch: TokenBatch) -> StepOutput:
        """Mean over items of the token-mean cross-entropy."""
        assert isinstance(model, KarmaModel)
        items = model.interest.encode_items(batch.tokens, batch.lengths)
        values = decoded_losses(
            model.decode_items(batch.tokens, batch.lengths, items), "token_mean"
        )
        loss = values.sum() / global_sum(values.new_tensor(float(len(values))))
        return StepOutput(
            loss, {"loss/warmup": global_sum(loss.detach()), "tokens": float(batch.lengths.sum())}
        )

    @torch.no_grad()
    def gap(self, model: KarmaModel, batch: TokenBatch) -> float:
        """CE(shuffled e) - CE(e) in nats per token: 0 when the decoder ignores the item."""
        items = model.interest.encode_items(batch.tokens, batch.lengths)
        own = decoded_losses(model.decode_items(batch.tokens, batch.lengths, items), "token_mean")
        other = items.roll(1, 0)
        shuffled = decoded_losses(
            model.decode_items(batch.tokens, batch.lengths, other), "token_mean"
        )
        return float((shuffled - own).mean())


@dataclass(frozen=True)
class JointStep:
    """Stage 2: L_act + lambda_dec (L_gen + L_recon) on behaviour sequences."""

    objective: ObjectiveConfig
    encoder_grad: str = "full"
    encoder_delay: float = 0.0

    def __call__(self, model: nn.Module, batch: Batch) -> StepOutput:
        """Equations 5 to 7 on one batch."""
        assert isinstance(model, KarmaModel)
        objective = self.objective
        items = self.encode(model, batch)
        history = self._history(model, batch, items)
        text: Decoded | None = None
        if builds_generation(objective):
            interest, text = model.forward_with_text(batch, history)
        else:
            interest = model.interest.interest(batch, history)
        with torch.autocast(interest.device.type, enabled=False):
            action, logs = action_loss(model, batch, interest, items.float(), objective)
        decoded = batch.decode_mask.flatten()
        count = global_sum(decoded.sum()).clamp(min=1)

        def mean(task: Decoded) -> Tensor:
            values = decoded_losses(task, objective.ce_reduction)
            return (values * decoded).sum() / count

        reconstruction = None
        if builds_reconstruction(objective):
            reconstruction = mean(model.decode_interest(batch, decoded_interest(batch, interest)))
        terms = LossTerms(action, None if text is None else mean(text), reconstruction)
        total = terms.total(objective)
        named = {**terms.named(), "loss/total": total}
        shared = global_sum(torch.stack([term.detach().float() for term in named.values()]))
        logs.update(zip(named, shared, strict=True))
        logs["tokens"], logs["examples"] = float(batch.num_tokens), float(batch.num_windows)
        return StepOutput(total, logs)

    def is_delayed(self, progress: float) -> bool:
        """Whether the item encoder has yet to start at this share of the training."""
        return progress < self.encoder_delay

    def is_frozen(self, progress: float) -> bool:
        """Whether the item encoder stands still at this share of the training."""
        return self.encoder_grad == "frozen" or self.is_delayed(progress)

    def encode(self, model: KarmaModel, batch: Batch) -> Tensor:
        """e [U, D] of the batch's unique items; without gradient while the encoder is frozen."""
        if self.is_frozen(model.progress):
            if model.bank is not None:
                return model.bank[batch.item_rows]
            with torch.no_grad():
                return model.interest.encode_items(batch.item_tokens, batch.item_lengths)
        return model.interest.encode_items(batch.item_tokens, batch.item_lengths)

    def _history(self, model: KarmaModel, batch: Batch, items: Tensor) -> Tensor:
        """What the history is read through: live embeddings, or the cached bank."""
        if self.encoder_grad != "targets_only" or self.is_frozen(model.progress):
            return items
        if model.bank is None:
            return items.detach()
        return model.bank[batch.item_rows]

    @torch.no_grad()
    def probe(self, model: KarmaModel, batch: Batch) -> dict[str, float]:
        """Collapse probes of one batch: decode gap, effective rank and mean cosine of e and h.

        The gap, CE(shuffled h) - CE(h) in nats per token, is measured through Task 2's decoder
        whether or not this run trains it: it says whether h still holds the target's words.
        """
        items = self.encode(model, batch)
        interest = model.interest.interest(batch, self._history(model, batch, items))
        decoded = batch.decode_mask.flatten()
        rows = decoded_interest(batch, interest)
        other = rows.clone()
        other[decoded] = rows[decoded].roll(1, 0)

        def losses(interest: Tensor) -> Tensor:
            task = model.decode_interest(batch, interest, dropout=False)
            return decoded_losses(task, "token_mean")[decoded]

        own, shuffled = losses(rows), losses(other)
        trained = interest[batch.loss_mask].float()
        return {
            "decode_gap": float((shuffled - own).mean()),
            "decode_ce": float(own.mean()),
            "collapse/effective_rank_e": float(effective_rank(items.float())),
            "collapse/effective_rank_h": float(effective_rank(trained)),
            "collapse/mean_cosine_e": float(mean_cosine(items.float())),
            "collapse/mean_cosine_h": float(mean_cosine(trained)),
        }


def action_loss(
    model: KarmaModel, batch: Batch, interest: Tensor, items: Tensor, objective: ObjectiveConfig
) -> tuple[Tensor, dict[str, Tensor | float]]:
    """L_act (equation 5) of the trained steps and the number of surviving negatives.

    Local anchors meet the positives of all workers, gathered with gradient and deduplicated by
    content; hard negatives stay local to their step.
    """
    trained = batch.loss_mask
    if objective.act_positions == "last":
        order = torch.arange(trained.shape[1], device=trained.device)
        trained = trained & (order == (trained * order).amax(1, keepdim=True))
    window, step = trained.nonzero(as_tuple=True)
    vectors = model.interest.index_vectors(items)  # [U, D]
    queries = model.interest.query_vectors(interest[window, step])  # [N, D]
    content = batch.item_content[batch.item_index]  # [B, T]

    local = torch.unique(batch.item_index[batch.loss_mask])
    pool, pool_content = all_gather_rows(vectors[local]), all_gather_ints(batch.item_content[local])
    fresh = first_occurrences(pool_content)
    pool, pool_content = pool[fresh], pool_content[fresh]

    in_batch = in_batch_mask(pool_content, content, batch.item_mask, window)  # [N, P]
    hard = hard_negative_mask(
        batch.item_content[batch.hard_index], batch.hard_mask, content, batch.item_mask
    )[window, step]
    positive = (queries * vectors[batch.item_index[window, step]]).sum(-1)
    hard_scores = torch.einsum("nd,nhd->nh", queries, vectors[batch.hard_index[window, step]])
    negatives = torch.cat([hard_scores, queries @ pool.T], 1)
    weights = pair_weights(
        hard,
        in_batch,
        objective.act_reduction,
        hard_weight_at(objective, model.progress),
        objective.batch_weight,
    )
    values = ACTION_LOSSES[objective.action_loss](positive, negatives, weights)
    count = global_sum(values.new_tensor(float(len(values)))).clamp(min=1)
    survived = global_sum(torch.stack([hard.sum(), in_batch.sum()]).float()) / count
    logs: dict[str, Tensor | float] = {
        "negatives/hard_per_step": survived[0],
        "negatives/surviving": survived.sum(),
        "negatives/pool": float(len(pool)),
    }
    return values.sum() / count, logs


def decoded_interest(batch: Batch, interest: Tensor) -> Tensor:
    """h at the decoded positions [R, D], R = B M."""
    index = batch.decode_step[..., None].expand(-1, -1, interest.shape[-1])
    return interest.gather(1, index).flatten(0, 1)


def decoded_losses(task: Decoded, reduction: str) -> Tensor:
    """Cross-entropy [R] of a decoding task; logits in the compute type, the loss in float32."""
    targets = task.targets
    values = token_cross_entropy(task.states, task.head, targets.labels, targets.mask)
    return reduce_tokens(values, targets.mask, reduction)
