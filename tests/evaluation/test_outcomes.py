"""Values per example, packed: they average to the metrics and stay small."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest

from karma_ray.evaluation.evaluate import EvaluationResult, evaluate
from karma_ray.evaluation.outcomes import Outcomes
from tests.evaluation.test_evaluate import (
    CONFIG,
    NUM_ITEMS,
    Likes,
    make_catalog,
    make_examples,
    make_matches,
)

WARM = np.arange(NUM_ITEMS) % 3 > 0
HELD_OUT = np.arange(NUM_ITEMS) % 6 == 0


@pytest.fixture(scope="module")
def result() -> EvaluationResult:
    catalog = make_catalog()
    return evaluate(
        Likes(catalog), make_examples(), catalog, config=CONFIG, train_item_ids=WARM,
        query_matches=make_matches(catalog), held_out=HELD_OUT,
    )  # fmt: skip


@pytest.fixture(scope="module")
def outcomes(result: EvaluationResult) -> Outcomes:
    examples = make_examples()
    rows = make_catalog().rows(examples.column("positive_item_id").to_pylist())
    made = Outcomes.of(
        result.details, ~WARM[rows], examples.column("user_id").to_pylist(), HELD_OUT[rows],
        replace(result.details, ranks=result.details.ranks + 3),
    )  # fmt: skip
    return Outcomes.unpacked(*made.packed())


@pytest.mark.parametrize(
    "metric",
    ["HR@10", "HR@50", "NDCG@10", "MRR", "JS@50", "gAUC", "cold/HR@10", "warm/MRR", "cold/JS@50",
     "in_query/HR@10", "in_query/NDCG@10", "in_query/MRR", "held_out/HR@10", "held_out/JS@50"],
)  # fmt: skip
def test_unpacked_values_average_to_the_metric(
    result: EvaluationResult, outcomes: Outcomes, metric: str
) -> None:
    found = outcomes.values(metric)
    assert found is not None
    values, users, weights = found
    assert len(values) == len(users) == len(weights)
    # shares are kept in parts of 2,000, a reciprocal rank in full
    assert np.average(values, weights=weights) == pytest.approx(result.metrics[metric], abs=0.03)


def test_the_ranks_of_paraphrases_are_paired_with_the_others(outcomes: Outcomes) -> None:
    usual, other = outcomes.values("HR@10"), outcomes.values("paraphrased/HR@10")
    assert usual is not None and other is not None
    assert np.array_equal(other[0], 100.0 * (outcomes.rank <= 7)) and other[0].mean() > 0
    assert np.array_equal(usual[1], other[1])
    assert outcomes.values("paraphrased/JS@50") is None


def test_what_is_not_measured_is_not_stored(result: EvaluationResult) -> None:
    users = make_examples().column("user_id").to_pylist()
    made = Outcomes.of(result.details, np.zeros(len(result.details.ranks), dtype=bool), users)
    back = Outcomes.unpacked(*made.packed())
    assert back.examples.held_out is None and back.paraphrased_rank is None
    assert back.values("held_out/HR@10") is None and back.values("paraphrased/HR@10") is None
    for content, names in zip(
        made.packed(),
        (["user", "cold", "group_user", "group_weight"],
         ["rank", "query_rank", "overlap", "group_auc"]),
        strict=True,
    ):  # fmt: skip
        assert np.load(io.BytesIO(content)).files == names


def test_a_user_has_one_number_whatever_was_sampled(result: EvaluationResult) -> None:
    users = make_examples().column("user_id").to_pylist()
    cold = np.zeros(len(result.details.ranks), dtype=bool)
    found = Outcomes.of(result.details, cold, ["another", *users]).examples
    assert found.user.tolist() == [int(name[1:]) + 1 for name in users]


@pytest.mark.parametrize("metric", ["NDCG@all", "in_query/JS@50", "first/HR@10", "HR@few"])
def test_what_is_not_kept_is_not_answered(outcomes: Outcomes, metric: str) -> None:
    assert outcomes.values(metric) is None


def test_ranks_beyond_sixteen_bits_are_misses() -> None:
    catalog = make_catalog()
    details = evaluate(
        Likes(catalog), make_examples(3), catalog, config=CONFIG, train_item_ids=WARM,
        query_matches=make_matches(catalog),
    ).details  # fmt: skip
    details.ranks[0] = np.iinfo(np.int64).max
    users = make_examples(3).column("user_id").to_pylist()
    made = Outcomes.of(details, np.zeros(len(users), dtype=bool), users)
    again = Outcomes.unpacked(*made.packed())
    values = again.values("MRR")
    assert values is not None and values[0][0] == 0.0
    assert again.rank[1:].tolist() == details.ranks[1:].tolist()


def test_a_test_set_of_twelve_thousand_clicks_takes_less_than_sixty_kilobytes(
    outcomes: Outcomes,
) -> None:
    generator, num = np.random.default_rng(0), 12_000
    of = outcomes.examples.__class__(
        np.sort(generator.integers(0, 5000, num)), generator.random(num) < 0.15,
        np.sort(generator.integers(0, 5000, 7500)), generator.integers(5, 11, 7500).astype(float),
    )  # fmt: skip
    ranks = generator.exponential(80, num).astype(np.int64) + 1
    overlap = np.clip(generator.normal(0.1, 0.03, num), 0, 1)
    auc = generator.integers(0, 10, 7500) / 9
    examples, packed = Outcomes(of, ranks, ranks // 2 + 1, overlap, auc).packed()
    assert len(examples) < 60_000 and len(packed) < 60_000
