"""The training step of each stage: from a batch to a loss and its logs.

A loss is this worker's *sum* divided by a *global* count. Gradients are therefore summed over
workers, and one worker, many workers and gradient accumulation give the same result.

Legend: B windows, T steps, N trained steps, P pool of positives, H hard negatives, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from karma_ray.data.batch import Batch
from karma_ray.metrics.collapse import spread
from karma_ray.model.karma import Decoded, KarmaModel
from karma_ray.objectives.losses import (
    LossTerms,
    ObjectiveConfig,
)
from karma_ray.objectives.text import reduce_tokens, token_cross_entropy
from karma_ray.training.accounting import work_done
from karma_ray.training.action_term import (
    Pool,
    action_term,
    generated_loss,
    observe_items,
    trained_steps,
)
from karma_ray.training.gradient_cache import CachedItems, Encode, micro_batches, run_backward
from karma_ray.training.imagery_term import image_gap, image_means, num_images
from karma_ray.training.item_table import SharedBatch, share_items
from karma_ray.training.memory import tokens_at_once
from karma_ray.training.parallel import global_sum
from karma_ray.training.step_state import AT_THE_END, StepState


@dataclass(frozen=True)
class StepOutput:
    """What the loop needs from a step."""

    loss: Tensor  # scalar: this worker's share of the global loss; without a graph when the
    # step has already done the backward pass
    logs: dict[str, Tensor | float]  # global values; `tokens` and `examples` are this worker's


Step = Callable[[nn.Module, Any, StepState], StepOutput]


@dataclass(frozen=True)
class JointStep:
    """Stage 2 on behaviour sequences, equation 9.

    With `micro_batch_size` a worker processes that many users at a time through the gradient
    cache. Loss and gradients are those of the whole batch, and the step does the backward pass.
    """

    objective: ObjectiveConfig
    encoder_grad: str = "full"
    encoder_delay: float = 0.0
    micro_batch_size: int = 0
    micro_tokens: int = 16_384

    def __call__(self, model: nn.Module, batch: Batch, state: StepState = AT_THE_END) -> StepOutput:
        """Return equations 5 to 8 for one batch."""
        assert isinstance(model, KarmaModel)
        shared = share_items(batch)
        batch, count = shared.batch, self._counts(shared.batch)
        if self.micro_batch_size:
            sums, total = self._in_parts(model, shared, count, state)
        else:
            items = self._items(model, shared, state)
            observe_items(model.interest, items)
            pool = Pool.of(shared, items, self.objective, state)
            history = self._history(batch, items, state)
            sums, total = self._sums(model, batch, items, history, pool, count, state)
        values = torch.stack([value.detach().float() for value in sums.values()])
        logs: dict[str, Tensor | float] = dict(zip(sums, global_sum(values), strict=True))
        logs.update(work_done(model, shared, self.objective, self._encoder(state)))
        return StepOutput(total, logs)

    def is_delayed(self, progress: float) -> bool:
        """Whether the item encoder is still delayed at this share of the training."""
        return progress < self.encoder_delay

    def is_frozen(self, progress: float) -> bool:
        """Whether the item encoder is frozen at this share of the training."""
        return self.encoder_grad == "frozen" or self.is_delayed(progress)

    def _encoder(self, state: StepState) -> Literal["full", "frozen", "bank"]:
        """Return how the step gets its item embeddings: encoded, encoded frozen, or looked up."""
        frozen = self.is_frozen(state.progress)
        if state.bank is not None and (frozen or self.encoder_grad == "head"):
            return "bank"
        return "frozen" if frozen else "full"

    def _items(self, model: KarmaModel, shared: SharedBatch, state: StepState) -> Tensor:
        """Return e [G, D] of the step's unique items, without gradient while frozen."""
        if (bank := self._embeddings(state)) is not None:
            return bank[shared.batch.item_rows]
        learns = not self.is_frozen(state.progress)
        with torch.set_grad_enabled(torch.is_grad_enabled() and learns):
            return shared.encoded(self._encode(model, state))

    def _embeddings(self, state: StepState) -> Tensor | None:
        """Return the bank if the step takes e from it as it is; with `head` it holds features."""
        looked_up = self.is_frozen(state.progress) and self.encoder_grad != "head"
        return state.bank if looked_up else None

    def _encode(self, model: KarmaModel, state: StepState) -> Encode:
        """Return how items are encoded: from their texts, or with `head` from banked features."""
        bank = state.bank
        if self.encoder_grad != "head" or bank is None:
            return model.interest.encode_items
        return lambda tokens, lengths, rows: model.interest.item_encoder.embed(bank[rows])

    def _in_parts(
        self, model: KarmaModel, shared: SharedBatch, count: Tensor, state: StepState
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Run forward and backward part by part, with the gradient cache."""
        batch, cached = shared.batch, None
        if (bank := self._embeddings(state)) is not None:
            items = bank[batch.item_rows]
        else:
            encoder = model.interest.item_encoder
            tokens = self.micro_tokens or tokens_at_once(
                encoder.body, encoder.num_frozen, batch.item_rows.device
            )
            cached = CachedItems(shared, self._encode(model, state), tokens)
            items = cached.vectors
            if self.is_frozen(state.progress):
                items, cached = items.detach(), None
        observe_items(model.interest, items)
        history = self._history(batch, items, state)
        sums: dict[str, Tensor] = {}
        for part, used in micro_batches(batch, self.micro_batch_size):
            pool = Pool.of(shared, items, self.objective, state)
            found, total = self._sums(model, part, items[used], history[used], pool, count, state)
            run_backward(total)
            for name, value in found.items():
                sums[name] = sums.get(name, torch.zeros_like(value)) + value.detach()
        if cached is not None:
            cached.backward()
        return sums, sums["loss/total"]

    def _history(self, batch: Batch, items: Tensor, state: StepState) -> Tensor:
        """Return the embeddings that represent the history: current ones, or the cached bank."""
        if self.encoder_grad != "targets_only" or self.is_frozen(state.progress):
            return items
        if state.bank is None:
            return items.detach()
        return state.bank[batch.item_rows]

    def _counts(self, batch: Batch) -> Tensor:
        """Count trained, decoded and image steps over all workers [3], the divisors of the sums."""
        trained = trained_steps(batch, self.objective.act_positions).sum()
        counts = torch.stack([trained, batch.decode_mask.sum(), num_images(batch)])
        return global_sum(counts).clamp(min=1)

    def _sums(
        self, model: KarmaModel, batch: Batch, items: Tensor, history: Tensor, pool: Pool,
        count: Tensor, state: StepState,
    ) -> tuple[dict[str, Tensor], Tensor]:  # fmt: skip
        """Return this part's shares of the logged global means, and of the total loss.

        `items` and `history` [U, D] are the embeddings of the batch's items as targets and as
        inputs of the user decoder.
        """
        objective, built = self.objective, self.objective.built
        text, first = None, None
        if built.image and model.imagery is not None and model.imagery.in_task1:
            interest, text, first = model.forward_with_images(batch, history, text=built.generation)
        elif built.generation:
            interest, text = model.forward_with_text(batch, history)
        else:
            interest = model.interest.interest(batch, history)
        with torch.autocast(interest.device.type, enabled=False):
            action = action_term(
                model.interest, batch, interest, items.float(), pool, objective, state.progress
            )
        decoded = batch.decode_mask.flatten()

        def mean(task: Decoded) -> Tensor:
            values = decoded_losses(task, objective.ce_reduction)
            return (values * decoded).sum() / count[1]

        reconstruction, images = None, {}
        rows = model.interest.decodable(decoded_interest(batch, interest))
        if built.reconstruction:
            reconstruction = mean(model.decode_interest(batch, rows))
        if built.image:
            images = image_means(model, batch, rows, first, count[2])
        generation = None if text is None else mean(text)
        image = images.get("loss/image")
        generated = generated_loss(model.interest, batch, interest, items, objective, count[0])
        terms = LossTerms(action.loss / count[0], generation, reconstruction, image, generated)
        total = terms.total(objective)
        hard, in_batch = action.negatives / count[0]
        negatives = {"negatives/hard_per_step": hard, "negatives/surviving": hard + in_batch}
        return {**images, **terms.named(), "loss/total": total, **negatives}, total

    @torch.no_grad()
    def probe(
        self, model: KarmaModel, batch: Batch, state: StepState = AT_THE_END
    ) -> dict[str, float]:
        """Measure collapse on one batch: decode gap, effective rank and mean cosine of e and h.

        The gap, CE(shuffled h) - CE(h) in nats per token, uses Task 2's decoder whether or not
        this run trains it. It says whether that decoder can still read the target's text from h.
        Without Task 2 the decoder changes with the shared backbone, so a gap of 0 does not prove
        that h has lost the text (docs/diagnosis.md).
        """
        shared = share_items(batch)
        batch, items = shared.batch, self._items(model, shared, state)
        if self.micro_batch_size:  # a sample, because the whole batch would not fit
            batch, used = next(iter(micro_batches(batch, self.micro_batch_size)))
            items = items[used]
        interest = model.interest.interest(batch, self._history(batch, items, state))
        decoded = batch.decode_mask.flatten()
        rows = model.interest.decodable(decoded_interest(batch, interest))
        other = rows.clone()
        # Shift by a window's decoded steps, so that no h is replaced by one of the same user.
        other[decoded] = rows[decoded].roll(batch.decode_step.shape[1], 0)

        def losses(interest: Tensor) -> Tensor:
            task = model.decode_interest(batch, interest, dropout=False)
            return decoded_losses(task, "token_mean")[decoded]

        own, shuffled = losses(rows), losses(other)
        learned = model.interest.learned_width
        return {
            "decode_gap": float((shuffled - own).mean()),
            "decode_ce": float(own.mean()),
            **image_gap(model, batch, rows, other),
            **spread(items[:, :learned], interest[batch.loss_mask][:, :learned]),
        }


def decoded_interest(batch: Batch, interest: Tensor) -> Tensor:
    """Return h at the decoded positions [R, D], R = B M."""
    index = batch.decode_step[..., None].expand(-1, -1, interest.shape[-1])
    return interest.gather(1, index).flatten(0, 1)


def decoded_losses(task: Decoded, reduction: str) -> Tensor:
    """Return a task's cross-entropy [R]; logits in the compute type, the loss in float32."""
    targets = task.targets
    values = token_cross_entropy(task.states, task.head, targets.labels, targets.mask)
    return reduce_tokens(values, targets.mask, reduction)
