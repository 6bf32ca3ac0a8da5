from __future__ import annotations

import importlib
import json

import pytest

from karma_ray import cli, recipes
from karma_ray.config import Config, to_dict
from karma_ray.errors import InputError, KarmaRayError


def load(*argv: str, default: str = "toy") -> Config:
    return cli.load_config(cli.parser("a job", config=True).parse_args(argv), default)


def exit_code(main, argv: list[str] | None = None) -> int:
    with pytest.raises(SystemExit) as exit_:
        cli.run(main, argv)
    return exit_.value.code


def test_without_flags_the_job_runs_its_default_recipe() -> None:
    assert load() == recipes.toy()


def test_flags_choose_recipe_seed_and_fields() -> None:
    config = load("--recipe", "karma_text", "--seed", "5", "--set", "training.steps=9")
    assert (config.recipe, config.seed, config.training.steps) == ("karma_text", 5, 9)


def test_a_pretrained_llm_is_trained_gently_unless_flags_say_otherwise(caplog) -> None:
    llm = ("--recipe", "karma_text", "--set", "model.checkpoint=Qwen/Qwen3-0.6B")
    with caplog.at_level("INFO"):
        config = load(*llm, "--set", "collate.max_item_tokens=30")
    training, warmup = config.training, config.warmup
    assert (training.learning_rate, training.new_module_lr, warmup.learning_rate) == (
        5e-5,
        10,
        5e-5,
    )
    assert (config.pretrain.steps, config.collate.max_item_tokens) == (0, 30)
    assert "pretrained weights: training.learning_rate=5e-05" in caplog.text
    assert load(*llm, "--set", "training.learning_rate=1e-3").training.learning_rate == 1e-3
    assert load("--recipe", "karma_text") == recipes.karma_text()


def test_a_pretrained_llm_reads_an_item_as_the_mean_of_its_tokens_unless_flags_say_otherwise() -> (
    None
):
    llm = ("--recipe", "karma_text", "--set", "model.checkpoint=Qwen/Qwen3-0.6B")
    assert load(*llm).model.item_encoder.pool == "mean"
    typed = load(*llm, "--set", "model.item_encoder.pool=emb_token")
    assert typed.model.item_encoder.pool == "emb_token"
    pictured = load(*llm, "--set", "model.item_encoder.modality=multimodal")
    assert pictured.model.item_encoder.pool == "eos"


def test_a_saved_configuration_is_not_suited_anew(tmp_path) -> None:
    saved = load("--recipe", "hllm", "--set", "model.checkpoint=X", "--set", "pretrain.steps=7")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(to_dict(saved) | {"warmup": {"learning_rate": 0.25}}))
    config = load("--config", str(path))
    assert (config.warmup.learning_rate, config.pretrain.steps) == (0.25, 7)


def test_a_saved_configuration_of_a_small_model_is_suited_to_the_llm_that_flags_name(
    tmp_path, caplog
) -> None:
    saved = load("--recipe", "hllm", "--set", "training.learning_rate=3e-3")
    path = tmp_path / "best.json"
    path.write_text(json.dumps(to_dict(saved)))
    llm = ("--config", str(path), "--set", "model.checkpoint=X")
    with caplog.at_level("INFO"):
        config = load(*llm, "--set", "collate.max_item_tokens=30")
    recipe = load("--recipe", "hllm", *llm[2:], "--set", "collate.max_item_tokens=30")
    assert config == recipe and config.training.learning_rate == 5e-5
    assert "pretrained weights: training.learning_rate=5e-05" in caplog.text
    typed = load(*llm, "--set", "training.learning_rate=1e-3").training.learning_rate
    assert (typed, load(*llm[:2])) == (1e-3, saved)


def test_a_file_that_names_an_llm_keeps_what_it_says_and_is_suited_in_the_rest(tmp_path) -> None:
    model = {"item_encoder": {"checkpoint": "X"}, "user_decoder": {"checkpoint": "X"}}
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"recipe": "hllm", "model": model, "pretrain": {"steps": 7}}))
    config = load("--config", str(path))
    assert (config.pretrain.steps, config.training.learning_rate) == (7, 5e-5)


@pytest.mark.parametrize("recipe", ["karma_llm", "hllm", "toy"])
def test_a_file_written_by_hand_is_its_recipe_with_what_it_says(tmp_path, recipe: str) -> None:
    path = tmp_path / "config.json"
    model = {part: {"checkpoint": "X"} for part in ("item_encoder", "user_decoder")}
    path.write_text(json.dumps({"recipe": recipe, "model": model, "training": {"steps": 9}}))
    flags = ("--set", "model.checkpoint=X", "--set", "training.steps=9")
    config = load("--config", str(path))
    assert config == load("--recipe", recipe, *flags)
    # The rate is the one that the recipe has for an LLM, never the one of small random weights.
    assert config.training.learning_rate == (2e-4 if recipe == "karma_llm" else 5e-5)
    path.write_text(
        json.dumps({"recipe": recipe, "model": model, "training": {"learning_rate": 1}})
    )
    assert load("--config", str(path)).training.learning_rate == 1


@pytest.mark.parametrize("recipe", recipes.names())
def test_a_file_that_says_every_field_is_read_as_it_is(tmp_path, recipe: str) -> None:
    path = tmp_path / "config.json"
    every = to_dict(recipes.build(recipe)) | {"training": to_dict(recipes.toy())["training"]}
    for part in ("item_encoder", "user_decoder"):
        every["model"][part]["checkpoint"] = "X"
    path.write_text(json.dumps(every))
    assert to_dict(load("--config", str(path))) == every


def test_a_file_that_names_no_recipe_of_the_list_is_refused(tmp_path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"recipe": "karma_txt"}))
    with pytest.raises(InputError, match="config recipe: 'karma_txt' is not valid; choices: "):
        load("--config", str(path))


def test_a_saved_configuration_gives_the_same_run(tmp_path) -> None:
    config = load("--recipe", "action_only", "--seed", "3", "--set", "collate.max_history=7")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(to_dict(config)))
    assert load("--config", str(path)) == config


def test_set_goes_over_a_saved_configuration(tmp_path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(to_dict(recipes.toy())))
    assert load("--config", str(path), "--set", "seed=8").seed == 8


def test_a_recipe_and_a_saved_configuration_exclude_each_other(tmp_path) -> None:
    path = tmp_path / "config.json"
    path.write_text("{}")
    with pytest.raises(InputError, match="--recipe: 'toy' cannot be combined with --config"):
        load("--recipe", "toy", "--config", str(path))


@pytest.mark.parametrize(
    ("content", "message"), [(None, "does not exist"), ("{", "is not JSON"), ('{"a": 1}', "known")]
)
def test_a_configuration_file_that_cannot_be_read_is_refused(tmp_path, content, message) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=message):
        load("--config", str(path))


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("--data", "nowhere", "does not exist"), 2),
        (KarmaRayError("the disk is full"), 1),
        (KeyboardInterrupt(), 1),
    ],
)
def test_a_job_fails_with_its_code_and_its_message(capsys, error, code: int) -> None:
    def main(argv: list[str] | None) -> None:
        raise error

    assert exit_code(main) == code
    printed = capsys.readouterr().err
    assert (str(error) or "interrupted") in printed
    assert "Traceback" not in printed


def test_a_job_that_ends_exits_with_0() -> None:
    assert exit_code(lambda argv: None) == 0


@pytest.mark.parametrize("argv", [["--unknown"], ["--seed", "x"], ["stray"]])
def test_a_wrong_flag_exits_with_2_and_is_named(capsys, argv: list[str]) -> None:
    def main(given: list[str] | None) -> None:
        cli.parser("a job", config=True).parse_args(given)

    assert exit_code(main, argv) == 2
    assert argv[-1] in capsys.readouterr().err


def test_help_explains_every_recipe_and_field(capsys) -> None:
    def main(given: list[str] | None) -> None:
        cli.parser("a job", config=True).parse_args(given)

    assert exit_code(main, ["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in recipes.names())
    assert "objective.lambda_dec = 1.0" in printed


def test_a_path_from_home_is_written_out_wherever_it_stands(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    flags = cli.parser("a job", config=True)
    flags.add_argument("runs", nargs="+")
    flags.add_argument("--data")
    body = "model.item_encoder.checkpoint"
    arguments = flags.parse_args(["~/a", "b~", "--data=~/d", "--set", f"{body}=~/model"])
    assert (arguments.runs, arguments.data) == (["/home/me/a", "b~"], "/home/me/d")
    config = cli.load_config(arguments, "karma_text")
    assert config.model.item_encoder.checkpoint == "/home/me/model"


def test_the_default_run_folder_is_named_for_its_recipe() -> None:
    assert cli.default_out("toy").startswith("runs/toy-")


@pytest.mark.parametrize("job", ["evaluate", "index", "diagnose", "export_encoder", "funnel"])
def test_a_run_that_is_not_there_is_named_with_what_makes_one(capsys, tmp_path, job: str) -> None:
    main = importlib.import_module(f"jobs.{job}").main
    absent = str(tmp_path / "absent")
    argv = [absent, str(tmp_path / "out")] if job == "export_encoder" else [absent]
    assert exit_code(main, argv) == 2
    said = f"error: RUN: '{absent}' does not exist; `python jobs/train.py --out RUN` makes one\n"
    assert capsys.readouterr().err.endswith(said)
