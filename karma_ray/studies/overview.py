"""The overview of all studies: KARMA against clicks alone, its null controls and all rivals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from karma_ray import recipes
from karma_ray.studies.comparison import Difference, Group, Variant, difference
from karma_ray.studies.plots import delta_picture
from karma_ray.studies.sections import Section, delta, signed, spread_of

NULLS = {
    "embedding_to_text": ("null_shuffled", "null_detached", "null_detached_separate"),
    "karma_text": ("null_both_shuffled",),
    "karma_multimodal": ("null_both_shuffled",),
    "embedding_to_text_infonce": ("null_shuffled_infonce",),
    "karma_infonce": ("null_both_shuffled_infonce",),
}
"""Rows that decode the clicked item from h_t -> their null controls, in which h_t is unrelated."""
GAINS = ("HR@10", "HR@50", "HR@200", "gAUC", "cold/HR@50")
AIMS = ("HR@10", "HR@50", "HR@200", "NDCG@10", "cold/HR@50", "gAUC", "JS@50")
"""Metrics for the comparison of KARMA with other rankers."""
OURS = ("karma_text", "karma_infonce")
_NOT_RIVALS = (*recipes.CEILINGS, "action_only", *OURS)


@dataclass(frozen=True)
class Gain:
    """The gain of a row over clicks alone with the same loss, under one condition."""

    group: Group
    variant: Variant
    found: dict[str, Difference]  # metric -> difference


def gains(groups: Iterable[Group]) -> list[Gain]:
    """Return KARMA's rows and null controls for every group that has the baseline."""
    shown = {*NULLS, *(null for nulls in NULLS.values() for null in nulls)}
    return [
        Gain(group, variant, {m: d for m in GAINS if (d := difference(variant, base, m))})
        for group in sorted(groups, key=lambda group: group.data)
        if (base := group.baseline) is not None
        for variant in group.variants
        if variant.row.name in shown
    ]


def picture(found: Iterable[Gain]) -> bytes | None:
    """Draw a panel per metric, with a line per gain."""
    named = {f"{g.group.name}: {g.variant.label}": g.found for g in found}
    flat = {(label, m): d for label, of_row in named.items() for m, d in of_row.items()}
    return delta_picture(list(named), flat)


def overview(
    found: Sequence[Gain], baselines: Iterable[Group], pictured: str = ""
) -> list[Section]:
    """Return two tables and the picture of the gains; empty ones are left out."""
    sections = [
        _gains(found),
        Section(
            "Gains with 95 % intervals over users and seeds; hollow: one seed", picture=pictured
        ),
        _rivals(list(baselines)),
    ]
    kept = [section for section in sections if section.rows or section.picture]
    return [Section("At a glance", level=2), *kept] if kept else []


def _gains(found: Iterable[Gain]) -> Section:
    rows = []
    for gain in found:
        variant = gain.variant
        seeds = str(max((len(d.seeds) for d in gain.found.values()), default=0))
        cells = [delta(gain.found.get(metric)) for metric in GAINS]
        beyond = _beyond(variant, gain.group) if variant.row.name in NULLS else ""
        rows.append((gain.group.name, variant.label, seeds, *cells, beyond))
    note = (
        "Points over clicks alone with the same loss, mean ± standard deviation over seeds; * "
        "established over other users and other seeds, (*) one seed, over other users only. "
        "`beyond its nulls`: metrics that are established to be higher than in every null control "
        "with the same other tasks and settings (the same computation with unrelated texts)."
    )
    header = ("data", "row", "seeds", *GAINS, "beyond its nulls")
    return Section("KARMA against clicks alone", notes=(note,), header=header, rows=tuple(rows))


def _beyond(variant: Variant, group: Group) -> str:
    nulls = [null for name in NULLS[variant.row.name] if (null := group.find(name)) is not None]
    ahead = []
    for metric in GAINS:
        found = [difference(variant, null, metric) for null in nulls]
        known = [one for one in found if one is not None]
        if known and all(one.direction == 1 for one in known):
            ahead.append(metric)
    if not nulls:
        return "no null"
    few = " (one seed)" if any(len(null.records) == 1 for null in nulls) else ""
    return (", ".join(ahead) or "nowhere") + few


def _rivals(groups: Sequence[Group]) -> Section:
    rows = []
    for group in groups:
        rivals = [v for v in group.variants if v.row.name not in _NOT_RIVALS]
        trained = [v for v in rivals if not v.is_counted]
        floors = [v for v in rivals if v.is_counted]
        for ours in (found for name in OURS if rivals and (found := group.find(name)) is not None):
            cells = [
                _beside(ours, (_best(trained, metric), _best(floors, metric)), metric)
                for metric in AIMS
            ]
            rows.append((
                group.name, ours.label, str(len(ours.records)), *cells,
                ", ".join(v.row.title for v in trained) or "none",
            ))  # fmt: skip
    note = (
        "Each row, then its lead over the best trained rival and over the best floor in that "
        "metric, both selected on the test split in the rival's favour; * and (*) as above."
    )
    header = ("data", "row", "seeds", *AIMS, "trained rivals")
    return Section("KARMA against baselines", notes=(note,), header=header, rows=tuple(rows))


def _best(rivals: Sequence[Variant], metric: str) -> Variant | None:
    known = [(mean, v) for v in rivals if (mean := v.mean(metric)) is not None]
    return max(known, key=lambda pair: pair[0])[1] if known else None


def _beside(ours: Variant, rivals: Iterable[Variant | None], metric: str) -> str:
    told = [spread_of(ours.values(metric).values(), 1)]
    for rival in rivals:
        found = difference(ours, rival, metric) if rival is not None else None
        if found is not None and rival is not None:
            told.append(f"{signed(found.mean)} {found.mark}".rstrip() + f" to {rival.row.title}")
    return "; ".join(told)
