"""What workers encode and rank together is what a single worker does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor, nn

from karma_ray.baselines.ranker import Ranker
from karma_ray.data.prepared import QueryMatches
from karma_ray.evaluation.config import EvaluationConfig
from karma_ray.evaluation.evaluate import EvaluationResult, evaluate
from karma_ray.evaluation.measurement import ALONE, Workers
from karma_ray.model.karma import KarmaModel
from karma_ray.retrieval.encode import encode_catalog
from karma_ray.retrieval.retriever import Retriever
from karma_ray.runs.together import encode_together, ranking_workers
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


def _examples(num: int = 30) -> pa.Table:
    """Clicks of different histories, two to a page, with items that were shown and not clicked."""
    generator = np.random.default_rng(0)
    rows = []
    for number in range(num):
        ids = [f"i{row}" for row in generator.permutation(48)]
        page, query = number // 2, tiny.QUERIES[number // 2 % 5]
        row = tiny.request(ids[: 1 + number % 6], query)
        shown = {"positive_item_id": ids[10], "hard_negative_ids": ids[11:15]}
        rows.append(row | shown | {"user_id": f"u{page}", "page_id": f"p{page}"})
    return tiny.examples(*rows)


class _Counting:
    """Asks another ranker, and counts how often."""

    def __init__(self, ranker: Ranker) -> None:
        self._ranker, self.count = ranker, 0

    def score(self, examples: pa.Table) -> Any:
        self.count += 1
        return self._ranker.score(examples)


def _ranked(
    model: KarmaModel, bank: np.ndarray, block_size: int, workers: Workers = ALONE
) -> tuple[EvaluationResult, int]:
    catalog = tiny.catalog()
    ranker = _Counting(Retriever.from_model(model.interest, tiny.collator(), catalog, bank))
    found = evaluate(
        ranker, _examples(), catalog, config=EvaluationConfig(block_size=block_size),
        train_item_ids={f"i{row}" for row in range(30)}, query_matches=QueryMatches(catalog),
        workers=workers,
    )  # fmt: skip
    return found, ranker.count


def _ranking(rank: int, parallelism: str, bank: np.ndarray, block_size: int) -> dict[str, Any]:
    model = tiny.model().eval()
    place(model, TrainingConfig(parallelism=parallelism), torch.device("cpu"))  # type: ignore[arg-type]
    with torch.no_grad():
        found, asked = _ranked(model, bank, block_size, ranking_workers(model))
    return {"metrics": found.metrics, "ranks": torch.from_numpy(found.details.ranks),
            "auc": torch.from_numpy(found.details.group_auc), "asked": asked}  # fmt: skip


@pytest.mark.parametrize(
    ("size", "parallelism", "block_size"),
    [(2, "replicate", 6), (2, "shard", 7), (3, "replicate", 20), (3, "shard", 20)],
)
def test_each_worker_ranks_for_a_share_of_the_clicks_and_all_get_the_numbers_of_one_worker(
    size: int, parallelism: str, block_size: int
) -> None:
    model = tiny.model().eval()
    bank = encode_catalog(model.interest, *tiny.item_tokens())
    alone, blocks = _ranked(model, bank, block_size)
    assert 0 < alone.metrics["MRR"] < 50 and alone.metrics["in_query/num_test"] > 0
    for found in run_workers(_ranking, size, parallelism, bank, block_size):
        assert found["asked"] == -(-blocks // size) < blocks
        assert found["metrics"] == alone.metrics
        assert np.array_equal(found["ranks"].numpy(), alone.details.ranks)
        assert np.array_equal(found["auc"].numpy(), alone.details.group_auc)


def test_a_single_worker_ranks_every_block_itself() -> None:
    assert ranking_workers(nn.Linear(1, 1)) is ALONE
    assert ALONE.share(3) == [(0, True), (1, True), (2, True)]
    assert ALONE.share(0) == Workers(2, 3).share(0) == []
