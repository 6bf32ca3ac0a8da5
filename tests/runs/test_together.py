"""The catalogue encoded by all workers together is the one that a single worker encodes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from karma_ray.retrieval.encode import encode_catalog
from karma_ray.runs.together import encode_together
from karma_ray.training.config import TrainingConfig
from karma_ray.training.placement import place
from tests import tiny
from tests.gloo import run_workers


def _worker(rank: int, parallelism: str) -> dict[str, Any]:
    model = tiny.model().train()
    place(model, TrainingConfig(parallelism=parallelism), torch.device("cpu"))  # type: ignore[arg-type]
    seen: list[int] = []

    def encode(tokens: Tensor, lengths: Tensor, rows: Tensor) -> Tensor:
        seen.extend(rows.tolist())
        return model.interest.encode_items(tokens, lengths, rows)

    tokens, lengths = tiny.item_tokens()
    vectors = encode_together(model.interest, tokens, lengths, "float32", encode)
    assert model.interest.training
    return {"vectors": torch.from_numpy(vectors), "seen": seen}


@pytest.mark.parametrize(("size", "parallelism"), [(2, "replicate"), (3, "shard")])
def test_each_worker_encodes_a_share_of_the_items_and_all_get_every_vector(
    size: int, parallelism: str
) -> None:
    tokens, lengths = tiny.item_tokens()
    alone = encode_catalog(tiny.model().interest, tokens, lengths)
    found = run_workers(_worker, size, parallelism)
    share = -(-len(tokens) // size)
    assert [len(one["seen"]) for one in found] == [share] * size
    assert {row for one in found for row in one["seen"]} == set(range(len(tokens)))
    for one in found:
        assert torch.equal(one["vectors"], found[0]["vectors"])
        assert np.allclose(one["vectors"].numpy(), alone, atol=1e-6)


def test_a_single_worker_encodes_as_without_others() -> None:
    model, (tokens, lengths) = tiny.model(), tiny.item_tokens()
    together = encode_together(model.interest, tokens, lengths, "float32")
    assert np.array_equal(together, encode_catalog(model.interest, tokens, lengths))
