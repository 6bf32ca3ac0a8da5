"""The trained baselines through the whole pipeline, and what their recipes promise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from karma_ray import recipes
from karma_ray.artifacts import read_json, read_lines
from karma_ray.config import Config, override, to_dict
from karma_ray.data.synthetic.config import ToyShopConfig
from karma_ray.data.synthetic.shop import write_toy_shop
from karma_ray.errors import InputError

pytestmark = pytest.mark.usefixtures("blank_pictures")

SMALL = [
    "model.tiny.hidden_size=32", "model.tiny.intermediate_size=64", "model.tiny.vocab_size=512",
    "model.ids.width=32", "pretrain.steps=4", "warmup.steps=4", "training.steps=8",
    "training.batch_size=8", "training.report_every=4", "training.checkpoint_every=4",
    "training.validate_every=4", "training.num_workers=0", "training.threads_per_worker=1",
    "evaluation.max_examples=60",
]  # fmt: skip
TRAINED = ("sasrec", "hstu", "hllm", "frozen_encoder")


def config(recipe: str, *more: str) -> Config:
    return override(recipes.build(recipe), [*SMALL, *more])


def changes(recipe: str) -> dict[str, Any]:
    """Fields in which a recipe differs from `action_only`."""

    def flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, child in value.items():
            inner = isinstance(child, dict)
            found |= flat(child, f"{prefix}{name}.") if inner else {prefix + name: child}
        return found

    mine, theirs = (flat(to_dict(recipes.build(name))) for name in (recipe, "action_only"))
    return {name: value for name, value in mine.items() if value != theirs[name]}


@pytest.mark.parametrize(
    ("recipe", "differs"),
    [
        ("hllm", {"model.score.kind": "cos_learned", "objective.action_loss": "infonce"}),
        ("frozen_encoder", {"training.encoder_grad": "frozen"}),
        ("sasrec", {"model.kind": "sasrec"}),
        ("hstu", {"model.kind": "hstu"}),
    ],
)
def test_a_baseline_differs_from_action_only_in_what_it_is(
    recipe: str, differs: dict[str, Any]
) -> None:
    assert changes(recipe) == {"recipe": recipe, **differs}
    objective = recipes.build(recipe).objective
    assert not objective.built.text


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("shop"))
    write_toy_shop(folder, ToyShopConfig(num_items=240, num_users=120))
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module", params=TRAINED)
def finished(
    request: pytest.FixtureRequest, shop: str, cache: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[str, str]:  # fmt: skip
    """Name and folder of a finished run."""
    from karma_ray.runs.pipeline import train_run

    run = str(tmp_path_factory.mktemp("runs") / request.param)
    train_run(config(request.param), shop, run, cache=cache)
    return request.param, run


def test_a_baseline_makes_a_complete_run_folder(finished: tuple[str, str]) -> None:
    recipe, run = finished
    for part in (
        "metrics.json", "floors.json", "checks.json", "bundle/manifest.json",
        "index/vectors.npy", "report/report.html", "report/cases.json", "outcomes/outcomes.npz",
    ):  # fmt: skip
        assert Path(run, part).exists(), part
    metrics, floors = read_json(f"{run}/metrics.json"), read_json(f"{run}/floors.json")
    for key in ("HR@10", "HR@50", "HR@200", "NDCG@10", "gAUC", "JS@50"):
        assert 0 <= metrics[key] <= 100 and 0 <= floors["bm25"][key] <= 100, key
    assert metrics["num_test"] == floors["bm25"]["num_test"] == 60
    lines = list(read_lines(f"{run}/metrics.jsonl"))
    stages = {line["stage"] for line in lines}
    over_ids = recipe in ("sasrec", "hstu")
    assert stages == {"joint", "valid"} | (set() if over_ids else {"pretrain", "warmup"})
    assert [line["step"] for line in lines if line["stage"] == "valid"] == [4, 8]
    joint = [line for line in lines if line["stage"] == "joint"]
    assert {"loss/action", "negatives/surviving", "collapse/effective_rank_h"} <= {*joint[0]}
    assert ("decode_gap" in joint[0]) == (not over_ids)


def test_a_baseline_sees_nothing_of_the_future(finished: tuple[str, str]) -> None:
    checks = read_json(f"{finished[1]}/checks.json")
    assert checks["future_perturbation_max_abs"] == 0
    assert checks["same_step_perturbation_max_abs"] == 0


def test_measuring_a_baseline_again_gives_the_same_numbers(
    finished: tuple[str, str], cache: str
) -> None:
    from karma_ray.runs.pipeline import evaluate_run

    metrics = read_json(f"{finished[1]}/metrics.json")
    assert evaluate_run(finished[1], cache=cache)[1] == pytest.approx(metrics, rel=1e-6)


def test_what_a_baseline_trains_is_what_serves(finished: tuple[str, str]) -> None:
    """The learned temperature moved and is exported; a frozen encoder does not change."""
    from karma_ray.retrieval.export import load_bundle
    from karma_ray.runs.stages import finished_stage

    recipe, run = finished
    served = load_bundle(f"{run}/bundle").interest.state_dict()
    stage = finished_stage(run, read_json(f"{run}/data.json")["uri"])
    trained = stage.build_finished().interest.state_dict()
    assert served.keys() == trained.keys()
    assert all(torch.equal(served[name], trained[name]) for name in served)
    if recipe == "hllm":
        start = load_file(Path(read_json(f"{run}/start.json")["warm"], "model.safetensors"))
        scale = "score.log_scale"
        assert start[f"interest.{scale}"] == pytest.approx(np.log(1 / 0.07))
        assert abs(float(served[scale] - start[f"interest.{scale}"])) > 1e-4
    if recipe == "frozen_encoder":
        start = load_file(Path(read_json(f"{run}/start.json")["warm"], "model.safetensors"))
        names = [name for name in served if f"interest.{name}" in start]
        moved = {n for n in names if not torch.equal(served[n], start[f"interest.{n}"])}
        assert moved and not any(name.startswith("item_encoder.") for name in moved)


def test_an_id_run_cut_off_ends_as_the_whole_one(shop: str, cache: str, tmp_path: Path) -> None:
    from karma_ray.runs.pipeline import train_run

    def stop(step: int, metrics: Any) -> None:
        if step == 4:
            raise KeyboardInterrupt

    whole = train_run(config("hstu", "training.checkpoint_every=2"), shop,
                      str(tmp_path / "whole"), cache=cache)  # fmt: skip
    cut, out = config("hstu", "training.checkpoint_every=2"), str(tmp_path / "cut")
    with pytest.raises(KeyboardInterrupt):
        train_run(cut, shop, out, cache=cache, on_validate=stop)
    resumed = train_run(cut, shop, out, cache=cache, resume=True)
    assert resumed | {"seconds": 0} == whole | {"seconds": 0}


def test_an_id_run_goes_on_from_a_finished_one_and_from_no_other_kind(
    finished: tuple[str, str], shop: str, cache: str, tmp_path: Path
) -> None:
    from karma_ray.runs.pipeline import train_run

    recipe, run = finished
    if recipe not in ("sasrec", "hstu"):
        pytest.skip("the two kinds over ids")
    more = config(recipe, "training.learning_rate=0", "training.weight_decay=0")
    metrics = train_run(more, shop, str(tmp_path / "on"), cache=cache, init_from=run)
    assert metrics["HR@50"] == pytest.approx(read_json(f"{run}/metrics.json")["HR@50"])
    other = config("hstu" if recipe == "sasrec" else "sasrec")
    with pytest.raises(InputError, match=r"model\.kind: .* differs from"):
        train_run(other, shop, str(tmp_path / "other"), cache=cache, init_from=run)


@pytest.mark.parametrize("kind", ["sasrec", "hstu"])
def test_a_model_over_ids_is_not_taken_for_one_of_texts(kind: str) -> None:
    from karma_ray.runs.stages import Stage

    with pytest.raises(InputError, match=rf"model\.kind: '{kind}' has no language models"):
        Stage(config(kind), "nowhere").build_joint()


@pytest.mark.ray
def test_an_id_run_on_two_ray_workers_ends_where_one_ends(
    ray_cluster: None, shop: str, cache: str, tmp_path: Path
) -> None:
    from karma_ray.cluster.executor import ON_RAY
    from karma_ray.runs.pipeline import train_run

    losses = []
    for workers in (0, 2):
        settings = config("sasrec", f"training.num_workers={workers}", "model.ids.dropout=0",
                          "training.precision=float32")  # fmt: skip
        run = str(tmp_path / str(workers))
        train_run(settings, shop, run, cache=cache, executor=ON_RAY, is_tested=False)
        lines = [line for line in read_lines(f"{run}/metrics.jsonl") if line["stage"] == "joint"]
        losses.append([line["loss/total"] for line in lines])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_a_term_that_needs_texts_is_refused_before_anything_is_trained(
    shop: str, cache: str, tmp_path: Path
) -> None:
    from karma_ray.runs.pipeline import train_run

    with pytest.raises(
        InputError, match=r"objective\.reconstruction: 1\.0 needs a model that reads text"
    ):
        train_run(config("hstu", "objective.reconstruction=1.0"), shop, str(tmp_path / "x"),
                  cache=cache)  # fmt: skip


def test_the_floors_that_an_older_cache_lacks_are_added(shop: str, tmp_path: Path) -> None:
    from karma_ray.artifacts import write_json
    from karma_ray.runs.evaluator import Evaluator
    from karma_ray.runs.floor_metrics import floor_metrics
    from karma_ray.runs.preparation import ensure_prepared

    settings = config("bm25")
    evaluator = Evaluator(settings, ensure_prepared(shop, settings.prepare))
    first = floor_metrics(evaluator, str(tmp_path))
    (path,) = tmp_path.glob("floors-*.json")
    kept = {name: value for name, value in first.items() if name != "bm25"}
    kept["tfidf"] = {"HR@10": 12.0}  # recognisably not measured again
    write_json(kept, str(path))
    again = floor_metrics(evaluator, str(tmp_path))
    assert again["bm25"] == first["bm25"] and again["tfidf"] == {"HR@10": 12.0}
