"""Stage 2, joint training: its job, the work before each step, its probe and its validation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from karma_ray.artifacts import join
from karma_ray.baselines.popularity import CLICK_COLUMNS, click_shares, warm_mask
from karma_ray.baselines.sequential import IdModel
from karma_ray.data.collate import Collator
from karma_ray.data.prepared import PreparedData
from karma_ray.evaluation.diagnosis import content_sink
from karma_ray.evaluation.evaluate import evaluate
from karma_ray.evaluation.probe_sets import ItemSample, item_sample
from karma_ray.model.karma import KarmaModel
from karma_ray.model.lora import set_encoder_trained
from karma_ray.retrieval.retriever import Retriever
from karma_ray.runs.batches import ordered_batches
from karma_ray.runs.stages import Stage, over_ids
from karma_ray.runs.together import encode_together, ranking_workers
from karma_ray.runs.worker import TrainJob
from karma_ray.training.action_step import ActionStep
from karma_ray.training.loop import Record
from karma_ray.training.optim import RateMultiplier, RateMultipliers
from karma_ray.training.parallel import rank
from karma_ray.training.step import JointStep
from karma_ray.training.step_state import StepState

CURVE_EXAMPLES = 1000
"""Validation examples per point of the curve over steps; the final metrics use all of them."""

SINK_ITEMS = 64
"""Items whose attention is measured in every report; jobs/diagnose.py measures more."""

OnValidate = Callable[[int, Mapping[str, float]], None]
"""Called with (step, metrics) at every validation, in the process that trains."""


def joint_job(
    stage: Stage, source: PreparedData, run: str, on_validate: OnValidate | None = None
) -> TrainJob:
    """Return the job of stage 2 on the prepared sequences, for KARMA or a baseline over ids."""
    config, training = stage.config, stage.config.training
    job = partial(
        TrainJob,
        run=run,
        stage="joint",
        make_batches=partial(
            ordered_batches, join(source.uri, "sequences"), config.seed, training.batch_size,
            stage.make_training_collate,
        ),
        training=training,
        seed=config.seed,
        validate=Validation(stage, source, on_validate),
    )  # fmt: skip
    if over_ids(config):  # one learning-rate multiplier for all its parameters
        action = ActionStep(config.objective)
        with_shares = partial(_with_shares, _shares(stage, source))
        return job(build=stage.build_ids, step=action, probe=action.probe, before_step=with_shares)
    step = JointStep(
        config.objective, training.encoder_grad, training.encoder_delay,
        training.micro_batch_size, training.micro_tokens,
    )  # fmt: skip
    start = next(n for n in range(training.steps + 1) if not step.is_delayed(n / training.steps))
    rise = round(training.lr_warmup_share * training.steps) if start else 0
    return job(
        build=stage.build_joint,
        step=step,
        multiplier_of=RateMultipliers(
            training.new_module_lr, RateMultiplier(training.encoder_lr, start, rise)
        ),
        probe=JointProbe(stage, step),
        before_step=BeforeStep(stage, step, _shares(stage, source)),
    )


@dataclass
class BeforeStep:
    """Prepares a step: freezes or unfreezes the item encoder and fills the history bank.

    The bank is filled once while the encoder, or all of it but its head, is frozen, and every R
    steps under `targets_only`.
    `shares` is the popularity of each item, for the objective's correction.
    """

    stage: Stage
    step: JointStep
    shares: NDArray[np.float32] | None = field(default=None, repr=False)  # [I]
    _collator: Collator | None = field(default=None, repr=False)

    def __call__(self, model: nn.Module, step: int, state: StepState) -> StepState:
        """Return the state for the next step, after `step` finished ones."""
        assert isinstance(model, KarmaModel)
        state = _with_shares(self.shares, model, step, state)
        training = self.stage.config.training
        frozen = self.step.is_frozen(state.progress)
        # Queries may go through the item encoder too (query_mode=encoder).
        head_only = training.encoder_grad == "head"
        set_encoder_trained(model.interest.item_encoder, not frozen, head_only=head_only)
        if training.encoder_grad == "full" and not frozen:
            return replace(state, bank=None)
        refreshed = training.encoder_grad == "targets_only" and not frozen
        due = refreshed and step % training.bank_refresh_steps == 0
        if state.bank is not None and not due:
            return state
        self._collator = self._collator or self.stage.collator()
        tokens = self._collator.catalog_tokens()
        features = model.interest.item_encoder.features
        vectors = encode_together(
            model.interest, *tokens, training.precision, features if head_only else None
        )
        device = next(model.parameters()).device
        return replace(state, bank=torch.from_numpy(vectors).to(device))


@dataclass
class JointProbe:
    """Measures the step's collapse metrics, and the item encoder's attention sinks on fixed items.

    With so few items the pass costs about one percent of the steps between two reports.
    """

    stage: Stage
    step: JointStep
    _items: ItemSample | None = field(default=None, repr=False)

    def __call__(self, model: nn.Module, batch: Any, state: StepState) -> Record:
        """Return the metrics; `batch` and `state` are those of the reported step."""
        assert isinstance(model, KarmaModel)
        record, config = self.step.probe(model, batch, state), self.stage.config
        if config.training.compile:  # compiled layers do not show their attention
            return record
        if self._items is None:
            catalog = self.stage.catalog()
            everyone = np.zeros(catalog.num_items, bool)
            self._items = item_sample(
                self.stage.collator(), catalog, everyone, SINK_ITEMS, config.seed
            )
        return {**record, "collapse/content_sink": content_sink(model, self._items)}


@dataclass
class Validation:
    """Computes metrics on a fixed sample of validation examples.

    All workers encode the catalogue together, each ranks it for a share of the examples, and all
    return the metrics that a single worker computes.
    """

    stage: Stage
    source: PreparedData
    on_validate: OnValidate | None = None
    _collator: Collator | None = field(default=None, repr=False)

    def __call__(self, model: nn.Module, step: int) -> Mapping[str, float]:
        """Encode the catalogue with the current model, and evaluate."""
        assert isinstance(model, KarmaModel | IdModel)
        config = self.stage.config
        self._collator = collator = self._collator or self.stage.collator()
        catalog = self.stage.catalog()
        examples = self.source.examples("valid")
        if examples.num_rows == 0:
            return {}
        embeddings = encode_together(
            model.interest, *collator.catalog_tokens(), config.training.precision
        )
        retriever = Retriever.from_model(model.interest, collator, catalog, embeddings)
        metrics = evaluate(
            retriever,
            examples,
            catalog,
            config=replace(config.evaluation, max_examples=CURVE_EXAMPLES),
            train_item_ids=warm_mask(self.source.windows("item_ids"), catalog),
            query_matches=self.source.query_matches(catalog),
            held_out=self.source.held_out(catalog),
            seed=config.seed,
            workers=ranking_workers(model),
        ).metrics
        if self.on_validate is not None and rank() == 0:
            self.on_validate(step, {f"valid/{name}": value for name, value in metrics.items()})
        return metrics


def _shares(stage: Stage, source: PreparedData) -> NDArray[np.float32] | None:  # -> [I]
    """Return the popularity of each item's content, if the objective corrects for it (logQ)."""
    if not stage.config.objective.logq:
        return None
    return click_shares(source.windows(*CLICK_COLUMNS), stage.catalog())


def _with_shares(
    shares: NDArray[np.float32] | None, model: nn.Module, step: int, state: StepState
) -> StepState:
    """Return `state` with the shares, moved to the model's device once."""
    if shares is None or state.shares is not None:
        return state
    return replace(state, shares=torch.from_numpy(shares).to(next(model.parameters()).device))
