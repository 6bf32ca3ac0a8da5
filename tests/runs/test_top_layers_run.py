"""A run that trains only the top layers of its item encoder, from pretraining to its bundle."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from karma_ray import recipes
from karma_ray.artifacts import read_json, read_lines
from karma_ray.config import Config, override
from karma_ray.data.synthetic.config import ToyShopConfig
from karma_ray.data.synthetic.shop import write_toy_shop
from karma_ray.retrieval.encode import encode_catalog, load_embeddings
from karma_ray.retrieval.export import load_bundle
from karma_ray.runs.frozen_outputs import FrozenOutputs
from karma_ray.runs.pipeline import evaluate_run, train_run
from karma_ray.runs.stages import with_checkpoints

pytestmark = pytest.mark.usefixtures("blank_pictures")

SMALL = [
    "pretrain.steps=8", "warmup.steps=4", "warmup.train=all", "training.steps=6",
    "training.batch_size=8", "training.report_every=1", "training.checkpoint_every=2",
    "training.num_workers=0", "training.threads_per_worker=1", "evaluation.max_examples=30",
    "model.tiny.num_layers=4", "model.item_encoder.layers=3",
    "model.item_encoder.train_layers=1", "model.user_decoder.layers=2",
    "training.encoder_delay=0.5", "model.item_encoder.block=both",
]  # fmt: skip


def _config(*more: str) -> Config:
    return override(recipes.build("toy"), [*SMALL, *more])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str]:
    """Shop, cache and run."""
    root = str(tmp_path_factory.mktemp("top"))
    write_toy_shop(f"{root}/shop", ToyShopConfig(num_items=240, num_users=120))
    train_run(_config(), f"{root}/shop", f"{root}/run", cache=f"{root}/cache")
    return f"{root}/shop", f"{root}/cache", f"{root}/run"


def _files(cache: str) -> list[Path]:
    return sorted(Path(cache).glob("states-*.npy"))


def _losses(run: Path) -> list[float]:
    lines = read_lines(str(run / "metrics.jsonl"))
    return [line["loss/total"] for line in lines if line["stage"] == "joint"]


def test_the_top_layer_alone_learns_in_both_stages_and_the_bundle_holds_the_whole_encoder(
    finished: tuple[str, str, str],
) -> None:
    run = finished[2]
    start = read_json(f"{run}/start.json")
    first = load_file(f"{start['item_encoder']}/model.safetensors")
    warm = load_file(f"{start['warm']}/model.safetensors")
    last = load_file(f"{run}/bundle/item_encoder/model.safetensors")
    first = {name: v for name, v in first.items() if not name.startswith("layers.3.")}
    assert last.keys() == first.keys()
    for name, value in first.items():
        lower = name.startswith(("embed_tokens", "layers.0.", "layers.1."))
        warmed = warm[f"interest.item_encoder.body.{name}"]
        assert torch.equal(value, warmed) == lower, name
        assert torch.equal(warmed, last[name]) == lower, name
    assert read_json(f"{run}/bundle/config.json")["model"]["item_encoder"]["train_layers"] == 1
    user = load_file(f"{run}/bundle/user_decoder/model.safetensors")
    assert {name.split(".")[1] for name in user if name.startswith("layers")} == {"0", "1"}
    assert read_json(f"{run}/bundle/user_decoder/config.json")["num_hidden_layers"] == 2
    assert read_json(f"{run}/bundle/config.json")["model"]["user_decoder"]["layers"] == 2
    facts = read_json(f"{run}/bundle/manifest.json")
    assert (facts["item_layers"], facts["item_layers_frozen"], facts["user_layers"]) == (3, 2, 2)
    frozen = [n for n in first if n.startswith(("embed_tokens", "layers.0.", "layers.1."))]
    still = sum(first[name].numel() for name in frozen)
    assert facts["num_parameters"] - facts["num_trained"] == still
    assert "the top 1 of 3 layers" in Path(run, "report", "model_card.md").read_text()
    assert facts["checkpoints"]["item_encoder"]["layers"] == 4


def test_the_run_says_what_its_stages_cost(finished: tuple[str, str, str]) -> None:
    cost = read_json(f"{finished[2]}/cost.json")
    assert set(cost["seconds"]) == {"frozen", "embedding", "evaluation"}
    assert all(seconds >= 0 for seconds in cost["seconds"].values())
    assert cost["peak_gib"]["host"] > 0
    driver, worker = cost["reached"]["driver"], cost["reached"]["worker"]
    assert list(driver) == ["process", "libraries", "data", "first_stages"]
    assert list(worker) == ["process", "entered", "model", "first_step"]
    later = [*driver.values(), *list(worker.values())[1:]]  # one process did everything
    assert later == sorted(later) and abs(worker["process"] - driver["process"]) < 0.1


def test_the_bundle_embeds_the_catalogue_as_the_run_did(finished: tuple[str, str, str]) -> None:
    _, cache, run = finished
    stored, bundle = load_embeddings(f"{run}/item_embeddings"), load_bundle(f"{run}/bundle")
    config = _config().collate
    outputs = FrozenOutputs(
        _config().model.item_encoder, f"{run}/bundle/tokenizer", finished[0],
        config.max_item_tokens, "float32",
    )  # fmt: skip
    vectors = encode_catalog(bundle.interest, *outputs.texts())
    # The run used the states that it had kept in bfloat16; in float32 both are equal.
    cosines = (vectors * stored.embeddings).sum(1)
    cosines /= np.linalg.norm(vectors, axis=1) * np.linalg.norm(stored.embeddings, axis=1)
    assert cosines.min() > 0.9999 and np.abs(vectors - stored.embeddings).max() > 0
    measured = read_json(f"{run}/metrics.json")
    assert evaluate_run(run, cache=cache)[1] == pytest.approx(measured, rel=1e-6)


def test_the_states_are_made_once_for_all_runs_that_share_them(
    finished: tuple[str, str, str], tmp_path: Path
) -> None:
    shop, cache, _ = finished
    (made,) = _files(cache)
    before = os.stat(made).st_mtime_ns
    more = ["training.steps=1", "objective.lambda_dec=0.5", "model.peft=lora:2"]
    train_run(_config(*more), shop, str(tmp_path / "other"), cache=cache, is_tested=False)
    assert _files(cache) == [made] and os.stat(made).st_mtime_ns == before


def test_a_changed_catalogue_or_other_weights_make_another_file(
    finished: tuple[str, str, str], tmp_path: Path
) -> None:
    shop, cache, run = finished
    start = read_json(f"{run}/start.json")
    config = with_checkpoints(_config(), start["item_encoder"], start["user_decoder"])

    def path(config: Config = config, items: str = shop) -> str:
        outputs = FrozenOutputs.of(config, items, start["user_decoder"], cache)
        assert outputs is not None
        return outputs.path

    assert [Path(path())] == _files(cache)
    other = str(tmp_path / "shop")
    write_toy_shop(other, ToyShopConfig(num_items=241, num_users=120))
    trained = with_checkpoints(config, f"{run}/bundle/item_encoder", start["user_decoder"])
    changes = (
        "training.precision=float32", "collate.max_item_tokens=9",
        "model.item_encoder.train_layers=2", "model.item_encoder.instruction=an item",
    )  # fmt: skip
    paths = [path(override(config, [change])) for change in changes]
    paths += [path(), path(items=other), path(trained)]
    assert len(set(paths)) == len(paths)
    same = replace(config, seed=7, objective=replace(config.objective, lambda_dec=0.0))
    assert path(same) == path()
    assert FrozenOutputs.of(_config("model.item_encoder.train_layers=0"), shop, "", cache) is None


def test_a_run_that_was_cut_off_equals_an_uninterrupted_one(
    finished: tuple[str, str, str],
    tmp_path: Path,
    cut_off: Callable[[], AbstractContextManager[None]],
) -> None:
    shop, cache, run = finished
    with cut_off():
        train_run(_config(), shop, str(tmp_path / "cut"), cache=cache)
    train_run(_config(), shop, str(tmp_path / "cut"), cache=cache, resume=True, is_tested=False)
    assert _losses(tmp_path / "cut") == _losses(Path(run))


def test_a_finished_run_is_trained_further_on_states_of_its_own_encoder(
    finished: tuple[str, str, str], tmp_path: Path
) -> None:
    shop, cache, run = finished
    known = _files(cache)
    further = str(tmp_path / "further")
    config = _config("training.steps=2")
    train_run(config, shop, further, cache=cache, init_from=run, is_tested=False)
    assert len(_files(cache)) == len(known) + 1
    ours, theirs = (
        load_file(f"{folder}/bundle/item_encoder/model.safetensors") for folder in (further, run)
    )
    for name, value in theirs.items():
        lower = name.startswith(("embed_tokens", "layers.0.", "layers.1."))
        assert torch.equal(value, ours[name]) == lower, name


def test_with_head_the_whole_body_stays_and_its_head_learns(
    finished: tuple[str, str, str], tmp_path: Path
) -> None:
    shop, cache, _ = finished
    more = ["training.encoder_grad=head", "training.encoder_delay=0", "training.steps=3"]
    train_run(_config(*more), shop, str(tmp_path / "run"), cache=cache, is_tested=False)
    start = read_json(f"{tmp_path}/run/start.json")
    warm = load_file(f"{start['warm']}/model.safetensors")
    last = load_file(f"{tmp_path}/run/checkpoints/joint/final/model.safetensors")
    changed = {
        name for name, value in last.items()
        if name.startswith("interest.item_encoder") and not torch.equal(value, warm[name])
    }  # fmt: skip
    assert changed == {"interest.item_encoder.output.weight"}
    lines = [
        line for line in read_lines(f"{tmp_path}/run/metrics.jsonl") if line["stage"] == "joint"
    ]
    assert all(line["loss/total"] > 0 for line in lines) and len(lines) == 3
