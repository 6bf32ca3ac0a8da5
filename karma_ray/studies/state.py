"""Sections on the training of a study's rows: time to a score, collapse and cost."""

from __future__ import annotations

from karma_ray.report.record import number
from karma_ray.studies.comparison import Group, Variant
from karma_ray.studies.curves import late_gain, race
from karma_ray.studies.sections import Section, mean_of, plain, signed, spread_of

CURVE = ("HR@10", "HR@50", "HR@200", "gAUC")
PROBES = {
    "collapse/effective_rank_e": "effective rank e",
    "collapse/effective_rank_h": "effective rank h",
    "collapse/mean_cosine_e": "mean cosine e",
    "collapse/mean_cosine_h": "mean cosine h",
    "decode_gap": "decode gap, nats",
    "generator/deviation": "deviation of samples",
    "negatives/surviving": "negatives per step",
}


def equal_seconds(group: Group) -> Section:
    """Return validation metrics at equal training times and at the end."""
    rows = []
    for variant in group.variants:
        ends = [r["curve"][-1] for r in variant.records.values() if r.get("curve")]
        if not ends:
            continue
        cells, seconds = [], "–"
        base = None if variant is group.baseline else group.baseline
        for metric in CURVE:
            end = plain(mean_of([e[metric] for e in ends if metric in e]))
            if base is not None and (found := race(variant, base, metric)) is not None:
                seconds = plain(found.seconds, 0)
                then = f"{plain(found.then)} ({signed(found.then_lead)})"
                end = f"{then} / {plain(found.end)} ({signed(found.end_lead)})"
            cells.append(end)
        gain = late_gain(variant, "HR@50")
        in_all = plain(mean_of([e["seconds"] for e in ends]), 0)
        rows.append((variant.label, in_all, seconds, *cells, "–" if gain is None else signed(gain)))
    note = (
        "Validation examples: after the seconds of joint training that both the row and the "
        "baseline of the same seed reached / after the last step; in parentheses the lead over "
        "that baseline. Stage 1 is not counted (it is shared, except for the visual term's). "
        "The learning rate decays over the steps, so the slower row is measured before its rate "
        "has decayed. Last column: gain of the last quarter of the steps; large values mean that "
        "the curve still rises. Seconds are comparable only between runs on one machine with "
        "equally many trials at a time."
    )
    header = (
        "row", "total seconds", "measured after", *(f"{m}: then / end" for m in CURVE),
        "late HR@50",
    )  # fmt: skip
    return Section(
        "Equal seconds, equal steps", notes=(note,) if rows else (), header=header,
        rows=tuple(rows),
    )  # fmt: skip


def collapse(group: Group) -> Section:
    """Return ranks, cosines, decode gap, other collapse metrics, and alarms."""

    def values(variant: Variant, name: str) -> list[float]:
        sources = [{**r.get("probes", {}), **r["metrics"]} for r in variant.records.values()]
        return [v for source in sources if (v := number(source.get(name))) is not None]

    names = dict(PROBES)
    for variant in group.variants:
        for record in variant.records.values():
            found = [*record["metrics"], *record.get("probes", {})]
            more = [n for n in found if n.startswith("collapse/") and n not in names]
            names |= {name: name.removeprefix("collapse/").replace("_", " ") for name in more}
    names = {n: told for n, told in names.items() if any(values(v, n) for v in group.variants)}
    rows = [
        (v.label, *(spread_of(values(v, n), 2) for n in names), _alarms(v))
        for v in group.variants
        if any(values(v, n) for n in names)
    ]
    note = (
        "Decode gap: cross-entropy of the target's text from another user's interest minus that "
        "from the own interest, mean of the last reports. It uses Task 2's decoder, which is not "
        "trained in rows without Task 2: there a gap of 0 does not mean that h has lost the text "
        "(docs/diagnosis.md). Deviation of samples: that of generated embeddings over requests, "
        "relative to that of items; far above 1 the sampler fails (docs/generators.md)."
    )
    return Section(
        "Collapse metrics", notes=(note,) if rows else (),
        header=("row", *names.values(), "alarms"), rows=tuple(rows),
    )  # fmt: skip


def _alarms(variant: Variant) -> str:
    """Return the kinds of collapse alarms that were raised, with their number of runs."""
    raised = [kind for record in variant.records.values() for kind in record.get("alarms", {})]
    counted = {kind: raised.count(kind) for kind in sorted(raised)}
    return ", ".join(f"{kind} ({count})" for kind, count in counted.items()) or "none"


def cost(group: Group) -> Section:
    """Return seconds, memory and the number of settings tried."""
    rows = []
    for variant in group.variants:
        # For a resumed run only the last attempt was measured, so it is left out.
        records = [r for r in variant.records.values() if not r.get("resumed")]
        joint = [r.get("stage_seconds", {}).get("joint") for r in records]
        tried = {v.key for v in group.variants if v.row is variant.row}
        rows.append((
            variant.label,
            ", ".join(str(seed) for seed in variant.records),
            str(max(variant.tried, len(tried))),
            spread_of([r["seconds"] for r in records], 0),
            spread_of([s for s in joint if s is not None], 0),
            spread_of([p["host"] for r in records if (p := r.get("peak_gib"))], 2),
            spread_of([p["gpu"] for r in records if "gpu" in (p := r.get("peak_gib", {}))], 2),
        ))  # fmt: skip
    header = (
        "row", "seeds", "settings tried", "wall seconds", "joint training seconds",
        "peak GiB", "peak GPU GiB",
    )  # fmt: skip
    return Section("Cost of a run", header=header, rows=tuple(rows))
