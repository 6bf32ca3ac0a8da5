"""The Ray job makes the numbers that the process makes, in a folder that load accepts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from karma_ray.artifacts import content_hash, join, read_manifest, read_table
from karma_ray.cluster.embedding import CatalogEncoder, embed_items
from karma_ray.errors import InputError
from karma_ray.retrieval.encode import load_embeddings
from karma_ray.retrieval.index_build import index_run
from karma_ray.retrieval.retriever import Retriever
from tests import tiny_run


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> str:
    root = tmp_path_factory.mktemp("embedding")
    tiny_run.write_data(root)
    return tiny_run.write_run(root)


def data_of(run: str) -> str:
    return str(Path(run).parent / "data")


def test_one_encoder_gives_the_in_process_numbers_for_any_rows(run: str) -> None:
    expected = load_embeddings(join(run, "item_embeddings"))
    encoder = CatalogEncoder(join(run, "bundle"), data_of(run), batch_size=3, precision="float32")
    part = encoder.encode(np.array([7, 0, 31]))
    assert part.column("item_id").to_pylist() == ["i7", "i0", "i31"]
    assert part.column("title").to_pylist() == [expected.titles[row] for row in (7, 0, 31)]
    vectors = np.array(part.column("embedding").to_pylist(), np.float32)
    np.testing.assert_allclose(vectors, expected.embeddings[[7, 0, 31]], atol=1e-5)


def test_missing_parts_are_named(run: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--data"):
        embed_items(join(run, "bundle"), str(tmp_path), str(tmp_path / "out"))
    with pytest.raises(InputError, match="manifest"):
        embed_items(str(tmp_path), data_of(run), str(tmp_path / "out"))
    with pytest.raises(InputError, match="--actors"):
        embed_items(join(run, "bundle"), data_of(run), str(tmp_path / "out"), num_actors=0)


@pytest.mark.ray
def test_encoders_on_every_cpu_make_the_same_embeddings_and_the_run_serves_them(
    two_cpus: None, run: str
) -> None:
    out = join(run, "item_embeddings")
    expected = load_embeddings(out)
    stale = Path(out, "part-99999.parquet")
    stale.write_bytes(Path(out, "part-00000.parquet").read_bytes())
    bundle = join(run, "bundle")
    manifest = embed_items(bundle, data_of(run), out, num_actors=2, batch_size=8)
    found = load_embeddings(out, read_manifest(bundle)["content_hash"])
    assert not stale.exists() and found.num_items == manifest["num_items"] == 40
    np.testing.assert_allclose(
        found.in_order(expected.item_ids).embeddings, expected.embeddings, atol=1e-5
    )
    kind = read_table(out).schema.field("embedding").type
    assert kind.list_size == 32 and str(kind.value_type) == "float"
    assert manifest["parents"]["items"] == content_hash(join(data_of(run), "items"))
    index_run(run)
    best = Retriever.load(run, data=data_of(run)).recall("red mug", [], 3)
    assert len(best.items) == 3
