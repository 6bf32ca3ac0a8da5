"""Negatives are chosen from frozen content: never something the user clicked."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from karma_ray.objectives import negatives
from karma_ray.objectives.action import InfoNCE
from karma_ray.objectives.negatives import (
    first_occurrences,
    grouped_contents,
    hard_negative_mask,
    in_batch_mask,
    inclusion_log_chance,
)

# Two users; contents they clicked, the second padded.
CLICKED = torch.tensor([[3, 5, 5], [7, 3, 0]])
CLICKED_MASK = torch.tensor([[True, True, True], [True, False, False]])


def test_nothing_of_equal_content_to_a_users_clicks_is_an_in_batch_negative() -> None:
    pool = torch.tensor([3, 5, 7, 9, 0])
    window = torch.tensor([0, 1, 0])
    mask = in_batch_mask(pool, CLICKED, CLICKED_MASK, window)
    assert mask.tolist() == [
        [False, False, True, True, True],
        [True, True, False, True, True],  # the padding's contents 3 and 0 do not count
        [False, False, True, True, True],
    ]


def test_the_in_batch_mask_is_brute_force() -> None:
    generator = torch.Generator().manual_seed(0)
    pool = torch.randint(0, 12, (15,), generator=generator)
    clicked = torch.randint(0, 12, (4, 6), generator=generator)
    exists = torch.rand(4, 6, generator=generator) < 0.6
    window = torch.randint(0, 4, (9,), generator=generator)
    mask = in_batch_mask(pool, clicked, exists, window)
    for n, w in enumerate(window.tolist()):
        own = set(clicked[w][exists[w]].tolist())
        assert mask[n].tolist() == [content not in own for content in pool.tolist()]


def test_a_hard_negative_with_the_content_of_a_click_is_dropped() -> None:
    hard = torch.tensor([[[3, 9]], [[3, 7]]])  # [B, T=1, H=2]
    exists = torch.tensor([[[True, True]], [[True, True]]])
    found = hard_negative_mask(hard, exists, CLICKED, CLICKED_MASK)
    assert found.tolist() == [[[False, True]], [[True, False]]]


def test_a_padded_hard_negative_stays_out() -> None:
    hard, exists = torch.tensor([[[9, 9]]]), torch.tensor([[[True, False]]])
    found = hard_negative_mask(hard, exists, CLICKED[:1], CLICKED_MASK[:1])
    assert found.tolist() == [[[True, False]]]


def test_first_occurrences_keep_one_of_each_in_order() -> None:
    ids = torch.tensor([4, 2, 4, 9, 2, 2, 0])
    assert first_occurrences(ids).tolist() == [0, 1, 3, 6]


def test_first_occurrences_of_distinct_ids_is_everything() -> None:
    assert first_occurrences(torch.tensor([5, 1, 3])).tolist() == [0, 1, 2]
    assert first_occurrences(torch.tensor([], dtype=torch.long)).tolist() == []


def test_first_occurrences_of_two_equal_workers_is_one_worker() -> None:
    ids = torch.tensor([5, 1, 3])
    assert first_occurrences(torch.cat([ids, ids])).tolist() == [0, 1, 2]


@pytest.mark.parametrize("draws", [1, 7, 5000])
def test_the_chance_of_being_in_the_pool_is_that_of_not_being_missed_by_every_click(
    draws: int,
) -> None:
    shares = [1e-8, 1e-4, 0.03, 0.5, 1.0]
    found = inclusion_log_chance(torch.tensor(shares), draws)
    # In Python's float64, and for the smallest as draws * share, which it is to eight digits.
    wanted = [math.log(1 - (1 - p) ** draws) for p in shares[1:]]
    assert found[1:].tolist() == pytest.approx(wanted, abs=1e-5)
    assert float(found[0]) == pytest.approx(math.log(draws * 1e-8), abs=1e-4)


def test_over_many_batches_the_corrected_denominator_is_that_of_the_whole_catalogue() -> None:
    """Popular items have the higher scores here, so without the correction it is far off."""
    generator = torch.Generator().manual_seed(0)
    share = torch.tensor([0.4, 0.3, 0.1, 0.1, 0.05, 0.03, 0.02], dtype=torch.float64)
    scores = torch.tensor([2.0, 1.0, 0.0, 1.5, 0.5, -1.0, 1.0], dtype=torch.float64)
    batches, draws, positive = 40_000, 5, 1.2
    clicks = torch.multinomial(share, batches * draws, True, generator=generator)
    pools = torch.zeros(batches, len(share), dtype=torch.float64)
    pools.scatter_(1, clicks.view(batches, draws), 1.0)

    def denominators(negatives: torch.Tensor) -> torch.Tensor:
        loss = InfoNCE()(pools.new_full((batches,), positive), negatives.expand_as(pools), pools)
        return (loss + positive).exp()

    wanted = float(scores.exp().sum()) + math.exp(positive)
    found = denominators(scores - inclusion_log_chance(share, draws))
    error = float(found.std()) / math.sqrt(batches)
    assert float(found.mean()) == pytest.approx(wanted, abs=4 * error)
    assert 4 * error < 0.02 * wanted
    assert float(denominators(scores).mean()) < 0.8 * wanted


@pytest.mark.parametrize("most", [1, 40, 10**6])
def test_groups_of_contents_are_brute_force(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(negatives, "MAX_SCORES", most)
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(40, 3)).astype(np.float32)
    contents = generator.integers(0, 35, 40)
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    linked = (units @ units.T > 0.99) | (contents[:, None] == contents)
    for _ in range(6):  # chains of up to 64 pairs
        linked = linked @ linked
    groups = grouped_contents(contents, vectors, 0.99)
    np.testing.assert_array_equal(groups[:, None] == groups, linked)
    assert len(np.unique(groups)) < len(np.unique(contents)) and groups.max() < 40


def test_without_larger_cosines_contents_stay_as_they_are() -> None:
    contents = np.array([0, 1, 0, 2])
    groups = grouped_contents(contents, np.eye(4, dtype=np.float32), 0.99)
    np.testing.assert_array_equal(groups, contents)


def test_of_many_items_those_that_share_a_cell_are_compared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from benchmarks.near_duplicates import planted

    vectors, _ = planted(3_000, 16, 20)
    every = grouped_contents(np.arange(3_000), vectors, 0.99)
    compared: list[int] = []
    pairs_of_all = negatives._pairs_of_all

    def noting(units: torch.Tensor, cosine: float) -> Iterator[np.ndarray]:
        compared.append(len(units) ** 2)
        return pairs_of_all(units, cosine)

    monkeypatch.setattr(negatives, "_pairs_of_all", noting)
    monkeypatch.setattr(negatives, "ALL_PAIRS", 2_999)
    monkeypatch.setattr(negatives, "CELL_ITEMS", 100)
    found = grouped_contents(np.arange(3_000), vectors, 0.99)
    assert len(compared) == 30 and sum(compared) < 3_000**2 / 3
    united = len(np.unique(every)), len(np.unique(found))
    assert united[0] < 2_750 and united[1] - united[0] < 0.05 * (3_000 - united[0])
    joined = {(every[row], group) for row, group in enumerate(found)}
    assert len(joined) == united[1]  # nothing is united that all pairs would not unite
