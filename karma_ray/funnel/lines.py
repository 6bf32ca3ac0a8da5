"""The lines of the report: what each stage measures, and the differences beside the paper's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from karma_ray.funnel.opened import ACTION_ONLY, KARMA, NONE
from karma_ray.funnel.outcomes import Pairs, UserSums, difference, flat, mean_of
from karma_ray.funnel.sizes import Sizes
from karma_ray.report.funnel_table import Delta, FunnelRow
from karma_ray.studies.comparison import Difference

RANKING, PRERANK, RECALL = "ranking", "prerank", "recall"
PAPER = {RANKING: 0.25, PRERANK: 1.86, RECALL: 2.51}
"""Published differences in points: CTR AUC, HR@500 and HR@5000."""


@dataclass(frozen=True)
class Line:
    """One metric of a stage."""

    stage: str
    name: str
    """Its key inside the stage."""
    label: str
    metric: str
    """The metric of a run's sums."""
    none: str = ""
    """The metric without KARMA that it is compared with; empty if there is none."""
    is_headline: bool = False
    """Whether it is the paper's; its differences have no name of their own in their keys."""

    def value_key(self, arm: str) -> str:
        """Return `stage/name[/arm]`."""
        return f"{self.stage}/{self.name}" + ("" if arm == KARMA else f"/{arm}")

    def delta_key(self, arm: str) -> str:
        """Return `stage/[name/]delta_arm`."""
        return f"{self.stage}/" + ("" if self.is_headline else f"{self.name}/") + f"delta_{arm}"


@dataclass
class Arms:
    """The sums of one stage: of every run, of every action-only run, and of neither."""

    karma: list[UserSums] = field(default_factory=list)
    action_only: list[UserSums] = field(default_factory=list)
    none: list[UserSums] = field(default_factory=list)
    """One for all runs, or one for every seed."""


def lines(sizes: Sizes) -> list[Line]:
    """Return the lines of all stages."""
    recalled, kept = sizes.recall_metric, sizes.prerank_metric
    k = sizes.recalled
    return [
        Line(RECALL, recalled, f"{recalled}, list of h_t, exact", "exact", is_headline=True),
        Line(RECALL, "ann", f"{recalled}, list of h_t, approximate", "ann"),
        Line(RECALL, "union", f"{recalled}, union with other channels", "union", "union"),
        Line(RECALL, "category_match", f"category match@{k}, list of h_t", "category_match"),
        Line(RECALL, "union_category_match", f"category match@{k}, union",
             "union_category_match", "union_category_match"),
        Line(PRERANK, kept, f"{kept}, clicks that are kept", "kept", "kept", is_headline=True),
        Line(PRERANK, "all_scene", f"{kept}, all scenes of the query", "all_scene", "all_scene"),
        Line(RANKING, "AUC", "AUC, similarity features", "AUC", "AUC", is_headline=True),
        Line(RANKING, "gAUC", "gAUC, similarity features", "gAUC", "gAUC"),
        Line(RANKING, "interest_AUC", "AUC, also h_t . e", "interest_AUC", "AUC"),
        Line(RANKING, "interest_gAUC", "gAUC, also h_t . e", "interest_gAUC", "gAUC"),
    ]  # fmt: skip


def told(
    line: Line, arms: Arms, pairs: Sequence[tuple[int, int]]
) -> tuple[FunnelRow, dict[str, float]]:
    """Return a line of the page and its metrics under stable keys."""
    none = arms.none if line.none else []
    means = {
        KARMA: mean_of(arms.karma, line.metric),
        ACTION_ONLY: mean_of(arms.action_only, line.metric),
        NONE: mean_of(none, line.none),
    }
    beside: Pairs = [(arms.karma[one], arms.action_only[other]) for one, other in pairs]
    without: Pairs = [
        (one, none[min(at, len(none) - 1)]) for at, one in enumerate(arms.karma) if none
    ]
    over_action = difference(beside, line.metric) if beside else None
    over_none = difference(without, line.metric, line.none) if without else None
    found = {line.value_key(arm): mean for arm, mean in means.items() if mean is not None}
    for arm, delta in {ACTION_ONLY: over_action, NONE: over_none}.items():
        found |= flat(line.delta_key(arm), delta) if delta else {}
    paper = PAPER[line.stage] if line.is_headline else None
    row = FunnelRow(
        line.stage, line.label, means[KARMA], means[ACTION_ONLY], means[NONE],
        _delta(over_action), _delta(over_none), paper,
    )  # fmt: skip
    return row, found


def with_increment(metrics: Mapping[str, float]) -> dict[str, float]:
    """Let recall's `delta_none` be what h_t adds to the union of the other channels."""
    union = f"{RECALL}/union/delta_{NONE}"
    added = {
        f"{RECALL}/delta_{NONE}{key.removeprefix(union)}": value
        for key, value in metrics.items()
        if key.startswith(union)
    }
    return {**metrics, **added}


def _delta(found: Difference | None) -> Delta | None:
    if found is None or found.interval is None:
        return None
    return Delta(found.mean, *found.interval, found.seeds)
