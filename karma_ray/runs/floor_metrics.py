"""Metrics of the floors and ceilings, which runs on the same data share."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from karma_ray import recipes
from karma_ray.artifacts import content_hash, exists, join, read_json, value_hash, write_json
from karma_ray.baselines.llm import TextVectors
from karma_ray.errors import InputError
from karma_ray.evaluation.measurement import ALONE, Workers
from karma_ray.evaluation.outcomes import FILES, Outcomes
from karma_ray.runs.evaluator import Evaluator
from karma_ray.runs.stages import STAGE_VERSION
from karma_ray.runs.text_vectors import LlmTexts

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class FloorFile:
    """The metrics of some floors, by name, in a file of the cache."""

    evaluator: Evaluator
    cache: str
    key: Sequence[Any]
    """All that the metrics depend on."""
    names: Sequence[str]
    known: dict[str, dict[str, float]]
    """What the file held when it was read."""

    @classmethod
    def of(cls, evaluator: Evaluator, cache: str) -> FloorFile:
        """Look up the floors that need no LLM, and the ceilings where the truth is known."""
        source, config = evaluator.source, evaluator.config
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
        return cls._read(evaluator, cache, key, names)

    def of_llm(self, texts: LlmTexts) -> FloorFile:
        """Look up the floors of an LLM."""
        key = [*self.key, texts.key()]
        return FloorFile._read(self.evaluator, self.cache, key, recipes.LLM_FLOORS)

    @classmethod
    def _read(
        cls, evaluator: Evaluator, cache: str, key: Sequence[Any], names: Sequence[str]
    ) -> FloorFile:
        path = _path(cache, key)
        known = cast(dict[str, dict[str, float]], read_json(path)) if exists(path) else {}
        return cls(evaluator, cache, key, names, known)

    @property
    def missing(self) -> list[str]:
        """Names of the floors that have to be measured."""
        return [name for name in self.names if name not in self.known]

    def measured(
        self, vectors: Callable[[], TextVectors | None], workers: Workers = ALONE
    ) -> dict[str, dict[str, float]]:
        """Return the metrics of all floors, of which `workers` measure the missing ones."""
        if not self.missing:
            return self.known
        floors, found = dict(self.known), vectors()
        # Loaded only if needed, because scikit-learn takes its time.
        from karma_ray.baselines.floors import build_floor

        for name in self.missing:
            LOG.info("floor %s", name)
            evaluator = self.evaluator
            ranker = build_floor(name, evaluator.source, evaluator.config.seed, found)
            floors[name] = evaluator.both_splits(ranker, self._outcomes(name), workers)
        write_json(floors, _path(self.cache, self.key))
        return floors

    def ranks(self, name: str) -> NDArray[np.int64] | None:  # -> [n]
        """Return a floor's rank of every test click, if it was kept with the metrics.

        None if a sample is evaluated, or where the metrics are of a version that kept none. A rank
        of 65535 means that or worse.
        """
        is_whole = not self.evaluator.config.evaluation.max_examples
        if not is_whole or not exists(join(self._outcomes(name), FILES[-1])):
            return None
        return Outcomes.load(self._outcomes(name)).rank

    def _outcomes(self, name: str) -> str:
        return join(_path(self.cache, self.key).removesuffix(".json"), name)


def floor_metrics(
    evaluator: Evaluator, cache: str, known: FloorFile | None = None, workers: Workers = ALONE
) -> dict[str, dict[str, float]]:
    """Return the metrics of every floor, and of the ceilings where the truth is known.

    They are cached per data set; those of a pretrained LLM, if the run names one, per LLM too, and
    this process alone measures them. `workers` share in what `known` lacks.
    """
    config, source = evaluator.config, evaluator.source
    known = known or FloorFile.of(evaluator, cache)
    floors = known.measured(lambda: None, workers)
    try:
        if texts := LlmTexts.of(config, source.items_uri, cache):
            floors = floors | known.of_llm(texts).measured(texts.vectors)
    except InputError as error:  # a finished run is evaluated where its checkpoint is not
        LOG.warning("the floors %s are left out: %s", ", ".join(recipes.LLM_FLOORS), error)
    return floors


def _path(cache: str, key: Sequence[Any]) -> str:
    return join(cache, f"floors-{value_hash(list(key))}.json")
