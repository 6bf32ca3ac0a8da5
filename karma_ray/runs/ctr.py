"""A run that trains a CTR model: exposures -> features -> training -> ranker/.

It is trained as every other stage is (runs/training.py), by this process or by Ray Train's
workers. The epochs are shuffled: a batch of one hour would teach that hour, and only a shuffled
order is the same for any number of workers. Time separates training, validation and test.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import pyarrow as pa
from torch import nn

from karma_ray import recipes
from karma_ray.artifacts import RunFolder, exists, join, locked, value_hash
from karma_ray.config import Config, flattened, to_dict
from karma_ray.data.prepared import PreparedData
from karma_ray.data.tasks import RunTasks, run_here
from karma_ray.errors import InputError
from karma_ray.ranking.collate import CtrCollator
from karma_ray.ranking.exposures import Exposures
from karma_ray.ranking.families import Sizes, build_model, facts_of, family_of
from karma_ray.ranking.features import FeatureMoments
from karma_ray.ranking.floors import ItemRates
from karma_ray.ranking.items import ItemFacts
from karma_ray.ranking.judged import Judged, Predict
from karma_ray.ranking.load import KIND, load_ranker, logits_of, save_ranker
from karma_ray.ranking.objective import Term
from karma_ray.ranking.vectors import is_aligned, vectors_of
from karma_ray.retrieval.retriever import check_run
from karma_ray.runs.batches import ordered_batches
from karma_ray.runs.executor import Executor
from karma_ray.runs.exposures import check_exposed, ensure_exposures, with_vectors
from karma_ray.runs.training import run_training
from karma_ray.runs.worker import TrainJob
from karma_ray.training.checkpoints.checkpoint import load_weights
from karma_ray.training.config import EXECUTION
from karma_ray.training.ctr_step import CtrStep
from karma_ray.training.optim import RateMultiplier
from karma_ray.training.order import Order, Source

LOG = logging.getLogger(__name__)
STAGE = "ctr"
CURVE_PAGES = 2048
"""Validation pages per point of the curve over steps; the final metrics use all of them."""

MOMENT_CANDIDATES = 100_000
"""Training candidates that mean and deviation of the features are computed from."""

OnValidate = Callable[[int, Mapping[str, float]], None]


def check_ranking(config: Config, source: PreparedData) -> None:
    """Raise InputError on settings or data that a CTR model cannot be trained with.

    Other recipes have no settings of one.
    """
    ranking, training = config.ranking, config.training
    if config.recipe not in recipes.RANKERS:
        for flag, value in (("--vectors", ranking.vectors), ("--codes", ranking.codes)):
            if value:
                problem = f"is not used by the recipe {config.recipe}"
                raise InputError(flag, value, problem, choices=list(recipes.RANKERS))
        return
    family = family_of(ranking)
    check_exposed(source)
    reads_vectors = family.uses_vectors or family.reads is not None
    if reads_vectors and not ranking.vectors and not family.vectors_optional:
        message = f"is needed: the finished run whose item vectors {config.recipe} reads"
        raise InputError("--vectors", None, message)
    if ranking.vectors and not reads_vectors:
        message = f"is not used by ranking.family={ranking.family}"
        raise InputError("--vectors", ranking.vectors, message)
    if is_aligned(ranking.vectors) and not family.may_be_aligned:
        message = f"holds vectors alone, and ranking.family={ranking.family} reads a finished run"
        raise InputError("--vectors", ranking.vectors, message)
    if ranking.codes and not family.uses_codes:
        message = f"is not used by ranking.family={ranking.family}"
        raise InputError("--codes", ranking.codes, message)
    if ranking.interest and not ranking.vectors:
        raise InputError("ranking.interest", True, "needs the run of --vectors, which computes h_t")
    if ranking.distillation and not family.teacher:
        message = f"is not used by ranking.family={ranking.family}, which has no teacher"
        raise InputError("ranking.distillation", ranking.distillation, message)
    if training.batch_size < training.num_workers:
        message = f"gives some of training.num_workers={training.num_workers} nothing to do"
        raise InputError("training.batch_size", training.batch_size, message)


def exposures_of(
    config: Config, source: PreparedData, cache: str, run: RunTasks = run_here
) -> Exposures:
    """Return the exposures that a configuration learns from, with its features."""
    ranking = config.ranking
    found = ensure_exposures(source, ranking.max_history, cache, run)
    if not family_of(ranking).uses_vectors:
        return found
    return with_vectors(found, ranking.vectors, ranking.interest, source.items_uri, cache, run)


@dataclass(frozen=True)
class CtrStage:
    """What every worker opens: a configuration and the paths of its inputs."""

    config: Config
    items_uri: str
    exposures: Exposures
    cache: str = ""
    """Where the tables lie that a family reads of the items, if it reads any."""
    teacher: str = ""
    """Run folder of a trained teacher, if the model has one."""

    def facts(self) -> ItemFacts:
        """Return what the model knows of the items before it is trained."""
        return facts_of(self.config.ranking, self.items_uri, self.cache)

    def build(self, facts: ItemFacts | None = None) -> nn.Module:
        """Build the model with initial weights; `facts` are read if not given."""
        facts = facts or self.facts()
        model = build_model(self.config.ranking, Sizes.of(facts), self.config.seed)
        items: nn.Module = model.items  # type: ignore[assignment]
        items.know(facts)  # type: ignore[operator]
        if hasattr(model, "know"):
            model.know(facts)  # type: ignore[operator]
        if self.exposures.num_features:
            moments = FeatureMoments.of(self.exposures.feature_sample(MOMENT_CANDIDATES))
            model.features.know(moments)  # type: ignore[operator, union-attr]
        return model

    def collator(self) -> CtrCollator:
        """Return the function that makes batches."""
        ranking = self.config.ranking
        return CtrCollator(ranking, self.exposures.num_features, family_of(ranking).columns)

    def terms(self) -> tuple[Term, ...]:
        """Return the terms of the objective."""
        ranking = self.config.ranking
        teacher = load_ranker(self.teacher).model if self.teacher else None
        return tuple(family_of(ranking).terms(ranking, teacher))

    @property
    def steps(self) -> int:
        """Steps of `ranking.epochs`, or `training.steps`."""
        training, epochs = self.config.training, self.config.ranking.epochs
        if not epochs:
            return training.steps
        pages = Source.scan(self.exposures.split("train"))
        order = Order(pages, self.config.seed, training.batch_size, 0, 1)
        return epochs * order.batches_per_epoch

    def job(self, run: str, on_validate: OnValidate | None = None) -> TrainJob:
        """Return the job that trains the model."""
        config, training = self.config, self.config.training
        return TrainJob(
            run=run, stage=STAGE, build=self.build,
            step=CtrStep(self.terms()),
            make_batches=partial(
                ordered_batches, self.exposures.split("train"), config.seed, training.batch_size,
                self.collator,
            ),
            training=replace(training, steps=self.steps), seed=config.seed,
            validate=CtrValidation(self, on_validate),
            multiplier_of=PartRates(family_of(config.ranking).rates),
        )  # fmt: skip


@dataclass(frozen=True)
class PartRates:
    """Returns the learning rate's multiplier of a parameter by the beginning of its name."""

    rates: Mapping[str, float]

    def __call__(self, name: str) -> RateMultiplier:
        """Return 1 for a name that begins with none of them."""
        return RateMultiplier(
            next((rate for part, rate in self.rates.items() if name.startswith(part)), 1.0)
        )


@dataclass
class CtrValidation:
    """Measures validation pages; every worker measures the same ones."""

    stage: CtrStage
    on_validate: OnValidate | None = None
    _collator: CtrCollator | None = field(default=None, repr=False)

    def __call__(self, model: nn.Module, step: int) -> dict[str, float]:
        """Return the metrics of at most CURVE_PAGES pages."""
        self._collator = self._collator or self.stage.collator()
        predict = predictor(model, self._collator)
        judged = Judged.of(self.stage.exposures, "valid", predict, CURVE_PAGES)
        metrics = judged.metrics(self.stage.config.evaluation.gauc_weight)
        if self.on_validate is not None:
            self.on_validate(step, metrics)
        return metrics


def predictor(model: nn.Module, collator: CtrCollator, row_of: np.ndarray | None = None) -> Predict:
    """Return a function from rows of exposures to chances of a click, for a model in `eval` mode.

    `row_of` [I + 1] gives the model's row of every row of the exposures' catalogue, if they differ;
    the last is that of row -1.
    """
    import torch

    device = next(model.parameters()).device

    def predict(rows: pa.Table) -> np.ndarray:
        batch = collator(rows)
        if row_of is not None:
            mapped = torch.from_numpy(row_of)
            batch = replace(batch, history=mapped[batch.history], candidate=mapped[batch.candidate])
        with torch.inference_mode():
            chance: np.ndarray = torch.sigmoid(logits_of(model, batch.to(device))).cpu().numpy()
        return chance

    return predict


def train_ctr(
    config: Config, source: PreparedData, run: str, cache: str, executor: Executor,
    resume: bool = False, on_validate: OnValidate | None = None,
) -> None:  # fmt: skip
    """Train a CTR model on data that `check_ranking` passed, and write the run's ranker/."""
    _check_items(config, source, cache)
    exposures = exposures_of(config, source, cache, executor.prepare)
    if not exposures.num_pages("train"):
        raise InputError("--data", source.uri, "shows nothing before its validation days")
    teacher = ensure_teacher(config, source, cache, executor)
    stage = CtrStage(config, source.items_uri, exposures, cache, teacher)
    job = stage.job(run, on_validate)
    LOG.info("%s: %d steps, %d worker(s)", config.recipe, job.training.steps,
             max(1, config.training.num_workers))  # fmt: skip
    summary = run_training(job, resume=resume, max_failures=2, distribute=executor.train)
    family, catalog, facts = family_of(config.ranking), source.catalog(), stage.facts()
    model = stage.build(facts)
    load_weights(summary["weights"], model)
    rates = ItemRates.count(exposures, catalog.num_items)
    model.items.forget(np.flatnonzero(~rates.is_warm))  # type: ignore[operator, union-attr]
    served = family.to_serve(model)
    save_ranker(
        served, config.ranking, Sizes.of(facts), exposures.num_features,
        catalog.table.column("item_id").combine_chunks(), RunFolder(run).path(KIND),
        {**exposures.facts["parents"], **facts.parents}, recipe=config.recipe, seed=config.seed,
        num_parameters=sum(value.numel() for value in served.parameters()),
        notes=family.notes(model),
    )  # fmt: skip


def _check_items(config: Config, source: PreparedData, cache: str) -> None:
    """Raise InputError if vectors, codes or anchors cannot be read, before a worker has to."""
    if family_of(config.ranking).uses_vectors:
        check_run(config.ranking.vectors)
        vectors_of(config.ranking.vectors, source.items_uri)
    else:
        facts_of(config.ranking, source.items_uri, cache)


def teacher_of(config: Config, source: PreparedData, cache: str) -> tuple[Config, str] | None:
    """Return the configuration and the folder of the teacher that a configuration needs.

    The folder is named by all that its weights depend on, so that students share a teacher.
    """
    family = family_of(config.ranking)
    if not family.teacher or not config.ranking.distillation:
        return None
    ranking = replace(config.ranking, family=family.teacher, distillation=0.0)
    taught = replace(config, recipe=f"{config.recipe}_teacher", ranking=ranking)
    fields = {name: value for name, value in flattened(to_dict(taught)) if name not in EXECUTION}
    exposures = exposures_of(taught, source, cache)
    key = {"exposures": exposures.facts["content_hash"], **fields}
    return taught, join(cache, f"teacher-{value_hash(key)}")


def ensure_teacher(config: Config, source: PreparedData, cache: str, executor: Executor) -> str:
    """Return the run folder of a trained teacher, training it first; empty without one."""
    found = teacher_of(config, source, cache)
    if found is None:
        return ""
    taught, folder = found
    with locked(folder):
        if not exists(join(folder, KIND, "manifest.json")):
            train_ctr(taught, source, folder, cache, executor, resume=True)
    return folder
