"""Evaluation of a finished run: its metrics, its floors and ceilings, checks and example cases."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pyarrow as pa
import torch

from karma_ray import recipes
from karma_ray.artifacts import (
    RunFolder,
    write_json,
)
from karma_ray.baselines.llm import TextVectors
from karma_ray.baselines.popularity import (
    CLICK_COLUMNS,
    PopularityRanker,
    training_clicks,
)
from karma_ray.config import Config
from karma_ray.data.draws import row_keys
from karma_ray.data.prepared import PreparedData
from karma_ray.errors import InputError
from karma_ray.evaluation.cases import collect_cases
from karma_ray.evaluation.checks import hidden_item_effect, with_other_histories
from karma_ray.evaluation.impressions import sampled
from karma_ray.metrics.collapse import spread
from karma_ray.model.interest import InterestModel
from karma_ray.retrieval.retriever import Retriever
from karma_ray.runs.channel_assessment import channel_metrics
from karma_ray.runs.ctr_assessment import assess_ctr
from karma_ray.runs.evaluation_shares import Enlist, enlisted
from karma_ray.runs.evaluator import Evaluator
from karma_ray.runs.floor_metrics import FloorFile, floor_metrics
from karma_ray.runs.joint import CURVE_EXAMPLES
from karma_ray.runs.stages import Stage
from karma_ray.runs.text_vectors import LlmTexts
from karma_ray.runs.training import on_its_devices

LOG = logging.getLogger(__name__)
NUM_CASES = 12
NUM_CHECKED = 1000
NUM_WINDOWS = 32
HEADLINE = ("HR@10", "HR@50", "NDCG@10", "MRR", "gAUC", "JS@50", "num_test")


@on_its_devices
def assess(
    config: Config, source: PreparedData, run: str, stage: Stage | None, cache: str,
    out: str | None = None, enlist: Enlist | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Evaluate a run, and write floors.json and outcomes/ into `out` (default: the run folder).

    A trained run also gets checks.json and cases.json. `stage` is None for a floor or ceiling.
    Without test examples the checks and cases use validation examples. If much is to be ranked,
    processes that `enlist` starts rank a part. Returns the content of metrics.json.
    """
    if config.recipe in recipes.RANKERS:
        return assess_ctr(config, source, run, cache, out)
    folder, evaluator = RunFolder(out or run), Evaluator(config, source)
    LOG.info("evaluating %d test clicks", source.examples("test").num_rows)
    if stage is None:
        floors = floor_metrics(evaluator, cache)
        floors = {name: value for name, value in floors.items() if name != config.recipe}
        write_json(floors, folder.path("floors.json"))
        from karma_ray.baselines.floors import build_floor

        ranker = build_floor(config.recipe, source, config.seed, _vectors(config, source, cache))
        return evaluator.both_splits(ranker, folder.path("outcomes"))
    retriever, known = Retriever.load(run, source.items_uri), FloorFile.of(evaluator, cache)
    workers = enlisted(evaluator, retriever, run, known.missing, enlist)
    write_json(floor_metrics(evaluator, cache, known, workers), folder.path("floors.json"))
    metrics: dict[str, Any] = evaluator.both_splits(retriever, folder.path("outcomes"), workers)
    examples = source.examples("test")
    if examples.num_rows == 0:
        LOG.warning("there are no test examples: checks and cases use validation examples")
        examples = source.examples("valid")
    if examples.num_rows == 0:
        LOG.warning("there are no validation examples either: nothing was measured")
        return metrics
    metrics |= channel_metrics(evaluator, retriever, run, folder, cache, known)
    metrics |= collapse_metrics(retriever, examples, config.seed)
    write_json(run_checks(evaluator, retriever, stage, examples), folder.path("checks.json"))
    cases = collect_cases(
        retriever, stage.build_finished().to(retriever.device), examples, evaluator.catalog,
        count=NUM_CASES, seed=config.seed,
    )  # fmt: skip
    write_json(cases, folder.path("report", "cases.json"))
    return metrics


def validation_metrics(config: Config, source: PreparedData) -> dict[str, float]:
    """Return what a validation during training reports, for the most popular items.

    Raises InputError when there are no validation examples.
    """
    examples = source.examples("valid")
    if examples.num_rows == 0:
        raise InputError("--data", source.uri, "has no validation examples")
    measured = replace(config, evaluation=replace(config.evaluation, max_examples=CURVE_EXAMPLES))
    clicks = training_clicks(source.windows(*CLICK_COLUMNS), source.catalog())
    return Evaluator(measured, source)(PopularityRanker(clicks), examples)


def _vectors(config: Config, source: PreparedData, cache: str) -> TextVectors | None:
    """Return the vectors that the recipe of an untrained run ranks by, if it ranks by any."""
    if config.recipe not in recipes.LLM_FLOORS:
        return None
    texts = LlmTexts.of(config, source.items_uri, cache)
    return texts.vectors() if texts else None


def collapse_metrics(retriever: Retriever, examples: pa.Table, seed: int) -> dict[str, float]:
    """Return the `spread` of the item embeddings e (whole catalogue) and the interests h (sample).

    Only learned dimensions count. `generator/deviation` says how far the generated embeddings of
    the sample deviate.
    """
    sample = sampled(examples, NUM_CHECKED, seed)
    items = torch.from_numpy(retriever.table.embeddings).to(retriever.device)
    model, interest = retriever.interest, retriever.interests(sample)
    learned = model.learned_width
    found = spread(items[:, :learned], interest[:, :learned])
    if isinstance(model, InterestModel) and model.generator is not None:
        found["generator/deviation"] = model.generator.deviation(interest, retriever.keys(sample))
    return found


def run_checks(
    evaluator: Evaluator, retriever: Retriever, stage: Stage, examples: pa.Table
) -> dict[str, Any]:
    """Compare true histories with those of other users, and measure the effect of masked items.

    An item that the attention mask hides must have no effect on h.
    """
    sample = sampled(examples, NUM_CHECKED, evaluator.config.seed)
    strangers = with_other_histories(sample, evaluator.config.seed)
    own, other = evaluator(retriever, sample), evaluator(retriever, strangers)
    rows = evaluator.source.first_windows(NUM_WINDOWS)
    batch = stage.collator().training(rows, row_keys(rows.num_rows, evaluator.config.seed))
    batch = batch.to(retriever.device)
    return {
        "own_history": {name: own[name] for name in HEADLINE if name in own},
        "shuffled_history": {name: other[name] for name in HEADLINE if name in other},
        **hidden_item_effect(retriever.interest, batch),
    }
