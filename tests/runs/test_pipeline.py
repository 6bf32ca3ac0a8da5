"""One path through everything: raw logs -> run folder -> measured again -> served."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from karma_ray import recipes
from karma_ray.artifacts import read_json, read_lines, read_manifest, write_json
from karma_ray.config import Config, override
from karma_ray.errors import InputError
from karma_ray.runs.worker import TrainJob
from karma_ray.training.step_state import StepState

SMALL = [
    "pretrain.steps=8", "warmup.steps=8", "training.steps=6", "training.batch_size=8",
    "training.report_every=3", "training.checkpoint_every=3", "training.validate_every=3",
    "training.num_workers=0", "training.threads_per_worker=1", "evaluation.max_examples=60",
]  # fmt: skip


def _config(recipe: str = "toy", *more: str) -> Config:
    return override(recipes.build(recipe), [*SMALL, *more])


def _copy(shop: str, folder: str, name: str) -> str:
    """The shop's events and items without its planned cut points, under another name."""
    for table in ("events", "items"):
        shutil.copytree(f"{shop}/{table}", f"{folder}/{table}")
    planned = ("valid_start", "test_start")
    facts = {k: v for k, v in read_json(f"{shop}/manifest.json").items() if k not in planned}
    write_json({**facts, "name": name}, f"{folder}/manifest.json")
    return folder


@pytest.fixture(scope="module")
def finished(
    shop: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, str, dict[str, Any]]:
    from karma_ray.runs.pipeline import train_run

    out, cache = (str(tmp_path_factory.mktemp(name)) for name in ("runs", "cache"))
    return f"{out}/first", cache, train_run(_config(), shop, f"{out}/first", cache=cache)


def test_a_run_folder_is_complete(finished: tuple[str, str, dict[str, Any]]) -> None:
    run, _, metrics = finished
    for part in (
        "config.json", "manifest.json", "metrics.json", "metrics.jsonl", "floors.json",
        "checks.json", "data.json", "bundle/manifest.json", "item_embeddings/manifest.json",
        "index/vectors.npy", "report/report.html", "report/model_card.md", "report/cases.json",
    ):  # fmt: skip
        assert Path(run, part).exists(), part
    assert list(Path(run).glob("events.out.tfevents.*"))
    assert read_json(f"{run}/metrics.json") == metrics
    for key in ("HR@10", "HR@1000", "gAUC", "JS@50", "JS@50_excl_gt", "NDCG@10", "MRR"):
        assert 0 <= metrics[key] <= 100
    for prefix in ("warm/", "cold/", "first/", "repeat/", "in_query/", "valid/"):
        assert f"{prefix}num_test" in metrics
    assert "collapse/effective_rank_e" in metrics
    index = read_manifest(f"{run}/index", "index")["parents"]
    assert index["bundle"] == read_manifest(f"{run}/bundle", "bundle")["content_hash"]


def test_the_report_says_how_much_of_the_texts_is_read(
    finished: tuple[str, str, dict[str, Any]],
) -> None:
    run = finished[0]
    told = read_json(f"{run}/data.json")["item_texts"]
    assert told["read"] == recipes.build("toy").collate.max_item_tokens - 1
    assert 0 < told["median"] <= told["p95"] and 0 <= told["share_cut"] <= 1
    assert f"median: {told['median']}" in Path(run, "report/report.html").read_text()


def test_a_run_warns_of_texts_that_lose_their_end(
    finished: tuple[str, str, dict[str, Any]], shop: str, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    from karma_ray.runs.pipeline import train_run

    for limit, warned in ((6, True), (64, False)):
        caplog.clear()
        run = str(tmp_path / str(limit))
        config = _config("toy", f"collate.max_item_tokens={limit}", "training.steps=1")
        train_run(config, shop, run, cache=finished[1])
        told = read_json(f"{run}/data.json")["item_texts"]
        advice = f"collate.max_item_tokens={told['p95'] + 1}"
        assert (advice in caplog.text) == warned == (told["share_cut"] > 0.1)


def test_every_stage_and_term_is_in_the_log(finished: tuple[str, str, dict[str, Any]]) -> None:
    lines = list(read_lines(f"{finished[0]}/metrics.jsonl"))
    assert {line["stage"] for line in lines} == {"pretrain", "warmup", "joint", "valid"}
    joint = next(line for line in lines if line["stage"] == "joint")
    for name in (
        "loss/action", "loss/generation", "loss/reconstruction", "loss/total",
        "negatives/surviving", "decode_gap", "collapse/effective_rank_e",
        "collapse/effective_rank_h", "collapse/mean_cosine_e", "collapse/mean_cosine_h",
    ):  # fmt: skip
        assert name in joint, name


def test_the_checks_find_no_leak(finished: tuple[str, str, dict[str, Any]]) -> None:
    checks = read_json(f"{finished[0]}/checks.json")
    assert checks["future_perturbation_max_abs"] == 0
    assert checks["same_step_perturbation_max_abs"] == 0
    assert checks["shuffled_history"].keys() == checks["own_history"].keys()


def test_measuring_again_gives_the_same_numbers(
    finished: tuple[str, str, dict[str, Any]],
) -> None:
    from karma_ray.runs.pipeline import evaluate_run

    run, cache, metrics = finished
    assert evaluate_run(run, cache=cache)[1] == pytest.approx(metrics, rel=1e-6)


def test_a_run_that_was_not_tested_holds_no_test_metric_and_is_tested_later(
    finished: tuple[str, str, dict[str, Any]], shop: str, tmp_path: Path
) -> None:
    from karma_ray.runs.pipeline import evaluate_run, train_run

    _, cache, metrics = finished
    run = str(tmp_path / "run")
    assert train_run(_config(), shop, run, cache=cache, is_tested=False) == {}
    assert not {"metrics.json", "outcomes", "report"} & {path.name for path in Path(run).iterdir()}
    assert evaluate_run(run, cache=cache)[1]["HR@50"] == pytest.approx(metrics["HR@50"])


def test_a_measurement_on_other_data_stands_beside_the_runs_own(
    finished: tuple[str, str, dict[str, Any]], shop: str, tmp_path: Path
) -> None:
    from karma_ray.runs.pipeline import evaluate_run
    from karma_ray.runs.preparation import ensure_prepared

    run, cache, metrics = finished
    other = _copy(shop, str(tmp_path / "other"), "other_days")
    later = replace(_config().prepare, test_share=0.3)
    ensure_prepared(other, later)
    before = {name: Path(run, name).read_bytes() for name in ("metrics.json", "floors.json")}
    folder, found = evaluate_run(run, other, cache=cache)
    assert folder == f"{run}/evaluations/other_days"
    assert found["num_test"] == 60 and found["MRR"] != metrics["MRR"]
    assert read_json(f"{folder}/data.json")["name"] == "other_days"
    assert read_manifest(folder, "evaluation")["data"] == other
    assert "other_days" in Path(folder, "report/report.html").read_text()
    assert before == {name: Path(run, name).read_bytes() for name in before}
    assert read_manifest(run, "run")["data"] == shop


def test_a_run_without_test_examples_is_whole(shop: str, tmp_path: Path) -> None:
    from karma_ray.report.terminal import summary
    from karma_ray.runs.pipeline import train_run

    data, run = _copy(shop, str(tmp_path / "data"), "no_test"), str(tmp_path / "run")
    config = _config("toy", "prepare.test_share=0")
    metrics = train_run(config, data, run, cache=str(tmp_path / "cache"))
    assert metrics["num_test"] == 0 and "HR@50" not in metrics
    assert metrics["valid/num_test"] > 0 and "valid/HR@50" in metrics
    assert read_json(f"{run}/metrics.json") == metrics
    assert Path(run, "report/report.html").exists() and "0 test clicks" in summary(run)


def test_recipes_that_are_compared_start_from_the_same_weights(
    finished: tuple[str, str, dict[str, Any]], shop: str
) -> None:
    from karma_ray.data.prepared import PreparedData
    from karma_ray.runs.first_stages import start_stage

    _, cache, _ = finished
    source = PreparedData.load(shop)
    same_shape = ("model.tiny.hidden_size=64", "model.tiny.intermediate_size=192")
    more = (
        *same_shape,
        "model.tiny.vocab_size=2048",
        "model.score.scale=20",
        "model.item_encoder.lexical=64",
    )
    karma = start_stage(_config("karma_text", *more), source, cache)
    action = start_stage(_config("action_only", *more), source, cache)
    assert action.warm == karma.warm


def test_without_a_warm_up_a_run_starts_from_the_pretrained_weights(
    finished: tuple[str, str, dict[str, Any]], shop: str
) -> None:
    from karma_ray.data.prepared import PreparedData
    from karma_ray.model.backbone import load_body
    from karma_ray.runs.first_stages import start_stage

    source, cache = PreparedData.load(shop), finished[1]
    folders = sorted(Path(cache).iterdir())
    cold = start_stage(_config("toy", "warmup.skip=true"), source, cache)
    warm = start_stage(_config("toy"), source, cache)
    assert cold.warm is None and warm.warm is not None
    assert sorted(Path(cache).iterdir()) == folders, "neither made anything anew"

    def same(one: nn.Module, other: nn.Module) -> bool:
        pairs = zip(one.parameters(), other.parameters(), strict=True)
        return all(torch.equal(*pair) for pair in pairs)

    built = cold.build_joint().interest, warm.build_joint().interest
    pretrained = load_body(cold.config.model.user_decoder.checkpoint)
    for part, changed in (("item_encoder.body", False), ("user_decoder.body", True)):
        first, second = (model.get_submodule(part) for model in built)
        assert same(first, pretrained)
        assert same(second, pretrained) != changed
    assert not same(*(model.user_decoder.projector for model in built))


def test_a_delayed_encoder_stands_still_then_learns_also_when_the_run_is_cut(
    finished: tuple[str, str, dict[str, Any]], shop: str, tmp_path: Path
) -> None:
    from karma_ray.data.prepared import PreparedData
    from karma_ray.runs.first_stages import start_stage
    from karma_ray.runs.joint import joint_job
    from karma_ray.runs.training import run_training

    source = PreparedData.load(shop)
    config = _config("toy", "training.encoder_delay=0.5", "training.checkpoint_every=2")
    stage = start_stage(config, source, finished[1])
    start = stage.build_joint().interest.item_encoder.state_dict()
    seen: dict[int, bool] = {}

    def job(run: str, cut: bool) -> TrainJob:
        whole = joint_job(stage, source, run)

        def watch(model: nn.Module, step: int, state: StepState) -> StepState:
            found = whole.before_step(model, step, state)
            trained = {p.requires_grad for p in model.interest.item_encoder.parameters()}
            assert trained == {step >= 3}
            now = model.interest.item_encoder.state_dict()
            seen[step] = all(torch.equal(start[name], now[name]) for name in start)
            if cut and step == 3:
                raise KeyboardInterrupt
            return found

        return replace(whole, before_step=watch, validate=None)

    def losses(run: Path) -> list[float]:
        lines = read_lines(str(run / "metrics.jsonl"))
        return [line["loss/total"] for line in lines if line["stage"] == "joint"]

    run_training(job(str(tmp_path / "whole"), False), progress=False)
    assert seen == {step: step <= 3 for step in range(6)}
    with pytest.raises(KeyboardInterrupt):
        run_training(job(str(tmp_path / "cut"), True), progress=False)
    run_training(job(str(tmp_path / "cut"), False), resume=True, progress=False)
    assert losses(tmp_path / "cut")[-1] == losses(tmp_path / "whole")[-1]


def test_a_floor_is_a_recipe_like_any_other(
    finished: tuple[str, str, dict[str, Any]], shop: str, tmp_path: Path
) -> None:
    from karma_ray.runs.pipeline import train_run

    out, cache = str(tmp_path / "floor"), finished[1]
    metrics = train_run(_config("popularity"), shop, out, cache=cache)
    assert metrics["num_test"] == 60
    assert Path(out, "report", "report.html").exists()


def test_a_finished_run_is_not_overwritten(
    finished: tuple[str, str, dict[str, Any]], shop: str
) -> None:
    from karma_ray.runs.pipeline import train_run

    with pytest.raises(InputError, match="already holds a run"):
        train_run(_config(), shop, finished[0], cache=finished[1])


def test_a_window_shorter_than_the_prepared_one_is_refused(
    finished: tuple[str, str, dict[str, Any]], shop: str, tmp_path: Path
) -> None:
    from karma_ray.runs.pipeline import train_run

    with pytest.raises(InputError, match=r"collate\.max_history"):
        train_run(
            _config("toy", "collate.max_history=5"), shop, str(tmp_path / "x"), cache=finished[1]
        )


@pytest.mark.parametrize("part", ["training", "warmup"])
def test_a_batch_that_workers_cannot_share_is_refused_before_anything_is_trained(
    finished: tuple[str, str, dict[str, Any]], shop: str, tmp_path: Path, part: str
) -> None:
    from karma_ray.runs.pipeline import train_run

    config = _config("toy", f"{part}.batch_size=1", "training.num_workers=2")
    with pytest.raises(
        InputError, match=rf"{part}\.batch_size: 1 gives some of .*=2 nothing to do"
    ):
        train_run(config, shop, str(tmp_path / "x"), cache=finished[1])
    assert not (tmp_path / "x").exists()


def test_workers_that_nobody_starts_are_refused(
    finished: tuple[str, str, dict[str, Any]], shop: str, tmp_path: Path
) -> None:
    from karma_ray.runs.pipeline import train_run

    config = _config("toy", "training.num_workers=2")
    with pytest.raises(InputError, match=r"num_workers: 2 cannot be started by this process"):
        train_run(config, shop, str(tmp_path / "x"), cache=finished[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("training.min_workers=1", r"min_workers: 1 is not between 0 and training\.num_workers=0"),
        *(
            (
                f"model.decodability.recon_text=shuffled {parted}",
                r"recon_text: 'shuffled' .*needs training\.micro_batch_size=0",
            )
            for parted in ("training.micro_batch_size=4", "training.num_workers=2")
        ),
    ],
)
def test_settings_of_execution_that_cannot_be_are_refused(
    finished: tuple[str, str, dict[str, Any]], shop: str, tmp_path: Path, change: str, message: str
) -> None:
    from karma_ray.runs.pipeline import train_run

    with pytest.raises(InputError, match=message):
        train_run(_config("toy", *change.split()), shop, str(tmp_path / "x"), cache=finished[1])


def test_a_run_is_not_resumed_under_another_configuration(
    finished: tuple[str, str, dict[str, Any]], shop: str
) -> None:
    from karma_ray.runs.pipeline import train_run

    run, cache, _ = finished
    before = read_json(f"{run}/config.json")
    with pytest.raises(InputError, match="other values of training"):
        train_run(_config("toy", "training.steps=9"), shop, run, resume=True, cache=cache)
    assert read_json(f"{run}/config.json") == before


def test_how_a_run_is_executed_may_change_when_it_is_resumed(
    finished: tuple[str, str, dict[str, Any]], shop: str
) -> None:
    from karma_ray.artifacts import RunFolder
    from karma_ray.data.prepared import PreparedData
    from karma_ray.runs.continuation import EXECUTION, check_resumed, noted_stage

    folder, source = RunFolder(finished[0]), PreparedData.load(shop)
    known = {f"training.{name}" for name in vars(_config().training)}
    assert known >= EXECUTION
    moved = ["training.num_workers=4", "training.min_workers=2", "training.checkpoint_every=1"]
    check_resumed(_config("toy", *moved), source, folder)
    with pytest.raises(
        InputError, match=r"other values of .*model\.score\.scale, training\.batch_size"
    ):
        check_resumed(
            _config("toy", "model.score.scale=3", "training.batch_size=4"), source, folder
        )
    # The warm-up of another number of workers would be another one: the run keeps its own.
    stage = noted_stage(folder, _config("toy", *moved), source.items_uri)
    assert stage is not None
    assert stage.warm == read_json(f"{finished[0]}/start.json")["warm"]


def test_a_run_is_not_resumed_on_rows_that_were_prepared_anew(
    finished: tuple[str, str, dict[str, Any]], shop: str
) -> None:
    from karma_ray.runs.pipeline import train_run

    run, cache, _ = finished
    facts = read_json(f"{run}/data.json")
    write_json(facts | {"input": "another"}, f"{run}/data.json")
    try:
        with pytest.raises(InputError, match="was prepared again"):
            train_run(_config(), shop, run, resume=True, cache=cache)
    finally:
        write_json(facts, f"{run}/data.json")


def test_a_run_may_not_take_the_place_of_the_link_to_the_newest(shop: str, tmp_path: Path) -> None:
    from karma_ray.runs.pipeline import train_run

    with pytest.raises(InputError, match="link to the newest run"):
        train_run(_config(), shop, str(tmp_path / "latest"))


def test_what_is_no_link_is_never_replaced(tmp_path: Path) -> None:
    from karma_ray.artifacts import RunFolder

    for name in ("first", "second", "latest"):
        (tmp_path / name).mkdir()
    (tmp_path / "latest" / "precious").touch()
    RunFolder(str(tmp_path / "first")).link_latest()
    assert (tmp_path / "latest" / "precious").exists()


@pytest.mark.parametrize(
    "change",
    ["training.new_module_lr=9", "warmup.steps=9", "model.item_encoder.pool=mean", "seed=3"],
)
def test_another_warm_up_is_not_taken_from_the_cache(change: str) -> None:
    from karma_ray.runs.warm_up import warmup_key

    assert warmup_key(_config(), "h") != warmup_key(_config("toy", change), "h")


@pytest.mark.parametrize(
    "change",
    [
        "objective.lambda_dec=0", "training.steps=9", "training.encoder_grad=frozen",
        "training.num_workers=3", "model.generator.kind=fm", "evaluation.max_examples=7",
    ],
)  # fmt: skip
def test_the_warm_up_does_not_depend_on_what_comes_later_or_where_it_runs(change: str) -> None:
    from karma_ray.runs.warm_up import warmup_key

    assert warmup_key(_config(), "h") == warmup_key(_config("toy", change), "h")


def test_a_checkpoint_of_another_architecture_is_refused_before_anything_is_trained(
    finished: tuple[str, str, dict[str, Any]], shop: str, tmp_path: Path
) -> None:
    from karma_ray.runs.pipeline import train_run

    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    both = [f"model.{part}.checkpoint={tmp_path}/bert" for part in ("item_encoder", "user_decoder")]
    with pytest.raises(InputError, match=r"'bert' is the architecture of .*choices: qwen3"):
        train_run(_config("toy", *both), shop, str(tmp_path / "run"), cache=finished[1])
    with pytest.raises(InputError, match="share a tokenizer"):
        train_run(_config("toy", both[0]), shop, str(tmp_path / "run"), cache=finished[1])


@pytest.mark.slow
@pytest.mark.ray
def test_karma_on_two_workers_ends_where_one_ends(
    ray_cluster: None, shop: str, tmp_path: Path
) -> None:
    from karma_ray.cluster.executor import ON_RAY
    from karma_ray.runs.pipeline import train_run

    found: dict[int, dict[int, float]] = {}
    metrics: dict[int, dict[str, Any]] = {}
    for workers in (1, 2):
        config = override(
            recipes.build("toy"),
            ["pretrain.steps=20", "warmup.steps=20", "training.steps=20", "training.batch_size=8",
             "training.report_every=1", "training.encoder_delay=0.5", "training.precision=float32",
             # Each worker draws for itself; with all negatives and steps there is nothing to draw.
             "collate.num_hard_negatives=16", "collate.num_decoded=21", "collate.drop_query=0",
             f"training.num_workers={workers}", "evaluation.max_examples=60"],
        )  # fmt: skip
        run = str(tmp_path / f"run-{workers}")
        metrics[workers] = train_run(
            config, shop, run, cache=str(tmp_path / "cache"), executor=ON_RAY
        )
        lines = [line for line in read_lines(f"{run}/metrics.jsonl") if line["stage"] == "joint"]
        found[workers] = {line["step"]: line["loss/total"] for line in lines}
    assert list(found[2]) == list(range(1, 21))
    # Float sums in another order, carried through three stages.
    assert list(found[2].values()) == pytest.approx(list(found[1].values()), rel=0.01)
    assert metrics[2]["HR@50"] == pytest.approx(metrics[1]["HR@50"], abs=5.0)
