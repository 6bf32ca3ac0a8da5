"""A run whose cache is in a store: what a machine opens there is fetched, and made only once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest

from karma_ray import recipes
from karma_ray.artifacts import exists, join, read_json, read_lines, read_manifest
from karma_ray.config import Config, override
from karma_ray.model.backbone import load_body, save_body
from karma_ray.model.backbones.tokenizer import load_tokenizer, save_tokenizer
from karma_ray.node_cache import checkpoint_hash
from karma_ray.node_disk import node_folder
from karma_ray.runs.frozen_outputs import FrozenOutputs
from karma_ray.runs.plain_checkpoints import with_shared_checkpoints
from karma_ray.runs.sources import CACHE, cache_beside
from karma_ray.runs.stages import with_checkpoints
from tests import tiny_run
from tests.runs.test_pipeline import _config

pytestmark = pytest.mark.usefixtures("blank_pictures")

STORE = "memory://remote-cache"


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A machine that has fetched nothing yet, and an empty store."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    yield tmp_path
    fs = fsspec.filesystem("memory")
    if fs.exists("/remote-cache"):
        fs.rm("/remote-cache", recursive=True)


def _llm(tmp_path: Path) -> tuple[Config, str]:
    words, folder = tiny_run.tokenizer(), str(tmp_path / "llm")
    save_body(tiny_run.interest_model(words).item_encoder.body, folder)
    save_tokenizer(words, folder)
    changes = ["model.item_encoder.train_layers=1", "training.precision=float32"]
    return with_checkpoints(override(recipes.build("toy"), changes), folder, folder), folder


def test_the_cache_is_beside_a_remote_run_and_in_one_place_for_local_ones() -> None:
    assert cache_beside("s3://bucket/runs/first") == cache_beside("s3://bucket/runs/second/")
    assert cache_beside("s3://bucket/runs/first") == "s3://bucket/runs/cache"
    assert cache_beside("runs/first") == cache_beside("/elsewhere/first") == CACHE


def test_a_whole_run_leaves_everything_in_the_store(shop: str, node: Path) -> None:
    from karma_ray.runs.pipeline import evaluate_run, train_run

    run = f"{STORE}/runs/first"
    metrics = train_run(_config(), shop, run)
    folders = {name.rpartition("/")[2] for name in fsspec.filesystem("memory").ls(
        "/remote-cache/runs/cache", detail=False)}  # fmt: skip
    kinds = ("language-model-", "warmup-", "floors-")
    assert all(any(name.startswith(kind) for name in folders) for kind in kinds), folders
    assert read_json(join(run, "metrics.json")) == metrics
    stages = {line["stage"] for line in read_lines(join(run, "metrics.jsonl"))}
    assert stages == {"pretrain", "warmup", "joint", "valid"}
    # What another machine has: nothing.
    for found in node_folder().iterdir():
        found.rename(node / found.name)
    _, again = evaluate_run(run)
    assert again["HR@50"] == metrics["HR@50"]


def test_a_checkpoint_of_this_machine_is_copied_for_others_only_into_a_store(
    node: Path,
) -> None:
    config, folder = _llm(node)
    assert with_shared_checkpoints(config, str(node / "cache")) is config
    shared = with_shared_checkpoints(config, f"{STORE}/cache").model
    item, user = shared.item_encoder.checkpoint, shared.user_decoder.checkpoint
    assert item == user and item.startswith(f"{STORE}/cache/checkpoint-")
    assert read_manifest(item, "checkpoint")["content_hash"] in item
    assert checkpoint_hash(item) == checkpoint_hash(folder)
    there, here = load_body(item).state_dict(), load_body(folder).state_dict()
    assert all(here[name].equal(value) for name, value in there.items())
    assert load_tokenizer(item).get_vocab() == load_tokenizer(folder).get_vocab()


def test_states_of_frozen_layers_are_computed_by_one_machine_and_fetched_by_others(
    node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, folder = _llm(node)
    data = tiny_run.write_data(node)
    kept = FrozenOutputs.of(config, data, folder, str(node / "cache"))
    outputs = FrozenOutputs.of(config, data, folder, f"{STORE}/cache")
    assert kept is not None and outputs is not None
    kept.make()
    outputs.make()
    assert exists(outputs.path) and outputs.seconds() is not None
    outputs.here.unlink()  # on another machine
    encoder = kept.portions().encoder
    monkeypatch.setattr(FrozenOutputs, "portions", lambda *_: pytest.fail("computed again"))
    outputs.attach(encoder)
    assert encoder.states is not None
    np.testing.assert_array_equal(encoder.states.values, np.load(kept.path))
