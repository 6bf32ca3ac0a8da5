"""A multimodal run: tiny Qwen3-VL around the pretrained text, trained, exported, embedded."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from karma_ray import recipes
from karma_ray.artifacts import join, read_json, read_table, write_table
from karma_ray.config import override
from karma_ray.data.catalog import Catalog
from karma_ray.data.pixels import catalog_pixels
from karma_ray.data.prompts import encode_texts
from karma_ray.data.synthetic.config import ToyShopConfig
from karma_ray.data.synthetic.shop import write_toy_shop
from karma_ray.errors import InputError
from karma_ray.model.backbone import build_tiny, save_body
from karma_ray.retrieval.encode import encode_catalog
from karma_ray.retrieval.export import load_bundle, save_bundle
from karma_ray.retrieval.part_encoder import CatalogEncoder
from karma_ray.runs.stages import is_tiny, with_checkpoints
from tests import multimodal, tiny
from tests.cluster.test_features import picture
from tests.runs.test_pipeline import SMALL

MULTIMODAL = "model.item_encoder.modality=multimodal"


def test_the_embedding_actor_sees_what_the_process_sees(tmp_path: Path) -> None:
    images = [picture(row) if row % 3 else None for row in range(tiny.catalog().num_items)]
    data = str(tmp_path / "data")
    table = tiny.catalog().table.append_column("image", [images])
    write_table(table, join(data, "items"))
    catalog, words = Catalog.load(data), tiny.tokenizer()
    model, bundle = multimodal.model().interest, str(tmp_path / "bundle")
    save_bundle(model, words, tiny.PLAIN, bundle)
    model.item_encoder.attach_catalog(catalog, data)
    tokens, lengths = encode_texts(words, catalog.texts(), tiny.PLAIN.max_item_tokens)
    expected = encode_catalog(model, tokens, lengths)
    found = CatalogEncoder(bundle, data, "float32").encode(np.array([7, 0, 31])).vectors
    np.testing.assert_allclose(found, expected[[7, 0, 31]], atol=1e-5)
    model.item_encoder.pictures = multimodal.pictures()
    other = encode_catalog(model, tokens, lengths)[[7, 0, 31]]
    changed = np.abs(found - other).max(1) > 1e-3
    assert changed.tolist() == [True, False, True]  # item 0 has no picture anywhere


def test_checkpoints_must_fit_the_modality(tmp_path: Path) -> None:
    save_body(build_tiny(tiny.BODY, 300, 0), str(tmp_path))
    config = override(recipes.build("karma_text"), [MULTIMODAL])
    assert is_tiny(config)
    with pytest.raises(InputError, match=r"item_encoder.*'qwen3'.*choices: qwen3_vl"):
        is_tiny(with_checkpoints(config, str(tmp_path), str(tmp_path)))


def test_an_encoder_that_would_see_nothing_is_refused_at_once(
    tmp_path: Path,
) -> None:
    from karma_ray.runs.pipeline import train_run

    shop = str(tmp_path / "shop")
    write_toy_shop(shop, ToyShopConfig(num_items=240, num_users=120))
    items = read_table(join(shop, "items")).drop_columns(["image"])
    shutil.rmtree(join(shop, "items"))
    write_table(items, join(shop, "items"))
    config = override(recipes.build("toy"), [*SMALL, MULTIMODAL])
    with pytest.raises(InputError, match=r"modality: 'multimodal' needs images, .* have none"):
        train_run(config, shop, str(tmp_path / "run"), cache=str(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


@pytest.mark.ray
def test_a_run_sees_from_training_to_serving(ray_cluster: None, shop: str, tmp_path: Path) -> None:
    from karma_ray.cluster.embedding import embed_items
    from karma_ray.retrieval.encode import load_embeddings
    from karma_ray.retrieval.index_build import index_run
    from karma_ray.retrieval.retriever import Retriever
    from karma_ray.runs.pipeline import train_run
    from karma_ray.runs.stages import finished_stage

    run = str(tmp_path / "run")
    metrics = train_run(
        override(recipes.build("toy"), [*SMALL, MULTIMODAL]), shop, run, cache=str(tmp_path / "c")
    )
    assert 0 <= metrics["HR@50"] <= 100
    assert read_json(f"{run}/bundle/item_encoder/config.json")["model_type"] == "qwen3_vl"
    trained = load_embeddings(f"{run}/item_embeddings")
    embed_items(f"{run}/bundle", shop, f"{run}/item_embeddings")
    index_run(run)
    again = load_embeddings(f"{run}/item_embeddings").in_order(trained.item_ids)
    np.testing.assert_allclose(again.embeddings, trained.embeddings, atol=1e-5)
    stage = finished_stage(run, shop)
    model, tokens = stage.build_trained().interest, stage.collator().catalog_tokens()
    blank = catalog_pixels(stage.catalog(), shop, 64).values.copy()
    blank[:, 1:] = 0
    model.item_encoder.pictures = type(model.item_encoder.pictures)(blank)  # type: ignore[misc,arg-type]
    assert np.abs(encode_catalog(model, *tokens) - trained.embeddings).max() > 1e-3
    assert Retriever.load(run).recall("red lamp", [], 5).items
    assert load_bundle(f"{run}/bundle").interest.config.item_encoder.modality == "multimodal"
