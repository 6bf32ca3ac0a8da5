from __future__ import annotations

import json
from pathlib import Path

import pytest
from ray import tune

from jobs.tune import main
from karma_ray import cli
from karma_ray.cluster.search_space import Space, assignments, load_space
from karma_ray.cluster.tuning import Trial, best_of, describe, reported_value, search
from karma_ray.config import Config, override
from karma_ray.errors import InputError, KarmaRayError

ROOT = Path(__file__).resolve().parents[2]
STEPS = 64


def space(metric: str = "valid/HR@50") -> Space:
    return Space(
        path="inline",
        domains={"objective.lambda_dec": tune.uniform(0.0, 2.0)},
        metric=metric,
        base_recipe="toy",
        fixed=(f"training.steps={STEPS}", "training.validate_every=4"),
    )


def write_space(folder: Path, text: str) -> str:
    path = folder / "space.py"
    path.write_text("from ray import tune\n" + text)
    return str(path)


def trial(name: str, value: float | None, *, error: str | None = None) -> Trial:
    return Trial(name, {}, value, STEPS, False, error)


def test_a_trial_whose_metric_is_no_number_never_wins() -> None:
    trials = [trial("a", float("nan")), trial("b", 3.0), trial("c", float("inf")), trial("d", 2.0)]
    assert best_of(trials, "valid/HR@50").name == "b"
    assert best_of(trials[::-1], "valid/HR@50").name == "b"


def test_a_search_without_a_single_number_says_what_it_found_instead() -> None:
    with pytest.raises(KarmaRayError, match=r"every trial failed.*valid/HR@50 of nan"):
        best_of([trial("a", float("nan")), trial("b", None)], "valid/HR@50")
    with pytest.raises(KarmaRayError, match=r"every trial failed.*out of memory"):
        best_of([trial("a", None, error="out of memory")], "valid/HR@50")


@pytest.mark.ray
def test_weak_trials_stop_early_and_the_best_one_is_found(ray_cluster, tmp_path) -> None:
    # Defined here: a worker process cannot import a test module, but unpickles a closure.
    def best_at_one_point_two(config: Config, data: str | None, out: str, *, on_validate) -> None:
        import numpy as np

        target = np.exp(-((config.objective.lambda_dec - 1.2) ** 2))
        for step in range(4, config.training.steps + 1, 4):
            learned = 1.0 - np.exp(-step / 16)
            on_validate(step, {"valid/HR@50": 100 * target * learned, "HR@50": -1.0})

    out = str(tmp_path / "search")
    result = search(
        space(),
        space().base(),
        data=None,
        trials=3,
        out=out,
        max_concurrent=1,
        train=best_at_one_point_two,
    )
    stopped = [trial for trial in result.trials if trial.stopped_early]
    finished = [trial for trial in result.trials if trial.step == STEPS]
    assert stopped and all(trial.step < STEPS for trial in stopped)
    assert finished and len(stopped) + len(finished) == 3

    best = max(finished, key=lambda trial: trial.value or 0.0)
    assert result.best == best
    # Trials run one after the other: the first one is never stopped, a better one not either.
    assert len(finished) == 2
    assert best.value is not None and best.value > 50.0
    assert float(result.flags().split("=")[1]) == best.values["objective.lambda_dec"]

    saved = json.loads(Path(out, "trials.json").read_text())
    assert len(saved["trials"]) == 3 and saved["best"] == best.name
    assert json.loads(Path(out, "manifest.json").read_text())["kind"] == "search"
    assert "stopped early" in describe(result) and result.flags() in describe(result)


@pytest.mark.ray
def test_a_failing_trial_is_reported_and_the_search_goes_on(ray_cluster, tmp_path) -> None:
    def fails_above(config: Config, data: str | None, out: str, *, on_validate) -> None:
        if config.objective.lambda_dec > 1.2:
            raise RuntimeError("lambda too high")
        on_validate(config.training.steps, {"HR@50": 10.0 * config.objective.lambda_dec})

    result = search(
        space(), space().base(), data=None, trials=2, out=str(tmp_path), max_concurrent=2,
        train=fails_above,
    )  # fmt: skip
    failed = [trial for trial in result.trials if trial.error]
    assert len(failed) == 1
    assert all("lambda too high" in (trial.error or "") for trial in failed)
    assert result.best.error is None and result.best.values["objective.lambda_dec"] <= 1.2


def test_a_validation_metric_is_found_with_or_without_its_prefix() -> None:
    assert reported_value("valid/gAUC", {"valid/gAUC": 60.0, "gAUC": 1.0}) == 60.0
    assert reported_value("valid/gAUC", {"gAUC": 60.0}) == 60.0
    with pytest.raises(
        InputError, match=r"METRIC: 'valid/HR@5' is not valid; choices: HR@50, gAUC"
    ):
        reported_value("valid/HR@5", {"gAUC": 60.0, "HR@50": 1.0})


@pytest.mark.slow
def test_a_search_whose_every_trial_fails_says_why(ray_cluster, tmp_path) -> None:
    def fails(config: Config, data: str | None, out: str, *, on_validate) -> None:
        raise RuntimeError("no such weather")

    with pytest.raises(KarmaRayError, match=r"every trial failed.*no such weather"):
        search(space(), space().base(), data=None, trials=1, out=str(tmp_path), train=fails)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trials": 0}, "--trials: 0 must be at least 1"),
        ({"max_concurrent": 0}, "--concurrent: 0 must be at least 1"),
        ({"base": Config(recipe="popularity")}, "trains nothing; choices: action_only"),
    ],
)
def test_a_search_that_cannot_be_run_is_refused(tmp_path, changes, message: str) -> None:
    arguments = {"base": space().base(), "data": None, "trials": 1, "out": str(tmp_path)}
    with pytest.raises(InputError, match=message):
        search(space(), **(arguments | changes))


@pytest.mark.parametrize("path", sorted((ROOT / "tune_spaces").glob("*.py")), ids=lambda p: p.stem)
def test_the_spaces_that_ship_can_be_loaded(path: Path) -> None:
    loaded = load_space(str(path))
    assert loaded.metric.startswith("valid/")
    assert 0 < loaded.base().training.validate_every < loaded.base().training.steps


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no SPACE"),
        ("SPACE = {'seed': tune.choice([1])}\nMETRIC = 'HR@50'", "METRIC: 'HR@50' must be a valid"),
        ("SPACE = {'seed': 3}\nMETRIC = 'valid/MRR'", "SPACE seed: 3 is not a Ray Tune domain"),
        (
            "SPACE = {'objective.lambda': tune.choice([1])}\nMETRIC = 'valid/MRR'",
            "'lambda' is not a known field; choices: action_loss",
        ),
        (
            "SPACE = {'objective.action_loss': tune.choice(['hinge'])}\nMETRIC = 'valid/MRR'",
            "objective.action_loss: 'hinge' should be 'pairwise'",
        ),
        (
            "SPACE = {'seed': tune.choice([1])}\nMETRIC = 'valid/MRR'\nBASE_RECIPE = 'toys'",
            "'toys' is not valid; choices: action_only",
        ),
        ("SPACE = nothing", "cannot be run"),
    ],
)
def test_a_space_that_makes_no_sense_is_refused(tmp_path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_space(write_space(tmp_path, text))


def test_a_space_that_does_not_exist_names_its_neighbours(tmp_path) -> None:
    known = write_space(tmp_path, "")
    with pytest.raises(InputError, match=f"is not a file; choices: {known}"):
        load_space(str(tmp_path / "other.py"))


@pytest.mark.parametrize("argv", [["nowhere.py"], [], ["tune_spaces/lambdas.py", "--trials", "x"]])
def test_the_job_refuses_wrong_arguments_before_it_starts_a_cluster(argv, capsys) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.run(main, argv)
    assert exit_.value.code == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize("value", [0.1, 1e-7, 3, True, "infonce"])
def test_drawn_values_survive_the_command_line(value: object) -> None:
    path, _, text = assignments({"objective.lambda_dec": value})[0].partition("=")
    assert path == "objective.lambda_dec"
    if isinstance(value, float):
        config = override(Config(), [f"{path}={text}"])
        assert config.objective.lambda_dec == value
    else:
        assert text == str(value)


def test_a_search_over_a_pretrained_llm_is_gentle_but_in_what_it_sets_or_draws(
    tmp_path: Path,
) -> None:
    text = (
        "from ray import tune\n"
        "BASE_RECIPE, METRIC = 'karma_text', 'valid/HR@50'\n"
        "SPACE = {'training.learning_rate': tune.loguniform(1e-5, 1e-4)}\n"
        "FIXED = ('training.new_module_lr=3',)\n"
    )
    base = load_space(write_space(tmp_path, text)).base(["model.checkpoint=Qwen/Qwen3-0.6B"])
    assert base.training.new_module_lr == 3
    assert base.warmup.learning_rate == 5e-5 and base.model.item_encoder.pool == "mean"
    drawn = override(base, assignments({"training.learning_rate": 2e-5}))
    assert drawn.training.learning_rate == 2e-5
