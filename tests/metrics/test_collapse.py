"""Collapse probes against their closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from karma_ray.metrics.collapse import (
    effective_rank,
    label_probe,
    linear_cka,
    mean_cosine,
    words_probe,
)


@pytest.mark.parametrize("size", [1, 4, 17])
def test_the_identity_has_full_rank_and_no_cosine(size: int) -> None:
    assert effective_rank(torch.eye(size)) == pytest.approx(size, rel=1e-5)
    assert mean_cosine(torch.eye(size)) == pytest.approx(0.0, abs=1e-7)


def test_constant_rows_have_rank_one_and_cosine_one() -> None:
    rows = torch.full((9, 5), 0.3)
    assert effective_rank(rows) == pytest.approx(1.0, abs=1e-3)
    assert mean_cosine(rows) == pytest.approx(1.0, abs=1e-6)


def test_effective_rank_of_known_singular_values() -> None:
    rows = torch.diag(torch.tensor([3.0, 1.0]))
    entropy = -(0.75 * torch.tensor(0.75).log() + 0.25 * torch.tensor(0.25).log())
    assert effective_rank(rows) == pytest.approx(float(entropy.exp()), rel=1e-6)


def test_mean_cosine_equals_the_mean_over_pairs() -> None:
    rows = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))
    unit = torch.nn.functional.normalize(rows, dim=1)
    cosines = unit @ unit.T
    expected = (cosines.sum() - cosines.trace()) / (12 * 11)
    assert mean_cosine(rows) == pytest.approx(float(expected), abs=1e-6)
    assert mean_cosine(5 * rows) == pytest.approx(mean_cosine(rows), abs=1e-6)


def test_cka_ignores_rotation_scale_and_shift_and_sees_independence() -> None:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(400, 6, generator=generator)
    rotation, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator))
    assert linear_cka(rows, 3 * rows @ rotation + 2) == pytest.approx(1.0, abs=1e-5)
    assert linear_cka(rows, torch.randn(400, 3, generator=generator)) < 0.05


def test_degenerate_input_gives_zero_and_never_nan() -> None:
    assert effective_rank(torch.zeros(4, 3)) == 0.0
    assert effective_rank(torch.zeros(0, 3)) == 0.0
    assert mean_cosine(torch.ones(1, 3)) == 0.0
    assert linear_cka(torch.ones(4, 3), torch.eye(4)) == 0.0


def test_half_precision_and_gradients_are_accepted() -> None:
    rows = torch.eye(4, dtype=torch.bfloat16, requires_grad=True)
    assert effective_rank(rows) == pytest.approx(4.0, rel=1e-4)
    assert mean_cosine(rows) == 0.0


def _labelled(spread: float, num: int = 240) -> tuple[torch.Tensor, list[str | None], list[int]]:
    """Vectors around one of four corners; every text is there twice."""
    generator = torch.Generator().manual_seed(0)
    kinds = torch.arange(num) // 2 % 4
    vectors = torch.eye(4)[kinds] + spread * torch.randn(num, 4, generator=generator)
    return vectors, [f"label {kind}" for kind in kinds.tolist()], [n // 2 for n in range(num)]


def test_the_probe_reads_a_label_that_is_there_and_not_one_that_is_not() -> None:
    vectors, labels, groups = _labelled(0.1)
    found = label_probe(vectors, labels, groups, seed=0)
    assert found is not None
    assert (found.accuracy, found.num_labels) == (100.0, 4)
    assert found.num_tested == pytest.approx(0.3 * 240, abs=2)
    noise = torch.randn(len(vectors), 4, generator=torch.Generator().manual_seed(1))
    blind = label_probe(noise, labels, groups, seed=0)
    assert blind is not None and blind.accuracy < 50
    constant = label_probe(torch.ones(len(vectors), 4), labels, groups, seed=0)
    assert constant is not None and constant.accuracy == pytest.approx(constant.majority)


def test_the_probe_cannot_be_passed_by_remembering_a_text() -> None:
    """Two copies of a text stand on one side: a vector that names the text is no use."""
    _, labels, groups = _labelled(0.1)
    names = torch.eye(120)[torch.tensor(groups)]
    found = label_probe(names, labels, groups, seed=0)
    assert found is not None and found.accuracy < 50


def test_rare_and_missing_labels_are_left_out_of_the_probe() -> None:
    vectors, labels, groups = _labelled(0.1)
    some: list[str | None] = [None if n % 5 == 0 else label for n, label in enumerate(labels)]
    some[1:4] = ["rare"] * 3
    found = label_probe(vectors, some, groups, seed=0)
    assert found is not None and found.num_labels == 4
    assert label_probe(vectors, ["one"] * len(labels), groups, seed=0) is None
    assert label_probe(vectors, [None] * len(labels), groups, seed=0) is None


def words_and_users(num: int = 600) -> tuple[np.ndarray, list[str]]:
    generator = np.random.default_rng(0)
    return generator.random((num, 6)) < 0.4, [f"u{n // 2}" for n in range(num)]


def test_words_that_the_vectors_hold_are_read_and_noise_is_not() -> None:
    words, users = words_and_users()
    mixed = torch.from_numpy(words.astype(np.float32)) @ torch.randn(
        6, 16, generator=torch.Generator().manual_seed(0)
    )
    held = words_probe(mixed, words, users, seed=0)
    noise = torch.randn(len(words), 16, generator=torch.Generator().manual_seed(1))
    none = words_probe(noise, words, users, seed=0)
    assert held is not None and held > 99.0
    assert none is not None and -10.0 < none < 2.0
    half = words_probe(mixed[:, :2], words, users, seed=0)  # two of six directions
    assert half is not None and 15.0 < half < 60.0


def test_what_a_user_alone_tells_is_not_read() -> None:
    """Users stand on one side of the split: their numbers are of no use on the other."""
    words, users = words_and_users()
    words = np.repeat(words[::2], 2, axis=0)  # both rows of a user have the same words
    whose = torch.from_numpy(np.equal.outer(np.array(users), np.unique(users)).astype(np.float32))
    found = words_probe(whose, words, users, seed=0)
    assert found is not None and found < 2.0


def test_words_that_never_vary_are_no_probe() -> None:
    vectors = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    users = [f"u{n}" for n in range(40)]
    assert words_probe(vectors, np.ones((40, 2), bool), users, seed=0) is None
    assert words_probe(vectors[:1], np.ones((1, 2), bool), users[:1], seed=0) is None
