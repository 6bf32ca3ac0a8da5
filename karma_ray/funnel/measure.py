"""The whole report: open, measure what is not finished, compare, render.

    recall  ->  pre-ranking  ->  ranking

Each stage is measured by itself on the same clicks, with KARMA's vectors, with those of
action-only training, and without either.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa

from karma_ray.artifacts import absolute, content_hash, join, read_manifest, value_hash
from karma_ray.data.prepared import PreparedData
from karma_ray.errors import InputError
from karma_ray.funnel.finished import Finished, write_parquet
from karma_ray.funnel.fusion import GRID
from karma_ray.funnel.lines import PRERANK, RECALL, Arms, lines, told, with_stable_names
from karma_ray.funnel.matching import CHANNELS, Matching
from karma_ray.funnel.opened import ACTION_ONLY, KARMA, NONE, OpenedRun, open_runs, paired
from karma_ray.funnel.outcomes import UserSums
from karma_ray.funnel.preranking import PreRanker, chosen_blend, others_prerank, run_prerank
from karma_ray.funnel.recall import Categories, others_recall, run_recall
from karma_ray.funnel.requests import Clicks
from karma_ray.funnel.sizes import KEPT_SHARE, POOL_SHARE, RECALLED_SHARE, Sizes
from karma_ray.report.funnel_page import render_funnel
from karma_ray.report.funnel_table import Funnel
from karma_ray.report.record import read_run
from karma_ray.retrieval.retriever import Retriever

LOG = logging.getLogger(__name__)
FEWEST_CLICKS = 1


@dataclass(frozen=True)
class Part:
    """One stage of one run, or of none."""

    stage: str
    arm: str
    name: str
    seed: int
    sums: UserSums
    facts: dict[str, Any]


class _Ground:
    """What every run of a report is measured on."""

    def __init__(self, source: PreparedData, out: str, limit: int) -> None:
        self.source, self.catalog = source, source.catalog()
        self.sizes = Sizes.of(self.catalog.num_items)
        self.valid, self.test = (
            Clicks.read(source, self.catalog, split, limit) for split in ("valid", "test")
        )
        self.matching = Matching(source, self.catalog, self.sizes, join(out, "matching"))
        self.matching.check()
        self.categories = Categories(self.catalog)
        folders = [content_hash(join(source.uri, name)) for name in ("examples", "sequences")]
        self.finished = Finished(out, value_hash([folders, asdict(self.sizes), limit]))

    @cached_property
    def blend(self) -> tuple[PreRanker, list[float]]:
        """The pre-ranker without KARMA, and its rates on validation."""
        LOG.info("pre-ranker: its blend is chosen on %d validation clicks", len(self.valid.targets))
        return chosen_blend(self.matching, self.valid)


def measure_funnel(
    runs: Sequence[str],
    data: str | None = None,
    *,
    beside: Sequence[str] = (),
    out: str | None = None,
    num_clicks: int = 20_000,
) -> tuple[Funnel, str]:
    """Measure runs and render the report; returns what it shows and the path of its page.

    `data` defaults to the data of the first run, `out` to its folder `funnel`. Raises InputError
    on unfinished runs, on runs of other data or of another catalogue, and on empty splits.
    """
    if num_clicks < FEWEST_CLICKS:
        raise InputError("--clicks", num_clicks, f"is below {FEWEST_CLICKS}")
    source = PreparedData.load(absolute(data) if data else _data_of(runs[0]))
    karma = open_runs(runs, KARMA, source)
    action_only = open_runs(beside, ACTION_ONLY, source)
    pairs = paired(karma, action_only)
    folder = absolute(out) if out else join(absolute(runs[0]), "funnel")
    ground = _Ground(source, folder, num_clicks)
    parts = [*_without(ground), *_with([*karma, *action_only], ground)]
    _write_outcomes(parts, folder)
    funnel = _funnel(ground, karma, action_only, parts, pairs)
    return funnel, render_funnel(funnel, folder)


def _data_of(run: str) -> str:
    try:
        return str(read_manifest(absolute(run), "run")["data"])
    except (FileNotFoundError, KeyError):
        raise InputError("RUN", run, "does not name its data; name them with --data") from None


def _without(ground: _Ground) -> list[Part]:
    """Measure every stage without KARMA."""

    def recall() -> tuple[UserSums, dict[str, Any]]:
        return others_recall(ground.matching, ground.test, ground.categories), {}

    def prerank() -> tuple[UserSums, dict[str, Any]]:
        pre, rates = ground.blend
        facts = {"popularity": pre.weight, "valid_rates": rates}
        return others_prerank(pre, ground.test), facts

    found = []
    for stage, measure in {RECALL: recall, PRERANK: prerank}.items():
        sums, facts = ground.finished.part(stage, NONE, [], measure)
        found.append(Part(stage, NONE, NONE, 0, sums, facts))
    return found


def _with(runs: Sequence[OpenedRun], ground: _Ground) -> list[Part]:
    """Measure recall and pre-ranking with the vectors of every run."""
    found = []
    for number, run in enumerate(runs, start=1):
        LOG.info("%s (%d of %d)", run.name, number, len(runs))
        loaded = _Loaded(run, ground)
        for stage, measure in {RECALL: loaded.recall, PRERANK: loaded.prerank}.items():
            sums, facts = ground.finished.part(stage, run.name, run.parts, measure)
            found.append(Part(stage, run.arm, run.name, run.seed, sums, facts))
    return found


class _Loaded:
    """A run whose model is loaded when the first of its stages is measured."""

    def __init__(self, run: OpenedRun, ground: _Ground) -> None:
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
    write_parquet(pa.concat_tables(tables), join(folder, "outcomes.parquet"))


def _funnel(
    ground: _Ground, karma: list[OpenedRun], action_only: list[OpenedRun],
    parts: Sequence[Part], pairs: list[tuple[int, int]],
) -> Funnel:  # fmt: skip
    rows, metrics = [], {}
    for line in lines(ground.sizes):
        row, found = told(line, _arms(parts, line.stage), pairs)
        rows.append(row)
        metrics.update(found)
    metrics = with_stable_names(metrics, ground.sizes) | _more(parts, ground.sizes)
    record = read_run(karma[0].run)
    facts = {
        "data": record.data_name,
        "data_uri": ground.source.uri,
        "query_source": ground.source.facts.get("query_source"),
        "negative_source": ground.source.facts.get("negative_source"),
        "runs": [one.run for one in karma],
        "beside": [one.run for one in action_only],
        "seeds": [one.seed for one in karma],
        "num_test": len(ground.test.targets),
        "num_valid": len(ground.valid.targets),
        "num_users": len(set(ground.test.users)),
        "num_items": ground.catalog.num_items,
        "recall_metric": ground.sizes.recall_metric,
        "prerank_metric": ground.sizes.prerank_metric,
        **asdict(ground.sizes),
    }
    curves = {
        part.name: list(zip(GRID, part.facts["valid_rates"], strict=True))
        for part in parts if part.stage == PRERANK and part.arm != NONE
    }  # fmt: skip
    return Funnel(
        facts, record.labels(), _notes(ground, action_only), rows, metrics,
        _details(ground, parts), curves,
    )  # fmt: skip


def _arms(parts: Sequence[Part], stage: str) -> Arms:
    arms = Arms()
    for part in parts:
        if part.stage == stage:
            getattr(arms, part.arm).append(part.sums)
    return arms


def _more(parts: Sequence[Part], sizes: Sizes) -> dict[str, float]:
    """Return what the page tells beside its lines: channels alone, the candidates, w."""
    found: dict[str, float] = {}
    for part in parts:
        if part.arm == NONE and part.stage == RECALL:
            for name in CHANNELS:
                found[f"{RECALL}/{sizes.recall_metric}/{name}"] = part.sums.mean(name) or 0.0
        elif part.arm == NONE and part.stage == PRERANK:
            found[f"{PRERANK}/pool"] = part.sums.mean("pool") or 0.0
            found[f"{PRERANK}/popularity"] = part.facts["popularity"]
        elif part.stage == PRERANK:
            found[f"{PRERANK}/w/{part.name}"] = part.facts["w"]
        elif part.stage == RECALL:
            found[f"{RECALL}/ann/overlap/{part.name}"] = part.sums.mean("ann_overlap") or 0.0
    return found


def _notes(ground: _Ground, action_only: list[OpenedRun]) -> list[str]:
    found = []
    if not action_only:
        found.append("Not compared with action-only training: name its runs with --beside.")
    if ground.categories.codes is None:
        found.append("Category match is not measured: the items have no category.")
    return found


def _details(ground: _Ground, parts: Sequence[Part]) -> dict[str, list[tuple[str, str]]]:
    more, sizes = _more(parts, ground.sizes), ground.sizes
    alone = ", ".join(
        f"{name} {more[f'{RECALL}/{sizes.recall_metric}/{name}']:.2f}" for name in CHANNELS
    )
    index = next(p.facts for p in parts if p.stage == RECALL and p.arm != NONE)
    knobs = ", ".join(f"{name} {value}" for name, value in index.items() if name != "recall@200")
    chosen = [(p.name, p.facts["w"]) for p in parts if p.stage == PRERANK and p.arm != NONE]
    blend = more[f"{PRERANK}/popularity"]
    return {
        RECALL: [
            ("length of every list", f"{sizes.recalled} (5,000, or {RECALLED_SHARE:.0%} of a "
             "small catalogue); unions have the same length, channels take turns"),
            ("other channels alone", alone),
            ("approximate index", f"{knobs}; finds {index['recall@200']:.3f} of the exact 200"),
        ],
        PRERANK: [
            ("candidates", f"the first {sizes.pool} of the union of {', '.join(CHANNELS)} (5,000, "
             f"or {POOL_SHARE:.0%} of a small catalogue); {more[f'{PRERANK}/pool']:.2f} % of the "
             "clicks are among them"),
            ("kept", f"{sizes.kept} ({KEPT_SHARE:.0%} of the candidates)"),
            ("pre-ranker without KARMA", f"{1 - blend:.2f} z(affinity) + {blend:.2f} "
             "z(log(1 + training clicks)), chosen on validation"),
            ("weight w of KARMA's score, chosen on validation",
             ", ".join(f"{name} {weight:.2f}" for name, weight in chosen)),
        ],
    }  # fmt: skip
