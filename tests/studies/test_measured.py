"""The best trial beside the default: from records, without a machine, and what is kept of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from karma_ray.data.synthetic.config import ToyShopConfig
from karma_ray.data.synthetic.shop import write_toy_shop
from karma_ray.errors import KarmaRayError
from karma_ray.evaluation.outcomes import Outcomes
from karma_ray.runs.executor import HERE
from karma_ray.studies.ledger import Measured, describe
from karma_ray.studies.measured import measure, read_measured
from karma_ray.studies.plan import Data
from karma_ray.studies.records import read_records
from tests.studies.searches import search
from tests.studies.study_records import outcomes

HITS = {"default": 2, "trial-003": 4}
"""Found targets of five, by row."""


def answer(found: Outcomes) -> dict[str, Any]:
    """What a finished run returns."""
    examples, ranks = found.packed()
    values, _, weights = found.values("HR@50")  # type: ignore[misc]
    metrics = {"HR@50": float((values * weights).sum() / weights.sum()), "num_test": len(values)}
    return {"metrics": metrics, "examples": examples, "outcomes": ranks}


class Scripted:
    """A machine that answers at once with known outcomes, and can lose some runs."""

    executor = HERE

    def __init__(self, loses: Sequence[str] = ()) -> None:
        self.loses, self.ran = loses, list[str]()

    def open(self) -> None:
        pass

    def possible_trials(self) -> int:
        return 1

    def start(self, function: Callable[..., Any], arguments: Sequence[Any], slots: int) -> Any:
        folder = str(arguments[2]) if function.__name__ == "train_trial" else ""
        if folder:
            self.ran.append(next(f"{row}-seed{n}" for row in HITS for n in range(9)
                                 if f"-{row}-seed{n}-" in folder))  # fmt: skip
        return (len(self.ran), folder)

    def ended(self, tasks: Sequence[Any], patience: float) -> list[Any]:
        return list(tasks)

    def result(self, task: Any) -> Any:
        number, folder = task
        if folder:
            name = self.ran[number - 1]
            if name in self.loses:
                raise RuntimeError("no memory")
            return answer(outcomes(HITS[name.rpartition("-")[0]]))
        return None

    def stop(self, tasks: Sequence[Any]) -> list[Any]:
        return []


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    folder = str(tmp_path_factory.mktemp("shop") / "toy")
    write_toy_shop(folder, ToyShopConfig(num_items=240, num_users=60))
    return Data.open(folder)


def measured(data: Data, out: Path, machine: Scripted, seeds: int = 2) -> Measured:
    found = search()
    return measure(
        found, found.base, data, machine, out=str(out), seeds=seeds, cache=str(out / "cache"),
        concurrent=1,
    )  # fmt: skip


def test_the_best_trial_is_compared_with_seeds_that_the_search_has_not_used(
    data: Data, tmp_path: Path
) -> None:
    machine = Scripted()
    found = measured(data, tmp_path, machine)
    assert found.trial == "003" and found.seeds == (1, 2) and search().base.seed == 0
    assert sorted(machine.ran) == [f"{row}-seed{seed}" for row in HITS for seed in (1, 2)]
    (one,) = found.compared
    assert (one.metric, one.default, one.best, one.difference) == ("HR@50", 40.0, 80.0, 40.0)
    assert one.interval == (40.0, 40.0) and one.mark == "*"
    by_row = {record["row"]: record["config"] for record in read_records(tmp_path / "measured")}
    assert by_row["trial-003"]["objective"]["action_loss"] == "infonce"
    assert by_row["default"]["objective"]["action_loss"] == search().base.objective.action_loss
    assert read_measured(str(tmp_path), "003") == found
    assert read_measured(str(tmp_path), "000") is None
    told = describe(replace(search(), measured=found))
    assert "Measured on test with seeds 1, 2;" in told
    assert "HR@50  40.00    80.00      +40.00 *    [+40.00, +40.00]" in told


def test_a_measurement_that_is_repeated_runs_only_what_has_no_record(
    data: Data, tmp_path: Path
) -> None:
    with pytest.raises(KarmaRayError, match=r"1 of 4 .* failed, trial-003-seed2 with: no memory"):
        measured(data, tmp_path, Scripted(["trial-003-seed2"]))
    assert read_measured(str(tmp_path), "003") is None
    again = Scripted()
    assert measured(data, tmp_path, again).seeds == (1, 2)
    assert again.ran == ["trial-003-seed2"]
    more = Scripted()
    assert measured(data, tmp_path, more, seeds=3).seeds == (1, 2, 3)
    assert sorted(more.ran) == ["default-seed3", "trial-003-seed3"]
