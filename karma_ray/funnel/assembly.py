"""From measured parts to what the page shows: lines, stable keys, and how it was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from karma_ray.funnel.fusion import GRID
from karma_ray.funnel.ground import Ground, Part
from karma_ray.funnel.lines import PRERANK, RANKING, RECALL, Arms, lines, told, with_increment
from karma_ray.funnel.matching import CHANNELS
from karma_ray.funnel.opened import NONE, OpenedRun
from karma_ray.funnel.sizes import KEPT_SHARE, POOL_SHARE, RECALLED_SHARE, Sizes
from karma_ray.report.funnel_table import Funnel, FunnelRow
from karma_ray.report.record import read_run


def assembled(
    ground: Ground, karma: list[OpenedRun], action_only: list[OpenedRun],
    parts: Sequence[Part], pairs: list[tuple[int, int]], notes: list[str],
) -> Funnel:  # fmt: skip
    """Compare the runs in every line, and return all that the page shows."""
    rows: list[FunnelRow] = []
    metrics: dict[str, float] = {}
    for line in lines(ground.sizes):
        if not any(part.stage == line.stage for part in parts):
            continue
        row, found = told(line, _arms(parts, line.stage), pairs)
        rows.append(row)
        metrics.update(found)
    metrics = with_increment(metrics) | _more(parts, ground.sizes)
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
        facts, record.labels(), notes, rows, metrics,
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


def missing(ground: Ground, action_only: list[OpenedRun]) -> list[str]:
    """Return what cannot be compared or measured, and why."""
    found = []
    if not action_only:
        found.append("Not compared with action-only training: name its runs with --beside.")
    if ground.categories.codes is None:
        found.append("Category match is not measured: the items have no category.")
    return found


def _details(ground: Ground, parts: Sequence[Part]) -> dict[str, list[tuple[str, str]]]:
    stages = {part.stage for part in parts}
    told = {RECALL: _of_recall, PRERANK: _of_prerank, RANKING: _of_ranking}
    return {stage: tell(ground.sizes, parts) for stage, tell in told.items() if stage in stages}


def _of_recall(sizes: Sizes, parts: Sequence[Part]) -> list[tuple[str, str]]:
    more = _more(parts, sizes)
    alone = (f"{name} {more[f'{RECALL}/{sizes.recall_metric}/{name}']:.2f}" for name in CHANNELS)
    index = next(p.facts for p in parts if p.stage == RECALL and p.arm != NONE)
    knobs = ", ".join(f"{name} {value}" for name, value in index.items() if name != "recall@200")
    return [
        ("length of every list", f"{sizes.recalled} (5,000, or {RECALLED_SHARE:.0%} of a small "
         "catalogue); unions have the same length, channels take turns"),
        ("other channels alone", ", ".join(alone)),
        ("approximate index", f"{knobs}; finds {index['recall@200']:.3f} of the exact 200"),
    ]  # fmt: skip


def _of_prerank(sizes: Sizes, parts: Sequence[Part]) -> list[tuple[str, str]]:
    more = _more(parts, sizes)
    chosen = [(p.name, p.facts["w"]) for p in parts if p.stage == PRERANK and p.arm != NONE]
    blend = more[f"{PRERANK}/popularity"]
    return [
        ("candidates", f"the first {sizes.pool} of the union of {', '.join(CHANNELS)} (5,000, or "
         f"{POOL_SHARE:.0%} of a small catalogue); {more[f'{PRERANK}/pool']:.2f} % of the clicks "
         "are among them"),
        ("kept", f"{sizes.kept} ({KEPT_SHARE:.0%} of the candidates)"),
        ("pre-ranker without KARMA", f"{1 - blend:.2f} z(affinity) + {blend:.2f} z(log(1 + "
         "training clicks)), chosen on validation"),
        ("weight w of KARMA's score, chosen on validation",
         ", ".join(f"{name} {weight:.2f}" for name, weight in chosen)),
    ]  # fmt: skip


def _of_ranking(sizes: Sizes, parts: Sequence[Part]) -> list[tuple[str, str]]:
    mine = [part for part in parts if part.stage == RANKING]
    return [
        ("shown test items", f"{mine[0].facts['num_test']:,}"),
        ("CTR models", "DIN over ids; with similarities of the vectors (SimTier's ten tiers, "
         "largest, mean, mean of the five largest); also with h_t . e; the same seeds"),
        ("trained in", ", ".join(str(part.facts["run"]) for part in mine)),
    ]  # fmt: skip
