"""One small toy shop, and finished runs of untrained models on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from karma_ray.artifacts import RunFolder, write_json, write_manifest
from karma_ray.config import Config, to_dict
from karma_ray.data.config import PrepareConfig
from karma_ray.data.fragments import items_folder
from karma_ray.data.prepared import PreparedData
from karma_ray.data.synthetic.config import ToyShopConfig
from karma_ray.data.synthetic.shop import write_toy_shop
from karma_ray.model.backbones.tokenizer import train_tokenizer
from karma_ray.node_cache import known_hash
from karma_ray.retrieval.encode import ItemTable, encode_catalog, save_embeddings
from karma_ray.retrieval.export import load_bundle, save_bundle
from karma_ray.retrieval.index_build import index_run
from karma_ray.runs.preparation import ensure_prepared
from tests import tiny_run

WriteRun = Callable[..., str]


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    """240 items and 60 users, prepared."""
    folder = str(tmp_path_factory.mktemp("shop"))
    write_toy_shop(folder, ToyShopConfig(num_items=240, num_users=60))
    return ensure_prepared(folder, PrepareConfig())


@pytest.fixture(scope="session")
def write_run() -> WriteRun:
    """Writes a finished run of an untrained model: bundle, embeddings, index, manifest."""

    def written(root: Path, source: PreparedData, seed: int = 0, recipe: str = "toy") -> str:
        folder, items = RunFolder(str(root)), source.catalog()
        words = train_tokenizer(iter(items.texts()), 320)
        model = tiny_run.interest_model(words, seed)
        saved = save_bundle(model, words, tiny_run.COLLATE, folder.bundle, {"seed": seed})
        interest = load_bundle(folder.bundle).interest
        vectors = encode_catalog(interest, *tiny_run.item_tokens(words, items))
        parents = {"bundle": saved["content_hash"],
                   "items": known_hash(items_folder(source.items_uri))}  # fmt: skip
        table = ItemTable(items.item_ids, items.titles, vectors, parents)
        save_embeddings(table, folder.item_embeddings)
        index_run(folder.root)
        write_json({**to_dict(Config()), "recipe": recipe, "seed": seed}, folder.config)
        write_json({"name": "a small shop", "query_source": "real"}, folder.path("data.json"))
        made_of = {"data": str(source.facts["input"])}
        write_manifest(folder.root, "run", data=source.uri, seed=seed, parents=made_of)
        return folder.root

    return written


@pytest.fixture(scope="session")
def runs(
    source: PreparedData, write_run: WriteRun, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with `karma-1`, `karma-2`, `action-1` and `action-2`."""
    folder = tmp_path_factory.mktemp("runs")
    for number, name in enumerate(("karma-1", "karma-2", "action-1", "action-2")):
        write_run(folder / name, source, seed=1 + number % 2 + 10 * (number > 1))
    return folder
