"""A run whose catalogue is embedded again serves whole parts that belong together, at any time."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from karma_ray.artifacts import RunFolder, read_json, read_manifest
from karma_ray.retrieval.encode import ItemTable, load_embeddings, save_embeddings
from karma_ray.retrieval.index_build import index_run
from karma_ray.retrieval.parts import CURRENT, offer, served, start_over, to_embed
from karma_ray.retrieval.retriever import Retriever, check_run
from tests import tiny_run


@pytest.fixture
def run(tmp_path: Path) -> str:
    return tiny_run.write_run(tmp_path)


def embed_again(run: str, table: ItemTable, factor: float) -> RunFolder:
    """Write other embeddings of the same bundle."""
    folder = to_embed(run)
    other = replace(table, embeddings=factor * table.embeddings)
    save_embeddings(other, folder.item_embeddings)
    offer(folder)
    return folder


def answers(run: str) -> list[tuple[str, float]]:
    return [(i.item_id, i.score) for i in Retriever.load(run).recall("red mug", [], 40).items]


def test_a_run_that_was_made_once_has_its_parts_where_they_always_were(run: str) -> None:
    assert served(run) == RunFolder(run)
    assert not Path(run, CURRENT).exists()


def test_new_embeddings_serve_when_their_index_is_complete_and_not_before(run: str) -> None:
    before = answers(run)
    folder = embed_again(run, load_embeddings(f"{run}/item_embeddings"), 2.0)
    assert folder.item_embeddings != RunFolder(run).item_embeddings
    assert answers(run) == before
    index_run(run)
    found = served(run)
    assert (found.item_embeddings, found.index) == (folder.item_embeddings, f"{run}/index-2")
    check_run(run)
    assert np.allclose(load_embeddings(found.item_embeddings).embeddings,
                       2 * load_embeddings(f"{run}/item_embeddings").embeddings)  # fmt: skip


def test_an_embedding_that_was_killed_leaves_the_old_ones_and_is_swept_up(run: str) -> None:
    before = answers(run)
    broken = to_embed(run).item_embeddings
    shutil.copytree(f"{run}/item_embeddings", broken)
    Path(broken, "manifest.json").unlink()  # it is written last
    assert answers(run) == before
    index_run(run)
    assert answers(run) == before
    assert served(run).item_embeddings == f"{run}/item_embeddings"
    assert not Path(broken).exists()


def test_an_index_that_was_killed_leaves_the_old_one(run: str) -> None:
    before = answers(run)
    embed_again(run, load_embeddings(f"{run}/item_embeddings"), 2.0)
    shutil.copytree(f"{run}/index", f"{run}/index-2")
    Path(run, "index-2", "manifest.json").unlink()
    assert answers(run) == before
    index_run(run)
    assert (
        read_manifest(served(run).index)["parents"]["item_embeddings"]
        == (read_manifest(f"{run}/item_embeddings-2")["content_hash"])
    )


def test_what_served_before_stays_until_the_next_change(run: str) -> None:
    first = load_embeddings(f"{run}/item_embeddings")
    for factor in (2.0, 3.0):
        embed_again(run, first, factor)
        index_run(run)
    index_run(run)
    kept = {path.name for path in Path(run).iterdir() if path.name.startswith(("item_", "index"))}
    assert kept == {"item_embeddings-3", "index-3", "index-4"}
    state = read_json(f"{run}/{CURRENT}")
    assert state["current"]["index"] == "index-4" and state["previous"]["index"] == "index-3"


def test_a_new_bundle_starts_with_the_first_names(run: str) -> None:
    embed_again(run, load_embeddings(f"{run}/item_embeddings"), 2.0)
    index_run(run)
    start_over(run)
    assert served(run) == RunFolder(run) == to_embed(run)
    left = {path.name for path in Path(run).iterdir()}
    assert left == {"bundle", "manifest.json"}
