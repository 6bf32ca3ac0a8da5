"""Near-duplicates by frozen cosine: the table, the batches that it masks, and resumed runs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from karma_ray import recipes
from karma_ray.artifacts import read_json, read_lines, read_manifest
from karma_ray.config import Config, override
from karma_ray.data.config import PrepareConfig
from karma_ray.data.draws import row_keys
from karma_ray.data.prepared import PreparedData
from karma_ray.model.backbone import build_tiny, save_body
from karma_ray.model.backbones.tokenizer import save_tokenizer
from karma_ray.retrieval.encode import encode_catalog
from karma_ray.runs.first_stages import start_stage
from karma_ray.runs.pipeline import train_run
from karma_ray.runs.preparation import ensure_prepared
from tests import tiny

SMALL = [
    "warmup.steps=2", "training.steps=4", "training.batch_size=8", "training.report_every=1",
    "training.checkpoint_every=2", "training.num_workers=0", "training.threads_per_worker=1",
    "evaluation.max_examples=20", "model.item_encoder.lexical=0", "training.precision=float32",
    "objective.duplicate_cosine=0.8",
]  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder as a hub's: random weights that were not made by a run."""
    folder = str(tmp_path_factory.mktemp("llm"))
    words = tiny.tokenizer()
    save_body(build_tiny(tiny.BODY, len(words.get_vocab()), 3), folder)  # type: ignore[attr-defined]
    save_tokenizer(words, folder)
    return folder


def _config(checkpoint: str, *more: str) -> Config:
    named = f"model.checkpoint={checkpoint}"
    return override(recipes.build("toy"), [*SMALL, named, "collate.max_item_tokens=12", *more])


def _source(shop: str) -> PreparedData:
    return ensure_prepared(shop, PrepareConfig())


def test_items_of_a_larger_frozen_cosine_are_no_negatives_of_each_other(
    shop: str, checkpoint: str, tmp_path: Path
) -> None:
    source = _source(shop)
    stage = start_stage(_config(checkpoint), source, str(tmp_path))
    assert stage.contents is not None
    contents, equal = stage.catalog().content_ids, source.catalog().content_ids
    interest = stage.build_joint().interest
    vectors = encode_catalog(interest, *stage.collator().catalog_tokens())
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    near = np.argwhere(np.triu(vectors @ vectors.T > 0.8, 1))
    other = near[equal[near[:, 0]] != equal[near[:, 1]]]
    assert len(other) > 5 and len(np.unique(contents)) > 20
    assert (contents[near[:, 0]] == contents[near[:, 1]]).all()
    manifest = read_manifest(stage.contents, "near_duplicates")
    assert manifest["joined"] == len(np.unique(equal)) - len(np.unique(contents))
    first, second = (f"{source.catalog().item_ids[row]}" for row in other[0])
    rows = tiny.sequences(tiny.window([first], hard=[[second]]))
    for collator, kept in ((stage.collator(), 0), (replace(stage, contents=None).collator(), 1)):
        assert int(collator.training(rows, row_keys(1, 0)).hard_mask.sum()) == kept


def test_equal_text_alone_counts_for_a_small_model_and_where_the_bound_is_one(
    shop: str, checkpoint: str, tmp_path: Path
) -> None:
    off = start_stage(_config(checkpoint, "objective.duplicate_cosine=1"), _source(shop),
                      str(tmp_path))  # fmt: skip
    more = ("model.checkpoint=tiny", "pretrain.steps=2")
    small = start_stage(_config(checkpoint, *more), _source(shop), str(tmp_path))
    assert off.contents is None and small.contents is None


def test_embeddings_that_hardly_differ_group_nothing(
    shop: str, checkpoint: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    same = "collate.max_item_tokens=1"  # all of a text but its end is cut off
    source = _source(shop)
    stage = start_stage(_config(checkpoint, same, "warmup.skip=true"), source, str(tmp_path))
    np.testing.assert_array_equal(stage.catalog().content_ids, source.catalog().content_ids)
    assert "their embeddings hardly differ" in caplog.text


def test_a_resumed_run_masks_what_it_masked_and_evaluation_asks_for_no_table(
    shop: str,
    checkpoint: str,
    tmp_path: Path,
    cut_off: Callable[[], AbstractContextManager[None]],
) -> None:
    cache, cut, whole = (str(tmp_path / name) for name in ("cache", "cut", "whole"))
    with cut_off():
        train_run(_config(checkpoint), shop, cut, cache=cache)
    (table,) = (path for path in Path(cache).glob("near-duplicates-*") if path.is_dir())
    assert read_json(f"{cut}/start.json")["contents"] == str(table)
    train_run(_config(checkpoint), shop, cut, cache=cache, resume=True, is_tested=False)
    train_run(_config(checkpoint), shop, whole, cache=cache, is_tested=False)
    lines = [
        [line["negatives/surviving"] for line in read_lines(f"{run}/metrics.jsonl")
         if line["stage"] == "joint"]
        for run in (cut, whole)
    ]  # fmt: skip
    assert lines[0] == lines[1] and len(lines[0]) == 4
    told = read_json(f"{whole}/data.json")["near_duplicates"]
    manifest = read_manifest(str(table), "near_duplicates")
    assert told == {name: manifest[name] for name in ("grouped", "items", "cosine")}
