"""The whole report: open, measure what is not finished, compare, render.

    recall  ->  pre-ranking  ->  ranking

Each stage is measured by itself on the same clicks, with KARMA's vectors, with those of
action-only training, and without either.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import pyarrow as pa

from karma_ray.artifacts import absolute, join, read_manifest, write_table
from karma_ray.data.prepared import PreparedData
from karma_ray.errors import InputError
from karma_ray.funnel.assembly import assembled, missing
from karma_ray.funnel.ground import Ground, Part
from karma_ray.funnel.lines import PRERANK, RANKING, RECALL
from karma_ray.funnel.opened import ACTION_ONLY, KARMA, NONE, OpenedRun, open_runs, paired
from karma_ray.funnel.outcomes import UserSums
from karma_ray.funnel.preranking import others_prerank, run_prerank
from karma_ray.funnel.ranking import RankingRuns
from karma_ray.funnel.recall import others_recall, run_recall
from karma_ray.report.funnel_page import render_funnel
from karma_ray.report.funnel_table import Funnel
from karma_ray.retrieval.complete_run import require_folder
from karma_ray.retrieval.retriever import Retriever
from karma_ray.runs.executor import HERE, Executor
from karma_ray.runs.exposures import check_exposed
from karma_ray.runs.sources import cache_beside

LOG = logging.getLogger(__name__)
FEWEST_CLICKS = 1
STAGES = (RECALL, PRERANK, RANKING)
Measure = Callable[[], tuple[UserSums, dict[str, Any]]]


def measure_funnel(
    runs: Sequence[str],
    data: str | None = None,
    *,
    beside: Sequence[str] = (),
    out: str | None = None,
    num_clicks: int = 20_000,
    stages: Sequence[str] = STAGES,
    cache: str | None = None,
    ctr: Sequence[str] = (),
    executor: Executor = HERE,
) -> tuple[Funnel, str]:
    """Measure runs and render the report; returns what it shows and the path of its page.

    `data` defaults to the data of the first run, `out` to its folder `funnel`. `ctr` are settings
    of the CTR models, whose exposures are kept in `cache`, and which `executor` trains. Raises
    InputError on unfinished runs, on runs of other data or of another catalogue, and on empty
    splits.
    """
    if unknown := [stage for stage in stages if stage not in STAGES]:
        raise InputError("--stages", unknown[0], choices=STAGES)
    if num_clicks < FEWEST_CLICKS:
        raise InputError("--clicks", num_clicks, f"is below {FEWEST_CLICKS}")
    source = PreparedData.load(absolute(data) if data else _data_of(runs[0]))
    karma = open_runs(runs, KARMA, source)
    action_only = open_runs(beside, ACTION_ONLY, source, taken=[one.name for one in karma])
    pairs = paired(karma, action_only)
    folder = absolute(out) if out else join(absolute(runs[0]), "funnel")
    ground = Ground(source, folder, num_clicks)
    notes = missing(ground, action_only)
    parts = [*_without(ground, stages), *_with([*karma, *action_only], ground, stages)]
    if RANKING in stages:
        kept = absolute(cache or cache_beside(folder))
        models = RankingRuns(source, folder, kept, tuple(ctr), executor)
        if (problem := _not_exposed(source)) is None:
            parts += _ranked(models, karma, action_only, pairs, ground)
        else:
            notes.append(f"Ranking is not measured: {problem}.")
    _write_outcomes(parts, folder)
    funnel = assembled(ground, karma, action_only, parts, pairs, notes)
    return funnel, render_funnel(funnel, folder)


def _not_exposed(source: PreparedData) -> str | None:
    """Return why no CTR model can be trained on these data, or None."""
    try:
        check_exposed(source)
    except InputError as error:
        return str(error)
    return None


def _data_of(run: str) -> str:
    require_folder(absolute(run))
    try:
        return str(read_manifest(absolute(run), "run")["data"])
    except (InputError, KeyError):
        raise InputError("RUN", run, "does not name its data; name them with --data") from None


def _without(ground: Ground, stages: Sequence[str]) -> list[Part]:
    """Measure recall and pre-ranking without KARMA."""

    def recall() -> tuple[UserSums, dict[str, Any]]:
        return others_recall(ground.matching, ground.test, ground.categories), {}

    def prerank() -> tuple[UserSums, dict[str, Any]]:
        pre, rates = ground.blend
        facts = {"popularity": pre.weight, "valid_rates": rates}
        return others_prerank(pre, ground.test), facts

    found = []
    for stage, measure in {RECALL: recall, PRERANK: prerank}.items():
        if stage in stages:
            sums, facts = ground.finished.part(stage, NONE, [], measure)
            found.append(Part(stage, NONE, NONE, 0, sums, facts))
    return found


def _with(runs: Sequence[OpenedRun], ground: Ground, stages: Sequence[str]) -> list[Part]:
    """Measure recall and pre-ranking with the vectors of every run."""
    found = []
    for number, run in enumerate(runs, start=1):
        LOG.info("%s (%d of %d)", run.name, number, len(runs))
        loaded = _Loaded(run, ground)
        for stage, measure in {RECALL: loaded.recall, PRERANK: loaded.prerank}.items():
            if stage in stages:
                sums, facts = ground.finished.part(stage, run.name, run.parts, measure)
                found.append(Part(stage, run.arm, run.name, run.seed, sums, facts))
    return found


def _ranked(
    models: RankingRuns, karma: Sequence[OpenedRun], action_only: Sequence[OpenedRun],
    pairs: Sequence[tuple[int, int]], ground: Ground,
) -> list[Part]:  # fmt: skip
    """Measure ranking: of every run, of its action-only run and of none, with the same seed."""
    like = {other: karma[one] for one, other in pairs}
    found = []

    def add(arm: str, name: str, seed: int, depends: Any, measure: Measure) -> None:
        depends = [depends, seed, models.settings]
        sums, facts = ground.finished.part(RANKING, name, depends, measure)
        found.append(Part(RANKING, arm, name, seed, sums, facts))

    for run in karma:
        add(NONE, f"{NONE}-seed{run.seed}", run.seed, [], partial(models.without, run))
    for number, run in enumerate([*karma, *action_only]):
        twin = run if number < len(karma) else like.get(number - len(karma), run)
        add(run.arm, run.name, twin.seed, run.parts, partial(models.beside, run, twin))
    return found


class _Loaded:
    """A run whose model is loaded when the first of its stages is measured."""

    def __init__(self, run: OpenedRun, ground: Ground) -> None:
        self._run, self._ground = run, ground

    @cached_property
    def _retriever(self) -> Retriever:
        return Retriever.load(self._run.run, self._ground.source.items_uri)

    def recall(self) -> tuple[UserSums, dict[str, Any]]:
        ground = self._ground
        return run_recall(
            self._retriever, ground.matching, ground.valid, ground.test, ground.categories
        )

    def prerank(self) -> tuple[UserSums, dict[str, Any]]:
        pre = self._ground.blend[0]
        return run_prerank(self._retriever, pre, self._ground.valid, self._ground.test)


def _write_outcomes(parts: Sequence[Part], folder: str) -> None:
    """Write OUT/outcomes.parquet, from which reports of several seeds can be combined."""
    tables = []
    for part in parts:
        table = part.sums.table()
        about = {"stage": part.stage, "arm": part.arm, "run": part.name}
        columns = {name: pa.array([value] * table.num_rows) for name, value in about.items()}
        seeds = pa.array([part.seed] * table.num_rows, pa.int64())
        names = [*columns, "seed", *table.column_names]
        tables.append(pa.table([*columns.values(), seeds, *table.columns], names=names))
    write_table(pa.concat_tables(tables), folder, "outcomes")
