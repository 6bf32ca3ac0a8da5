from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest
from ray import tune

from jobs.tune import main
from karma_ray import cli, recipes
from karma_ray.artifacts import join
from karma_ray.cli import load_config
from karma_ray.cluster.accelerators import gpu_share
from karma_ray.cluster.search_space import Space, load_space
from karma_ray.cluster.trials import reported_value
from karma_ray.cluster.tuning import _prepare, search
from karma_ray.config import Config, override
from karma_ray.data.synthetic.config import ToyShopConfig
from karma_ray.data.synthetic.shop import write_toy_shop
from karma_ray.errors import InputError, KarmaRayError
from karma_ray.runs.first_stages import start_stage
from karma_ray.runs.preparation import ensure_prepared
from karma_ray.studies.ledger import assignments, describe
from tests.tiny_run import SMALL_STUDY

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


def flags(*argv: str) -> Namespace:
    return cli.parser("", config=True).parse_args(argv)


def write_space(folder: Path, text: str) -> str:
    path = folder / "space.py"
    path.write_text("from ray import tune\n" + text)
    return str(path)


@pytest.mark.ray
def test_weak_trials_stop_early_and_the_best_one_is_found(ray_cluster, tmp_path) -> None:
    # Defined here: a worker process cannot import a test module, but unpickles a closure.
    def best_at_one_point_two(
        config: Config, data: str | None, out: str, *, resume, on_validate
    ) -> None:
        import numpy as np

        target = np.exp(-((config.objective.lambda_dec - 1.2) ** 2))
        for step in range(4, config.training.steps + 1, 4):
            learned = 1.0 - np.exp(-step / 16)
            on_validate(step, {"valid/HR@50": 100 * target * learned, "HR@50": -1.0})

    out = str(tmp_path / "search")
    base = space().base(["training.num_workers=4", "training.min_workers=2"])
    result = search(
        space(),
        base,
        data=None,
        trials=3,
        out=out,
        max_concurrent=1,
        train=best_at_one_point_two,
    )
    stopped = [trial for trial in result.trials if trial.ended == "stopped early"]
    finished = [trial for trial in result.trials if trial.step == STEPS]
    assert stopped and all(trial.step < STEPS for trial in stopped)
    assert finished and len(stopped) + len(finished) == 3

    best = max(finished, key=lambda trial: trial.value(space().metric) or 0.0)
    assert result.best == best
    # Trials run one after the other: the first one is never stopped, a better one not either.
    assert len(finished) == 2
    assert (best.value(space().metric) or 0.0) > 50.0
    assert float(result.flags().split("=")[1]) == best.values["objective.lambda_dec"]

    saved = json.loads(Path(out, "trials.json").read_text())
    assert len(saved["trials"]) == 3 and saved["best"] == best.name
    assert json.loads(Path(out, "manifest.json").read_text())["kind"] == "search"
    assert 0 < result.saved_share() < 1 / 3
    best_config = load_config(flags("--config", join(out, "best.json")), "toy")
    assert best_config == result.config()
    # Trials train in one process each; the best one is trained on the machines that were asked for.
    assert best_config == override(base, assignments(best.values))
    assert "stopped early" in describe(result) and result.flags() in describe(result)


@pytest.mark.ray
def test_a_failing_trial_is_reported_and_the_search_goes_on(ray_cluster, tmp_path) -> None:
    def fails_above(config: Config, data: str | None, out: str, *, resume, on_validate) -> None:
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
    assert failed[0].failures == 3 and failed[0].ended == "failed"
    assert result.best.error is None and result.best.values["objective.lambda_dec"] <= 1.2


@pytest.mark.ray
def test_first_stages_of_a_search_are_those_that_a_run_would_make(ray_cluster, tmp_path) -> None:
    shop = str(tmp_path / "shop")
    write_toy_shop(shop, ToyShopConfig(num_items=240, num_users=60))
    base = override(recipes.build("toy"), SMALL_STUDY)
    _prepare(space(), base, shop, str(tmp_path / "search"), 0.0)
    start_stage(base, ensure_prepared(shop, base.prepare), str(tmp_path / "run"))
    made, expected = (
        {str(file.relative_to(cache)): file.read_bytes() for file in cache.rglob("*.safetensors")}
        for cache in (tmp_path / "search", tmp_path / "run")
    )
    assert len(expected) > 1 and made == expected


def test_a_validation_metric_is_found_with_or_without_its_prefix() -> None:
    assert reported_value("valid/gAUC", {"valid/gAUC": 60.0, "gAUC": 1.0}) == 60.0
    assert reported_value("valid/gAUC", {"gAUC": 60.0}) == 60.0
    with pytest.raises(
        InputError, match=r"METRIC: 'valid/HR@5' is not valid; choices: HR@50, gAUC"
    ):
        reported_value("valid/HR@5", {"gAUC": 60.0, "HR@50": 1.0})


@pytest.mark.slow
def test_a_search_whose_every_trial_fails_says_why(ray_cluster, tmp_path) -> None:
    def fails(config: Config, data: str | None, out: str, *, resume, on_validate) -> None:
        raise RuntimeError("no such weather")

    with pytest.raises(KarmaRayError, match=r"every trial failed.*no such weather"):
        search(space(), space().base(), data=None, trials=1, out=str(tmp_path), train=fails)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trials": 0}, "--trials: 0 must be at least 1"),
        ({"max_concurrent": 0}, "--concurrent: 0 must be at least 1"),
        ({"measure_seeds": -1}, "--measure-seeds: -1 must be at least 0"),
        ({"base": Config(recipe="karma_txt")}, "recipe: 'karma_txt' is not valid"),
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
            "SPACE objective.action_loss: 'hinge' cannot be set",
        ),
        (
            "SPACE = {'seed': tune.choice([1])}\nMETRIC = 'valid/MRR'\nBASE_RECIPE = 'toys'",
            "'toys' is not valid; choices: action_only",
        ),
        (
            "SPACE = {'seed': tune.choice([1])}\nMETRIC = 'valid/MRR'\nBASE_RECIPE = 'popularity'",
            "BASE_RECIPE: 'popularity' trains nothing; choices: action_only",
        ),
        (
            "SPACE = {'seed': tune.choice([1])}\nMETRIC = 'valid/AUC'\nBASE_RECIPE = 'ctr_din'",
            "BASE_RECIPE: 'ctr_din' trains a ranking model, which is not searched for",
        ),
        (
            "SPACE = {'seed': tune.choice([1])}\nMETRIC = 'valid/MRR'\nFIXED = 'training.steps=4'",
            "FIXED: 'training.steps=4' is not a list of settings",
        ),
        ("SPACE = nothing", "cannot be run"),
        (
            "SPACE = {'objective.action_loss': tune.choice(['bce', 3])}\nMETRIC = 'valid/MRR'",
            "SPACE objective.action_loss: 3 cannot be set",
        ),
        (
            "SPACE = {'objective.lambda_dec': tune.uniform(-1.0, 1.0)}\nMETRIC = 'valid/MRR'",
            "SPACE objective.lambda_dec: -1.0 cannot be set",
        ),
        (
            "SPACE = {'collate.drop_query': tune.uniform(0.1, 1.5)}\nMETRIC = 'valid/MRR'",
            r"SPACE collate.drop_query: 1.49\d* cannot be set",
        ),
        (
            "SPACE = {'seed': tune.sample_from(lambda _: 1)}\nMETRIC = 'valid/MRR'",
            "is a domain from which Optuna cannot draw",
        ),
        (
            "SPACE = {'model.decodability.recon_text': tune.choice(['own', 'shuffled'])}\n"
            "METRIC = 'valid/MRR'",
            "recon_text: 'shuffled' is a null control, which a search must not choose",
        ),
        (
            "SPACE = {'model.decodability.recon_detach_h': tune.choice([False, True])}\n"
            "METRIC = 'valid/MRR'",
            "recon_detach_h: True is a null control",
        ),
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


@pytest.mark.parametrize(
    ("gpus", "concurrent", "share"), [(0, 2, 0), (1, 2, 0.5), (2, 3, 0.5), (4, 2, 1), (3, 7, 1 / 3)]
)
def test_the_shares_of_concurrent_trials_fill_the_gpus(gpus, concurrent, share) -> None:
    assert gpu_share(gpus, concurrent) == pytest.approx(share)


def test_pictures_are_weighed_only_where_the_data_have_features(tmp_path: Path) -> None:
    drawn = load_space(str(ROOT / "tune_spaces" / "karma.py"))
    without = drawn.suited(str(tmp_path))
    assert without.base_recipe == "karma_text" and not without.base().objective.built.image
    assert drawn.domains.keys() - without.domains.keys() == {"objective.lambda_img"}
    (tmp_path / "visual_features").mkdir()
    assert drawn.suited(str(tmp_path)) == drawn and drawn.base().objective.built.image
