"""A search of a study: the same settings for every row, chosen on validation alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jobs.ablate import main
from karma_ray import cli, recipes
from karma_ray.config import override
from karma_ray.data.synthetic.config import ToyShopConfig
from karma_ray.data.synthetic.shop import write_toy_shop
from karma_ray.errors import InputError
from karma_ray.studies.plan import Data, named_rows
from karma_ray.studies.records import read_records
from karma_ray.studies.search import MOST, candidates, chosen_trials, search_trials
from tests.cluster.test_study import ONE_THREAD, SMALL


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    folder = str(tmp_path_factory.mktemp("shop") / "toy")
    write_toy_shop(folder, ToyShopConfig(num_items=240, num_users=60))
    return Data.open(folder)


def test_candidates_lie_around_a_configuration_and_begin_with_its_own() -> None:
    config = override(recipes.build("sasrec"), SMALL)
    rate, weight = config.training.learning_rate, config.objective.hard_weight
    found = candidates(config, MOST)
    assert found[0] == () and found[:3] == candidates(config, 3)
    assert len(set(found)) == MOST
    made = [override(config, settings) for settings in found]
    assert made[1].training.learning_rate == pytest.approx(rate / 3, rel=1e-2)
    assert made[2].training.learning_rate == pytest.approx(3 * rate, rel=1e-2)
    assert [c.objective.hard_weight for c in made[:3]] == [weight] * 3
    assert made[3].objective.hard_weight == pytest.approx(weight / 3, rel=1e-2)
    for number in (1, MOST + 1):
        with pytest.raises(InputError, match=r"--search.*2 to 9"):
            candidates(config, number)


@pytest.mark.parametrize("loss", ["pairwise", "infonce"])
def test_a_row_that_decodes_also_searches_the_weight_of_its_texts(loss: str) -> None:
    config = override(
        recipes.build("karma_text"), [f"objective.action_loss={loss}", "objective.lambda_dec=0.6"]
    )
    found = candidates(config, MOST)
    assert len(set(found)) == MOST
    assert [s.startswith("objective.lambda_dec=") for (s, *_) in found[1:6]] == [
        False, False, True, True, False,
    ]  # fmt: skip
    assert found[3:5] == [("objective.lambda_dec=0.2",), ("objective.lambda_dec=0.06",)]


@pytest.mark.parametrize(("recipe", "has_negatives"), [("hllm", True), ("sasrec", False)])
def test_a_weight_that_changes_nothing_is_not_searched(recipe: str, has_negatives: bool) -> None:
    config = override(recipes.build(recipe), SMALL)
    found = candidates(config, MOST, has_negatives=has_negatives)
    assert found[0] == () and len(set(found)) == MOST
    assert all(s.startswith("training.learning_rate=") for settings in found for s in settings)


def test_every_trained_row_gets_every_candidate_and_names_differ(data: Data) -> None:
    rows = named_rows("baselines", "popularity,sasrec,karma_text")
    trials = search_trials(rows, 0, data, (), 3)
    assert [t.row for t in trials] == ["sasrec", "karma_text"] * 3
    assert len({t.name for t in trials}) == 6
    assert [t.searched for t in trials[::2]] == [t.searched for t in trials[1::2]]
    # what was searched is not a condition of the comparison
    assert all(t.assignments == trials[0].assignments and not t.extra for t in trials)


@pytest.mark.slow
@pytest.mark.ray
def test_the_search_ends_with_the_best_candidate_for_every_seed(
    ray_cluster: None, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    sets = [flag for assignment in (*SMALL, *ONE_THREAD) for flag in ("--set", assignment)]
    command = ["baselines", "--data", data.uri, "--rows", "popularity,sasrec", "--seeds", "2",
               "--search", "3", *sets, "--results", "results"]  # fmt: skip
    main(command)
    told = capsys.readouterr().out
    assert "3 made; 0 already there" in told  # three candidates of the trained row
    assert "3 made; 1 already there" in told  # its other seed, the floor's two
    records = read_records(Path("results"))
    first = [r for r in records if r["row"] == "sasrec" and r["seed"] == 0]
    (second,) = [r for r in records if r["row"] == "sasrec" and r["seed"] == 1]
    (taken,) = [r for r in first if r.get("searched") == second.get("searched")]
    best = max(r["metrics"]["valid/HR@50"] for r in first)
    assert len(first) == 3 and taken["metrics"]["valid/HR@50"] == best
    text = Path("results/tables.md").read_text()
    assert "each row at its best setting" in text and "| SASRec (ids) | 0, 1 | 3 |" in text
    main(command)
    assert "0 made; 3 already there" in capsys.readouterr().out


def test_nothing_is_chosen_where_nothing_was_validated(data: Data, tmp_path: Path) -> None:
    rows = named_rows("baselines", "popularity,sasrec")
    trials = chosen_trials(rows, [0, 1], data, (), 2, tmp_path)
    assert [t.name for t in trials] == ["popularity-seed0", "popularity-seed1"]


def test_a_search_of_one_setting_is_refused_before_anything_starts(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        cli.run(main, ["baselines", "--data", data.uri, "--search", "1"])
    assert ended.value.code == 2 and "--search" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
