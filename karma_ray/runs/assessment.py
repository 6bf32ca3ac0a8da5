"""Evaluation of a finished run: its metrics, its floors and ceilings, checks and example cases."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import torch

from karma_ray import recipes
from karma_ray.artifacts import (
    RunFolder,
    content_hash,
    exists,
    join,
    read_json,
    value_hash,
    write_json,
)
from karma_ray.baselines.llm import TextVectors
from karma_ray.baselines.popularity import (
    CLICK_COLUMNS,
    PopularityRanker,
    training_clicks,
    warm_mask,
)
from karma_ray.baselines.ranker import Ranker
from karma_ray.config import Config
from karma_ray.data.draws import row_keys
from karma_ray.data.paraphrases import Paraphrases
from karma_ray.data.prepared import PreparedData
from karma_ray.errors import InputError
from karma_ray.evaluation.cases import collect_cases
from karma_ray.evaluation.checks import hidden_item_effect, with_other_histories
from karma_ray.evaluation.evaluate import EvaluationResult, evaluate
from karma_ray.evaluation.impressions import sampled
from karma_ray.evaluation.outcomes import Outcomes
from karma_ray.evaluation.paraphrased import ParaphrasedRanker, paraphrased_metrics
from karma_ray.metrics.collapse import spread
from karma_ray.model.interest import InterestModel
from karma_ray.retrieval.retriever import Retriever
from karma_ray.runs.ctr_assessment import assess_ctr
from karma_ray.runs.joint import CURVE_EXAMPLES
from karma_ray.runs.stages import STAGE_VERSION, Stage
from karma_ray.runs.text_vectors import LlmTexts
from karma_ray.runs.training import on_its_devices

LOG = logging.getLogger(__name__)
NUM_CASES = 12
NUM_CHECKED = 1000
NUM_WINDOWS = 32
HEADLINE = ("HR@10", "HR@50", "NDCG@10", "MRR", "gAUC", "JS@50", "num_test")


class Evaluator:
    """Evaluates every ranker on the same examples, catalogue and cold items."""

    def __init__(self, config: Config, source: PreparedData) -> None:
        self.config, self.source = config, source
        self.catalog = source.catalog()
        self.warm = warm_mask(source.windows("item_ids"), self.catalog)
        self.matches = source.query_matches(self.catalog)
        self.held_out = source.held_out(self.catalog)
        named = config.evaluation.paraphrases
        self.paraphrases = Paraphrases.load(named) if named else None

    def __call__(self, ranker: Ranker, examples: pa.Table) -> dict[str, float]:
        """Return the metrics of a ranker as a flat mapping."""
        return self.detailed(ranker, examples).metrics

    def detailed(self, ranker: Ranker, examples: pa.Table) -> EvaluationResult:
        """Return the metrics, and the values per example that they average."""
        return evaluate(
            ranker, examples, self.catalog, config=self.config.evaluation,
            train_item_ids=self.warm, query_matches=self.matches, held_out=self.held_out,
            seed=self.config.seed,
        )  # fmt: skip

    def both_splits(self, ranker: Ranker, outcomes: str | None = None) -> dict[str, float]:
        """Return the test metrics, and the validation metrics under `valid/`.

        With `evaluation.paraphrases` those of the rewritten test queries are under `paraphrased/`.
        The outcome of every test example is written to the folder `outcomes`, if given.
        """
        examples = self.source.examples("test")
        test = self.detailed(ranker, examples)
        metrics, again = test.metrics, None
        if self.paraphrases is not None and examples.num_rows:
            again = self.detailed(ParaphrasedRanker(ranker, self.paraphrases), examples)
            metrics = metrics | paraphrased_metrics(again, examples, self.paraphrases)
        if outcomes is not None:
            self._outcomes(examples, test, again).save(outcomes)
        valid = self(ranker, self.source.examples("valid"))
        return metrics | {f"valid/{name}": value for name, value in valid.items()}

    def _outcomes(
        self, examples: pa.Table, test: EvaluationResult, again: EvaluationResult | None
    ) -> Outcomes:
        targets = examples.column("positive_item_id").take(pa.array(test.details.rows))
        rows = self.catalog.rows(targets.combine_chunks())
        known, at = rows >= 0, np.maximum(rows, 0)
        cold = ~(known & self.warm[at])
        held_out = None if self.held_out is None else known & self.held_out[at]
        users = examples.column("user_id").to_pylist()
        paraphrased = None if again is None else again.details
        return Outcomes.of(test.details, cold, users, held_out, paraphrased)


@on_its_devices
def assess(
    config: Config, source: PreparedData, run: str, stage: Stage | None, cache: str,
    out: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Evaluate a run, and write floors.json and outcomes/ into `out` (default: the run folder).

    A trained run also gets checks.json and cases.json. `stage` is None for a floor or ceiling.
    Without test examples the checks and cases use validation examples. Returns the content of
    metrics.json.
    """
    if config.recipe in recipes.RANKERS:
        return assess_ctr(config, source, run, cache, out)
    folder, evaluator = RunFolder(out or run), Evaluator(config, source)
    LOG.info("evaluating %d test clicks", source.examples("test").num_rows)
    floors = floor_metrics(evaluator, cache)
    if stage is None:
        floors = {name: value for name, value in floors.items() if name != config.recipe}
    write_json(floors, folder.path("floors.json"))
    if stage is None:
        from karma_ray.baselines.floors import build_floor

        ranker = build_floor(config.recipe, source, config.seed, _vectors(config, source, cache))
        return evaluator.both_splits(ranker, folder.path("outcomes"))
    retriever = Retriever.load(run, source.items_uri)
    metrics: dict[str, Any] = evaluator.both_splits(retriever, folder.path("outcomes"))
    examples = source.examples("test")
    if examples.num_rows == 0:
        LOG.warning("there are no test examples: checks and cases use validation examples")
        examples = source.examples("valid")
    if examples.num_rows == 0:
        LOG.warning("there are no validation examples either: nothing was measured")
        return metrics
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


def floor_metrics(evaluator: Evaluator, cache: str) -> dict[str, dict[str, float]]:
    """Return the metrics of every floor, and of the ceilings where the truth is known.

    They are cached per data set; those of a pretrained LLM, if the run names one, per LLM too.
    """
    config, source = evaluator.config, evaluator.source
    examples = content_hash(join(source.uri, "examples"))
    measured = asdict(config.evaluation)
    measured.pop("general_texts")  # no ranker is measured on them
    key: list[Any] = [STAGE_VERSION, examples, measured, config.seed]
    if evaluator.held_out is not None:  # the examples are those of data that hold nothing out
        key.append(content_hash(join(source.uri, "sequences")))
    if evaluator.paraphrases is not None:
        key.append(evaluator.paraphrases.content_hash)
    names = [name for name in recipes.FLOORS if name not in recipes.LLM_FLOORS]
    if exists(join(source.items_uri, "truth")):
        names += recipes.CEILINGS
    floors = _cached(evaluator, cache, key, names, lambda: None)
    try:
        if texts := LlmTexts.of(config, source.items_uri, cache):
            key.append(texts.key())
            floors |= _cached(evaluator, cache, key, recipes.LLM_FLOORS, texts.vectors)
    except InputError as error:  # a finished run is evaluated where its checkpoint is not
        LOG.warning("the floors %s are left out: %s", ", ".join(recipes.LLM_FLOORS), error)
    return floors


def _cached(
    evaluator: Evaluator, cache: str, key: list[Any], names: Sequence[str],
    vectors: Callable[[], TextVectors | None],
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Return the metrics of some floors; those that the file of this key lacks are measured."""
    path = join(cache, f"floors-{value_hash(key)}.json")
    floors = cast(dict[str, dict[str, float]], read_json(path)) if exists(path) else {}
    missing = [name for name in names if name not in floors]
    found = vectors() if missing else None
    if missing:  # loaded only if needed, because scikit-learn takes its time
        from karma_ray.baselines.floors import build_floor
    for name in missing:
        LOG.info("floor %s", name)
        ranker = build_floor(name, evaluator.source, evaluator.config.seed, found)
        floors[name] = evaluator.both_splits(ranker)
    if missing:
        write_json(floors, path)
    return floors


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
