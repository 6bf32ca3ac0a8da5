"""Collapse probes against their closed forms."""

from __future__ import annotations

import pytest
import torch

from karma_ray.metrics.collapse import effective_rank, linear_cka, mean_cosine


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
