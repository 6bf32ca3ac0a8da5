"""The findings of a study as sections of text and tables, which page.py writes.

Differences are in points over the table's baseline under the same condition.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import groupby

from karma_ray.studies.comparison import (
    METRICS,
    Difference,
    Group,
    difference,
)
from karma_ray.studies.rows import Table
from karma_ray.studies.sections import Section, delta, signed, spread_of
from karma_ray.studies.state import collapse, cost, equal_seconds

ABSOLUTE = (*METRICS, "JS@50_excl_gt")
Differences = dict[tuple[str, str], Difference]
"""(label of the variant, metric) -> difference to the baseline."""


def differences(group: Group) -> Differences:
    """Compare every row of a group with its baseline in every metric."""
    if group.baseline is None:
        return {}
    return {
        (variant.label, metric): found
        for variant in group.variants
        if variant is not group.baseline
        for metric in METRICS
        if (found := difference(variant, group.baseline, metric)) is not None
    }


def group_sections(
    group: Group, table: Table, found: Differences, pictures: Iterable[tuple[str, str]] = ()
) -> list[Section]:
    """Return the sections of a group from its differences and pictures (title, file name)."""
    sections = [
        Section(f"{table.title}: {group.name}", level=2, notes=_facts(group)),
        _in_words(group, found),
        _beside_the_paper(group, found),
        _delta_table(group, found),
        _absolute_table(group),
        equal_seconds(group),
        collapse(group),
        cost(group),
        _details(group, found),
    ]
    sections += [Section(title, picture=name) for title, name in pictures]
    return [s for s in sections if s.notes or s.rows or s.picture]


def _facts(group: Group) -> tuple[str, ...]:
    records = [r for v in group.variants for r in v.records.values()]
    clicks = sorted({int(r["metrics"].get("num_test", 0)) for r in records})
    commits = sorted({str(r.get("commit") or "unknown")[:10] for r in records})
    devices = sorted({f"{r.get('device')} ({r.get('threads')} threads a run)" for r in records})
    facts = [
        f"{len(records)} runs, {' or '.join(f'{n:,}' for n in clicks)} test clicks; data "
        f"{records[0].get('data_hash')}; commits {', '.join(commits)}; {'; '.join(devices)}."
    ]
    searched = [v for v in group.variants if v.tried > 1]
    if searched:
        facts.append(
            "Settings were chosen by HR@50 on validation with the first seed, among the number in "
            "`settings tried` (docs/ablations.md); `–` means that the study's own were best. "
            + "; ".join(f"{v.label}: {v.searched or '–'}" for v in searched)
            + "."
        )
    if group.baseline is None:
        facts.append("The baseline has no run under these settings, so nothing is compared.")
    return tuple(facts)


def _in_words(group: Group, found: Differences) -> Section:
    """Describe in sentences where a row differs from the baseline and where it does not."""
    sentences = []
    for variant in group.variants:
        measured = {m: d for m in METRICS if (d := found.get((variant.label, m)))}
        of_row = {metric: d for metric, d in measured.items() if not d.is_saturated}
        if not of_row:
            if measured:
                sentences.append(f"{variant.label}: the same on every test example.")
            continue
        parts = []
        for sign, words in (
            (1, "higher on"),
            (-1, "lower on"),
            (0, "no established difference on"),
        ):
            told = [
                f"{m} ({_told(d)})"
                for m, d in of_row.items()
                if d.direction == sign and not d.is_unknown
            ]
            if told:
                parts.append(f"{words} {', '.join(told)}")
        unknown = [f"{m} ({signed(d.mean)})" for m, d in of_row.items() if d.is_unknown]
        if unknown:
            parts.append(f"without an interval {', '.join(unknown)}")
        seeds = max(len(d.seeds) for d in of_row.values())
        warning = " With one seed the spread over seeds is unknown." if seeds == 1 else ""
        sentences.append(f"{variant.label}: {'; '.join(parts)}.{warning}{_lacking(of_row)}")
    note = (
        "A difference is established if its 95 % interval excludes 0. The interval covers other "
        "users (bootstrap with pooled seeds) and other seeds (Student's t); with one seed it "
        f"covers other users only. There are {len(found)} differences, and intervals are not "
        "widened for that. In parentheses: the difference and, if it is not established, the "
        "smallest one that the design can detect."
    )
    return Section("In plain words", notes=(*sentences, note) if sentences else ())


def _lacking(of_row: Mapping[str, Difference]) -> str:
    """Name runs without values per example, whose seeds are missing in intervals over users."""
    names = ", ".join(dict.fromkeys(name for d in of_row.values() for name in d.gone))
    if not names:
        return ""
    return (
        f" The values per example of {names} are missing (docs/ablations.md): intervals over users "
        "use the other seeds, if there are any."
    )


def _told(difference: Difference) -> str:
    if difference.direction or difference.detectable is None:
        return signed(difference.mean)
    return f"{signed(difference.mean)}, detectable {difference.detectable:.2f}"


def _beside_the_paper(group: Group, found: Differences) -> Section:
    rows = []
    for variant in group.variants:
        row = variant.row
        over = group.find(row.published_over) if row.published_over else group.baseline
        if not row.published or over is None:
            continue
        cells = [variant.label, over.label]
        for metric, published in row.published.items():
            known = found.get((variant.label, metric)) if over is group.baseline else None
            ours = known or difference(variant, over, metric)
            cells += [signed(published), delta(ours), _agreement(published, ours)]
        rows.append(tuple(cells))
    if not rows:
        return Section("The paper beside ours")
    metrics = next(v.row.published for v in group.variants if v.row.published)
    columns = [c for m in metrics for c in (f"{m}: paper", "ours", "sign")]
    notes = ["Published numbers are points on Taobao's data; sign, order and ratio can agree."]
    notes += _orders(group, metrics)
    return Section(
        "The paper beside ours", notes=tuple(notes), header=("row", "over", *columns),
        rows=tuple(rows),
    )  # fmt: skip


def _orders(group: Group, metrics: Iterable[str]) -> list[str]:
    """Return the order of the rows from best to worst, in the paper and here."""
    notes = []
    for metric in metrics:
        placed = []
        for variant in group.variants:
            mean, over = variant.mean(metric), variant.row.published_over
            base = group.find(over).row.published.get(metric) if over and group.find(over) else 0.0  # type: ignore[union-attr]
            if mean is not None and metric in variant.row.published and base is not None:
                placed.append((variant.label, base + variant.row.published[metric], mean))
        if len(placed) > 1:
            ours = sorted(placed, key=lambda p: -p[2])
            ranked = groupby(sorted(placed, key=lambda p: -p[1]), key=lambda p: p[1])
            tied = [[p[0] for p in rows] for _, rows in ranked]  # rows with equal numbers
            theirs = [published for _, published, _ in ours]
            same = theirs == sorted(theirs, reverse=True)
            told = "the same" if same else " > ".join(label for label, _, _ in ours)
            paper = " > ".join(" = ".join(labels) for labels in tied)
            notes.append(f"Order by {metric}, paper: {paper}; here: {told}.")
    return notes


def _agreement(published: float, ours: Difference | None) -> str:
    if ours is None:
        return "–"
    if ours.is_unknown:
        return "no interval"
    if not ours.direction:
        return "not established"
    if len(ours.seeds) == 1:
        return "one seed"
    return "same" if ours.direction * published > 0 else "opposite"


def _delta_table(group: Group, found: Differences) -> Section:
    variants = [v for v in group.variants if any((v.label, m) in found for m in METRICS)]
    metrics = [m for m in METRICS if any((v.label, m) in found for v in variants)]
    rows = [(v.label, *(delta(found.get((v.label, m))) for m in metrics)) for v in variants]
    base = group.baseline.label if group.baseline else ""
    note = (
        "Mean ± standard deviation over seeds; * for an established difference (see above), (*) if "
        "one seed shows it over other users only."
    )
    return Section(
        f"Differences to: {base}", notes=(note,) if rows else (), header=("row", *metrics),
        rows=tuple(rows),
    )  # fmt: skip


def _absolute_table(group: Group) -> Section:
    metrics = [m for m in ABSOLUTE if any(v.values(m) for v in group.variants)]
    rows = [
        (v.label, str(len(v.records)), *(spread_of(v.values(m).values()) for m in metrics))
        for v in group.variants
    ]
    return Section("Test metrics, percent", header=("row", "seeds", *metrics), rows=tuple(rows))


def _details(group: Group, found: Differences) -> Section:
    rows = []
    for (label, metric), d in found.items():
        boot = d.bootstrap
        rows.append((
            label, metric, signed(d.mean), " ".join(signed(value) for value in d.seeds),
            _interval((boot.low, boot.high) if boot else None), _interval(d.over_seeds),
            _interval(d.interval),
            "–" if d.detectable is None else f"{d.detectable:.2f}",
            f"{boot.num_users:,}" if boot else "–",
        ))  # fmt: skip
    header = ("row", "metric", "difference", "each seed", "95 % over users", "95 % over seeds",
              "95 % over both", "detectable", "users")  # fmt: skip
    return Section(
        "Every difference with its interval", header=header, rows=tuple(rows), folded=True
    )


def _interval(found: tuple[float, float] | None) -> str:
    return f"[{signed(found[0])}, {signed(found[1])}]" if found else "–"
