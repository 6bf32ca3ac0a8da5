"""Catalogue, bundle and embeddings may lie in a store, and so may what a killed job has written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from karma_ray.artifacts import exists
from karma_ray.data.work_folder import Part
from karma_ray.node_cache import upload
from karma_ray.retrieval.embedding import embed_catalog
from karma_ray.retrieval.encode import load_embeddings
from karma_ray.retrieval.index_build import index_run
from karma_ray.retrieval.part_encoder import Embedding, encode_here
from karma_ray.retrieval.parts import embedded, offer, to_embed
from karma_ray.retrieval.retriever import Retriever
from tests import tiny_run
from tests.cluster.stores import BUCKET, running_store


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A run and its data in a store."""
    with running_store(monkeypatch):
        upload(Path(tiny_run.write_data(tmp_path)), f"s3://{BUCKET}/data")
        upload(Path(tiny_run.write_run(tmp_path)), f"s3://{BUCKET}/run")
        yield f"s3://{BUCKET}/run"


def test_a_job_that_is_cut_off_goes_on_in_the_store_and_the_run_serves_what_it_made(
    run: str, tmp_path: Path
) -> None:
    data, folder = f"s3://{BUCKET}/data", to_embed(run)
    out, done = folder.item_embeddings, list[str]()

    def cut_off(of: Embedding, parts: list[Part]) -> Iterator[dict[str, Any]]:
        for part, facts in zip(parts[:3], encode_here(of, parts), strict=False):
            done.append(part.name)
            yield facts
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed_catalog(folder.bundle, data, out, cut_off, part_items=8)
    assert not exists(out)  # it appears whole or not at all
    left: list[str] = []

    def rest(of: Embedding, parts: list[Part]) -> Iterator[dict[str, Any]]:
        left.extend(part.name for part in parts)
        return encode_here(of, parts)

    manifest = embed_catalog(folder.bundle, data, out, rest, part_items=8)
    assert len(done) == 3 and len(left) == 2 and not set(done) & set(left)
    assert (manifest["num_items"], manifest["encoded"]) == (40, 40)
    assert not exists(f"{out}-work")
    found, expected = load_embeddings(out), load_embeddings(str(tmp_path / "run/item_embeddings"))
    assert found.item_ids == expected.item_ids
    np.testing.assert_allclose(found.embeddings, expected.embeddings, atol=1e-5)
    offer(folder)
    index_run(run)
    assert len(Retriever.load(run).recall("red mug", [], 3).items) == 3
    again = to_embed(run).item_embeddings
    manifest = embed_catalog(folder.bundle, data, again, reuse=embedded(run))
    assert (manifest["encoded"], manifest["reused"]) == (0, 40)
