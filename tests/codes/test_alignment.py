"""Pairs of co-clicks by hand, and a projection that moves related items together."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa
import pytest
import torch

from karma_ray.codes.alignment import AlignmentConfig, align, contrastive, pair_recall
from karma_ray.codes.pairs import co_clicks, relevant, text_similarity
from karma_ray.data.schema import SEQUENCES
from karma_ray.errors import InputError
from tests.tiny_run import catalog


def windows(*clicks: list[tuple[str, int, bool]]) -> list[pa.Table]:
    """Windows of clicks (item, minute, whether it is trained on)."""
    start = datetime(2024, 1, 1, tzinfo=UTC)
    rows = [
        {
            "item_ids": [item for item, _, _ in some],
            "timestamps": [start + timedelta(minutes=minute) for _, minute, _ in some],
            "loss_mask": [trained for _, _, trained in some],
        }
        for some in clicks
    ]
    names = ("item_ids", "timestamps", "loss_mask")
    return [pa.Table.from_pylist(rows, schema=pa.schema([SEQUENCES.field(n) for n in names]))]


def test_pairs_are_neighbouring_clicks_of_one_user_within_the_gap() -> None:
    found = co_clicks(
        windows(
            [("i1", 0, True), ("i0", 5, True), ("i2", 90, True), ("i2", 91, True)],
            [("i5", 91, True), ("i1", 92, True), ("i0", 93, True), ("gone", 94, True)],
        ),
        catalog(),
        gap_s=3600,
    )
    # i0-i2 are too far apart, i2-i2 is one item, i2-i5 are two users, i1-i0 is there already.
    assert found.tolist() == [[0, 1], [1, 5]]


def test_a_click_that_is_not_trained_on_makes_no_pair() -> None:
    seen = windows([("i1", 0, True), ("i2", 1, False), ("i3", 2, True)])
    assert co_clicks(seen, catalog(), 3600).tolist() == [[2, 3]]
    assert co_clicks([], catalog(), 3600).shape == (0, 2)


def test_pairs_whose_texts_share_no_word_are_dropped() -> None:
    items = catalog()  # i0 "red shirt", i1 "blue shirt", i6 "blue mug"
    similarity = text_similarity(items)
    pairs = np.array([[0, 1], [1, 6], [0, 8]])
    scores = similarity(pairs)
    assert scores[0] > 0 and scores[1] > 0 and scores[2] == 0
    assert similarity(np.array([[4, 4]]))[0] == pytest.approx(1.0)
    assert relevant(pairs, similarity, 0.01).tolist() == [[0, 1], [1, 6]]


def test_the_loss_of_a_pair_does_not_take_its_own_items_for_negatives() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 2, 4, generator=generator)
    same = torch.tensor([[0, 1], [0, 2]])  # both pairs have item 0: no negatives remain
    assert contrastive(first, second, same, 0.1).tolist() == [0.0, 0.0]
    loss = contrastive(first, second, torch.tensor([[0, 1], [2, 3]]), 0.1)
    cosines = torch.nn.functional.cosine_similarity(first[:, None], second[None], dim=-1) / 0.1
    expected = -(cosines.log_softmax(1).diagonal() + cosines.log_softmax(0).diagonal()) / 2
    torch.testing.assert_close(loss, expected)


def related() -> tuple[np.ndarray, np.ndarray]:
    """Items whose groups show in four of 32 numbers, and pairs within the groups."""
    random = np.random.default_rng(0)
    group = np.arange(600) % 30
    signal = random.normal(size=(30, 4))[group] + 0.1 * random.normal(size=(600, 4))
    vectors = np.concatenate([signal, 2 * random.normal(size=(600, 28))], axis=1)
    first = random.integers(600, size=3000)
    second = (first + 30 * random.integers(1, 20, size=3000)) % 600
    return vectors.astype(np.float32), np.unique(np.stack([first, second], 1), axis=0)


def test_alignment_finds_what_related_items_share_on_pairs_that_it_has_not_seen() -> None:
    vectors, pairs = related()
    found = align(vectors, pairs, AlignmentConfig(steps=60, learning_rate=2e-2))
    assert found.recall_after > found.recall_before + 0.2
    assert found.trained_on + found.held_out == len(pairs)
    again = align(vectors, pairs, AlignmentConfig(steps=60, learning_rate=2e-2))
    assert np.array_equal(found.apply(vectors), again.apply(vectors))


def test_without_steps_the_vectors_lose_their_mean_alone() -> None:
    vectors, pairs = related()
    found = align(vectors, pairs, AlignmentConfig(steps=0))
    aligned = found.apply(vectors)
    np.testing.assert_allclose(aligned * found.scale + found.mean, vectors, atol=1e-4)


def test_pair_recall_counts_neighbours_by_cosine_without_the_item_itself() -> None:
    vectors = np.array([[1, 0], [1, 0.1], [1, 0.5], [0, 1]], np.float32)
    pairs = np.array([[0, 1], [0, 2], [0, 3]])
    assert pair_recall(vectors, pairs, depth=1) == pytest.approx(1 / 3)
    assert pair_recall(vectors, pairs, depth=2) == pytest.approx(2 / 3)


def test_too_few_pairs_and_wrong_numbers_are_refused() -> None:
    vectors, pairs = related()
    with pytest.raises(InputError, match=r"--aligned: 99 .*too few"):
        align(vectors, pairs[:99], AlignmentConfig())
    with pytest.raises(InputError, match=r"align\.temperature"):
        align(vectors, pairs, AlignmentConfig(temperature=0))
