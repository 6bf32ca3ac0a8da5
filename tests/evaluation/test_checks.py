"""The checks must see a model that cheats, not only pass one that does not."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest
import torch
from torch import Tensor

from karma_ray.data.batch import Batch
from karma_ray.data.schema import EXAMPLES
from karma_ray.evaluation.checks import hidden_item_effect, with_other_histories
from tests import tiny


def _examples(users: list[str]) -> pa.Table:
    rows: list[dict[str, Any]] = [
        {
            "user_id": user,
            "query": f"query {place}",
            "positive_item_id": f"i{place}",
            "history_queries": [user],
            "history_item_ids": [f"of-{user}"],
            "history_timestamps": [None],
        }
        for place, user in enumerate(users)
    ]
    return pa.Table.from_pylist(rows, schema=EXAMPLES)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_request_gets_a_strangers_history_and_keeps_its_query(seed: int) -> None:
    examples = _examples(["a", "a", "b", "c", "b", "d", "a"])
    mixed = with_other_histories(examples, seed)
    assert mixed.column("query").equals(examples.column("query"))
    assert mixed.column("positive_item_id").equals(examples.column("positive_item_id"))
    for user, items, queries in zip(
        mixed.column("user_id").to_pylist(),
        mixed.column("history_item_ids").to_pylist(),
        mixed.column("history_queries").to_pylist(),
        strict=True,
    ):
        assert items != [f"of-{user}"]
        assert items == [f"of-{queries[0]}"]  # all columns of the past move together


def _batch() -> Batch:
    return tiny.batch(tiny.shop())


def test_hidden_items_have_no_effect_on_an_honest_model() -> None:
    effect = hidden_item_effect(tiny.model().interest.eval(), _batch())
    assert effect == {
        "future_perturbation_max_abs": 0.0,
        "same_step_perturbation_max_abs": 0.0,
    }


def test_a_model_that_peeks_at_its_own_item_is_caught() -> None:
    model = tiny.model().interest.eval()
    honest = model.interest

    def peeking(batch: Batch, items: Tensor) -> Tensor:
        return honest(batch, items) + 0.1 * items[batch.item_index]

    model.interest = peeking  # type: ignore[method-assign]
    with torch.no_grad():
        effect = hidden_item_effect(model, _batch())
    assert effect["same_step_perturbation_max_abs"] > 0
    assert effect["future_perturbation_max_abs"] == 0
