"""Negatives are chosen from frozen content: never something the user clicked."""

from __future__ import annotations

import torch

from karma_ray.objectives.negatives import first_occurrences, hard_negative_mask, in_batch_mask

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
