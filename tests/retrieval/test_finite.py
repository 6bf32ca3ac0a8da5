"""NaN and infinity are refused by name when a run is loaded, and never answered with nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from fastapi.testclient import TestClient
from safetensors.torch import load_file, save_file

from karma_ray.artifacts import read_table, write_table
from karma_ray.cluster.serving import serve_run
from karma_ray.errors import KarmaRayError
from karma_ray.retrieval.index import ItemIndex
from karma_ray.retrieval.retriever import Retriever
from karma_ray.serving.app import build_app
from karma_ray.serving.service import Service
from tests import tiny_run


@pytest.fixture
def run(tmp_path: Path) -> str:
    return tiny_run.write_run(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_endpoint_over_embeddings_that_are_not_finite_names_folder_and_item(
    run: str, value: float
) -> None:
    folder = f"{run}/item_embeddings"
    table = read_table(folder)
    vectors = np.stack(table.column("embedding").to_numpy())
    vectors[3, 1] = value
    width = vectors.shape[1]
    values = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1), pa.float32()), width)
    column = table.column_names.index("embedding")
    write_table(table.set_column(column, "embedding", values), folder)
    for start in (Retriever.load, serve_run):
        with pytest.raises(KarmaRayError, match=r"item_embeddings: .* 1 of 40 items .* 'i3'"):
            start(run)


def test_a_bundle_with_a_weight_that_is_not_finite_names_the_weight(run: str) -> None:
    path = f"{run}/bundle/user_decoder/model.safetensors"
    weights = load_file(path)
    weights["norm.weight"][0] = float("nan")
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(KarmaRayError, match=r"bundle: weight user_decoder.body.norm.weight is not"):
        Retriever.load(run)


def test_an_index_of_vectors_that_are_not_finite_is_not_made() -> None:
    vectors = np.array([[1, 2], [3, np.nan]], np.float32)
    with pytest.raises(KarmaRayError, match=r"1 of 2 items are not finite .*'b'"):
        ItemIndex.build(vectors, ["a", "b"], ["A", "B"])


def test_an_answer_that_is_not_finite_is_an_error_and_not_an_empty_list(run: str) -> None:
    retriever = Retriever.load(run)
    retriever.embeddings[3] = torch.nan
    client = TestClient(build_app(Service(retriever)))
    request = {"history": [{"item_id": "i3"}]}
    for path, body in (("recall", request), ("score", {**request, "item_ids": ["i1"]})):
        answer = client.post(f"/v1/{path}", json=body)
        assert answer.status_code == 500 and "not finite" in answer.json()["detail"]
    assert len(client.post("/v1/recall", json={}).json()["items"]) == 10
