"""The standing of a run between its floors and ceilings, as numbers and as sentences."""

from __future__ import annotations

from dataclasses import dataclass

from karma_ray.report.record import Ranked, Role, RunRecord, number

METRICS = (
    "HR@10", "HR@50", "HR@200", "HR@1000", "NDCG@10", "MRR", "gAUC", "JS@50", "JS@50_excl_gt",
)  # fmt: skip
HEADLINE = ("HR@10", "HR@50", "gAUC")
SECTIONS = {
    "": "All test clicks",
    "in_query/": "Inside the query's own items",
    "warm/": "Warm items (clicked in training)",
    "cold/": "Cold items (never clicked in training)",
    "first/": "First-time targets",
    "repeat/": "Repeat targets",
    "held_out/": "Categories held out of training",
    "paraphrased/": "The same queries in other words",
}
NOTES = {
    "held_out/": "Clicks on categories that no training click had (prepare.hold_out): only what "
    "the model reads in the items' texts can find them.",
    "paraphrased/": "The test again, with queries in words that training never saw "
    "(evaluation.paraphrases): what is lost against the first table hung on the words themselves.",
}
"""Sentences that explain a section."""
PARTS = {"": "All test clicks", "warm/": "Items clicked in training", "cold/": "New items"}
CEILING = "oracle"


@dataclass(frozen=True)
class Standing:
    """One metric of the run, with the best floor and the posterior oracle."""

    metric: str
    value: float
    floor: str | None
    floor_value: float | None
    ceiling_value: float | None

    @property
    def passes(self) -> bool:
        """Whether the run is above its best floor."""
        return self.floor_value is None or self.value > self.floor_value

    @property
    def share_of_the_way(self) -> float | None:
        """(run - best floor) / (oracle - best floor) in percent; None if that is undefined."""
        if self.floor_value is None or self.ceiling_value is None:
            return None
        room = self.ceiling_value - self.floor_value
        return 100.0 * (self.value - self.floor_value) / room if room > 0 else None


@dataclass(frozen=True)
class Cell:
    """One number of a table, formatted, and the role of its ranker."""

    text: str
    role: Role


@dataclass(frozen=True)
class Section:
    """A table with a row per metric and a column per ranker."""

    title: str
    num_test: str
    rankers: list[Ranked]
    rows: list[tuple[str, list[Cell]]]
    note: str = ""


def format_metric(value: float | None) -> str:
    """Format with two decimals, or as a dash if not measured."""
    return "–" if value is None else f"{value:.2f}"


def format_short(value: float | None) -> str:
    """Format with one decimal, or as a dash if not measured."""
    return "–" if value is None else f"{value:.1f}"


def format_count(value: object) -> str:
    """Format a count with thousands separators, or as a dash."""
    count = number(value)
    return "–" if count is None else f"{count:,.0f}"


def standing(record: RunRecord, metric: str) -> Standing | None:
    """Return the run's standing on one metric; None if the run did not measure it."""
    value = number(record.metrics.get(metric))
    if value is None:
        return None
    floors = [
        (floor_value, ranker.name)
        for ranker in record.rankers()
        if ranker.role == "floor" and (floor_value := ranker.value(metric)) is not None
    ]
    # The first of equal ones: without queries the filters equal popularity and are named so.
    floor_value, floor = max(floors, key=lambda pair: pair[0], default=(None, None))
    ceiling = number(record.floors.get(CEILING, {}).get(metric))
    return Standing(metric, value, floor, floor_value, ceiling)


def headline_places(record: RunRecord, prefix: str = "") -> list[Standing]:
    """Return the run's standing on each headline metric that it measured on a part of the data."""
    places = (standing(record, prefix + metric) for metric in HEADLINE)
    return [place for place in places if place is not None]


def sections(record: RunRecord) -> list[Section]:
    """Return the tables: those of `SECTIONS`; empty ones are left out."""
    result = []
    rankers = record.rankers()
    for prefix, title in SECTIONS.items():
        rows = []
        for metric in METRICS:
            values = [ranker.value(prefix + metric) for ranker in rankers]
            if any(value is not None for value in values):
                pairs = zip(values, rankers, strict=True)
                cells = [Cell(format_metric(value), ranker.role) for value, ranker in pairs]
                rows.append((metric, cells))
        if rows:
            counts = [ranker.value(prefix + "num_test") for ranker in rankers]
            known = [count for count in counts if count is not None]
            num_test = format_count(max(known)) if known else "–"
            result.append(Section(title, num_test, rankers, rows, NOTES.get(prefix, "")))
    return result


def headline(record: RunRecord) -> list[str]:
    """Return sentences on the result: the verdict, the meaning of each metric, the checks."""
    meanings = [_sentence(place) for place in headline_places(record)]
    return [*verdict(record), *meanings, *check_sentences(record)]


def verdict(record: RunRecord) -> list[str]:
    """Return a line each for all clicks, warm and cold items: which floors the run beats.

    Empty for a floor or ceiling, and if no floor was measured.
    """
    if not record.is_trained:
        return []
    lines = []
    for prefix, name in PARTS.items():
        compared = [p for p in headline_places(record, prefix) if p.floor is not None]
        count = number(record.metrics.get(f"{prefix}num_test"))
        if compared and count != 0:
            lines.append(f"{name} ({format_count(count)}): {_passed(compared)}.")
    return lines


def _passed(places: list[Standing]) -> str:
    passed = [place.metric.rpartition("/")[2] for place in places if place.passes]
    missed = [
        f"{place.metric.rpartition('/')[2]} {format_short(place.value)} is not above "
        f"{place.floor}'s {format_short(place.floor_value)}"
        for place in places
        if not place.passes
    ]
    above = [f"above every floor on {_listed(passed)}"] if passed else []
    return "; ".join([*above, *missed])


def _listed(names: list[str]) -> str:
    return " and ".join([*([", ".join(names[:-1])] if names[1:] else []), names[-1]])


def check_sentences(record: RunRecord) -> list[str]:
    """Return sentences that say whether the history, and whether the future, is used."""
    return [*_shuffle_sentence(record), *_perturbation_sentences(record)]


def _sentence(place: Standing) -> str:
    if place.metric.startswith("HR@"):
        depth = place.metric.removeprefix("HR@")
        text = (
            f"{place.metric}: for {place.value:.1f} % of the test clicks, the clicked item is "
            f"among the first {depth} of the whole catalogue"
        )
    else:
        text = (
            f"{place.metric}: {place.value:.1f}; 50 is random guessing of the clicked item among "
            "those shown together"
        )
    if place.floor is not None and place.floor_value is not None:
        text += f"; the best floor, {place.floor}, has {place.floor_value:.1f}"
    if place.ceiling_value is not None:
        text += f"; the posterior oracle has {place.ceiling_value:.1f}"
    if place.passes and place.share_of_the_way is not None:
        text += f" ({place.share_of_the_way:.0f} % of the way from that floor)"
    return text + "."


def _shuffle_sentence(record: RunRecord) -> list[str]:
    shuffled = record.checks.get("shuffled_history") or {}
    for metric in ("HR@50", "HR@10", "gAUC"):
        before, after = number(record.metrics.get(metric)), number(shuffled.get(metric))
        if before is not None and after is not None:
            verdict = "the history is used" if after < before else "the history is NOT used"
            return [
                f"With the histories of other users, {metric} goes from {before:.1f} to "
                f"{after:.1f}: {verdict}."
            ]
    return []


def _perturbation_sentences(record: RunRecord) -> list[str]:
    keys = {"future_perturbation_max_abs": "future", "same_step_perturbation_max_abs": "same-step"}
    result = []
    for key, name in keys.items():
        change = number(record.checks.get(key))
        if change is not None:
            verdict = "no leak" if change == 0 else "A LEAK"
            result.append(f"Replacing {name} items changes h_t by at most {change:g}: {verdict}.")
    return result
