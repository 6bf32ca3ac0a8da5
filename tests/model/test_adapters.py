"""Soft tokens stand at the scale of the LLM's rows; the score is one function."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from karma_ray.model.adapters import Score, SoftToken, rms_normalize
from karma_ray.model.config import ScoreConfig

KINDS = ("rms_dot", "dot", "cos_learned")


def _vectors(seed: int, count: int = 6, width: int = 16) -> Tensor:
    return 3 * torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def _scores(score: Score, h: Tensor, e: Tensor) -> Tensor:
    return score.query_vectors(h) @ score.index_vectors(e).T


def test_rms_normalize_gives_unit_root_mean_square_and_keeps_the_direction() -> None:
    x = _vectors(0)
    normal = rms_normalize(x)
    torch.testing.assert_close(normal.square().mean(-1), torch.ones(6), atol=1e-4, rtol=0)
    torch.testing.assert_close(functional.cosine_similarity(normal, x), torch.ones(6))
    assert rms_normalize(torch.zeros(1, 4)).tolist() == [[0.0] * 4]


def test_rms_normalize_computes_in_float32() -> None:
    assert rms_normalize(_vectors(0).bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("normalize", [True, False])
def test_soft_tokens_have_the_scale_of_the_embedding_rows(normalize: bool) -> None:
    rows = 0.02 * torch.randn(100, 16, generator=torch.Generator().manual_seed(1))
    soft = SoftToken(16, rows, normalize=normalize)(_vectors(0))
    expected = rows.square().mean().sqrt()
    torch.testing.assert_close(soft.square().mean(-1).sqrt(), expected.expand(6), rtol=1e-3, atol=0)


def test_a_normalising_soft_token_ignores_the_length_of_its_input() -> None:
    token = SoftToken(16, _vectors(1), normalize=True)
    torch.testing.assert_close(token(10 * _vectors(0)), token(_vectors(0)))


def test_rms_dot_is_32_times_the_cosine_at_every_width() -> None:
    for width in (8, 64):
        h, e = _vectors(0, width=width), _vectors(1, width=width)
        score = Score(ScoreConfig(), width)
        cosine = functional.cosine_similarity(h[:, None], e[None], dim=-1)
        torch.testing.assert_close(_scores(score, h, e), 32 * cosine, atol=1e-4, rtol=1e-5)
        assert not list(score.parameters())


def test_the_constant_scale_can_be_set() -> None:
    h, e = _vectors(0), _vectors(1)
    doubled = _scores(Score(ScoreConfig(scale=64.0), 16), h, e)
    torch.testing.assert_close(doubled, 2 * _scores(Score(ScoreConfig(), 16), h, e))


def test_cos_learned_starts_at_one_over_007_and_never_passes_100() -> None:
    score = Score(ScoreConfig(kind="cos_learned"), 16)
    h = _vectors(0)
    assert _scores(score, h, h).diagonal().tolist() == pytest.approx([1 / 0.07] * 6, rel=1e-4)
    with torch.no_grad():
        score.log_scale.fill_(math.log(1000))
    assert _scores(score, h, h).diagonal().tolist() == pytest.approx([100.0] * 6, rel=1e-4)


def test_dot_is_the_plain_product_under_learned_norms() -> None:
    score = Score(ScoreConfig(kind="dot"), 16)
    h, e = _vectors(0), _vectors(1)
    torch.testing.assert_close(
        _scores(score, h, e), rms_normalize(h) @ rms_normalize(e).T, atol=1e-4, rtol=1e-4
    )
    with torch.no_grad():
        score.interest_norm.weight.mul_(2)
        score.item_norm.weight.mul_(3)
    expected = 6 * rms_normalize(h) @ rms_normalize(e).T
    torch.testing.assert_close(_scores(score, h, e), expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_do_not_depend_on_the_length_of_h_or_e(kind: str) -> None:
    score = Score(ScoreConfig(kind=kind), 16)  # type: ignore[arg-type]
    h, e = _vectors(0), _vectors(1)
    torch.testing.assert_close(_scores(score, 7 * h, e / 5), _scores(score, h, e))


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_float32_whatever_comes_in(kind: str) -> None:
    score = Score(ScoreConfig(kind=kind), 16)  # type: ignore[arg-type]
    assert _scores(score, _vectors(0).bfloat16(), _vectors(1).bfloat16()).dtype == torch.float32
