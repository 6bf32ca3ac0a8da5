"""Attention sinks (method 1.13) against golden values, brute force and planted maps."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from karma_ray.metrics.attention import (
    MEASURES,
    column_means,
    content_columns,
    row_entropies,
    sink_measures,
)

GOLDEN = torch.tensor(
    [[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0.1, 0.8, 0.1, 0], [0.1, 0.7, 0.1, 0.1]], dtype=torch.float64
)


def random_maps(*shape: int, seed: int = 0) -> Tensor:
    """Causal attention [*shape, T, T], T the last number."""
    size = shape[-1]
    scores = 3 * torch.randn(*shape, size, generator=torch.Generator().manual_seed(seed))
    hidden = ~torch.ones(size, size, dtype=torch.bool).tril()
    return scores.masked_fill(hidden, -torch.inf).softmax(-1)


def nothing(samples: int, size: int) -> Tensor:
    return torch.zeros(samples, size, dtype=torch.bool)


def test_golden_column_means() -> None:
    assert column_means(GOLDEN).tolist() == pytest.approx([0.425, 2 / 3, 0.1, 0.1])


def test_golden_row_entropies() -> None:
    first, *others = row_entropies(GOLDEN).tolist()
    assert math.isnan(first)
    assert others == pytest.approx([1.0, 0.581672, 0.678390], abs=1e-6)


def test_golden_measures() -> None:
    found = sink_measures(GOLDEN[None, None], content_columns(nothing(1, 4)))
    assert found["sink_first"].item() == 100  # .425
    assert found["content_sink"].item() == 100  # the second column, .667
    assert found["stripe_mass"].item() == pytest.approx(100 * (0.5 + 0.8 + 0.7) / 4)
    assert found["row_entropy"].item() == pytest.approx((1.0 + 0.581672 + 0.678390) / 3, abs=1e-6)
    mean_row = [1.7 / 4, 2.0 / 4, 0.2 / 4, 0.1 / 4]
    entropy = -sum(p * math.log(p) for p in mean_row)
    assert found["profile_entropy"].item() == pytest.approx(entropy, abs=1e-6)


def test_the_bound_is_exclusive() -> None:
    content = content_columns(nothing(1, 4))
    for epsilon, expected in ((0.66, 100.0), (0.67, 0.0)):
        found = sink_measures(GOLDEN[None, None], content, epsilon=epsilon)
        assert found["content_sink"].item() == expected


def test_column_means_equal_the_sum_written_out() -> None:
    maps = random_maps(2, 3, 7)
    alpha = column_means(maps)
    for k in range(7):
        expected = sum(maps[1, 2, i, k] for i in range(k, 7)) / (7 - k)
        assert alpha[1, 2, k].item() == pytest.approx(float(expected), rel=1e-5)


def test_content_is_not_the_first_nor_template_nor_late() -> None:
    template = nothing(2, 9)
    template[1, 2] = True
    assert content_columns(template).tolist() == [
        [False, True, True, True, False, False, False, False, False],
        [False, True, False, True, False, False, False, False, False],
    ]


def test_a_prompt_is_no_content_and_halves_nothing() -> None:
    found = content_columns(nothing(1, 11), num_prompt=3)[0].tolist()
    assert found == [False] * 3 + [True] * 4 + [False] * 4


@pytest.mark.parametrize("column", [0, 2, 5, 8])
def test_only_a_planted_stripe_on_early_content_is_a_content_sink(column: int) -> None:
    size = 10
    rows = torch.eye(size)
    rows[column:] = 0.1 / size
    rows[column:, column] = 0.9
    rows = (rows.tril() / rows.tril().sum(-1, keepdim=True))[None, None]
    template = nothing(1, size)
    template[0, 5] = True
    found = sink_measures(rows, content_columns(template))
    assert found["content_sink"].item() == (100.0 if column == 2 else 0.0)
    assert found["sink_first"].item() == (100.0 if column == 0 else 0.0)


def test_a_previous_token_head_is_no_sink() -> None:
    size = 12
    rows = torch.diag(torch.ones(size - 1), -1)
    rows[0, 0] = 1.0
    found = sink_measures(rows[None, None], content_columns(nothing(1, size)))
    assert found["content_sink"].item() == 0


def test_a_stripe_lowers_both_entropies() -> None:
    content = content_columns(nothing(1, 16))
    even = torch.ones(16, 16).tril()
    even = even / even.sum(-1, keepdim=True)
    striped = even.clone()
    striped[3:] *= 0.1
    striped[3:, 3] += 0.9
    before, after = (sink_measures(m[None, None], content) for m in (even, striped))
    assert before["row_entropy"].item() == pytest.approx(1.0)
    for name in ("row_entropy", "profile_entropy"):
        assert after[name] < before[name]
    assert after["stripe_mass"] > before["stripe_mass"]


def test_rows_that_are_padding_do_not_count() -> None:
    maps = random_maps(1, 2, 8)
    template = nothing(1, 8)
    small = sink_measures(maps, content := content_columns(template))
    wide = torch.zeros(1, 2, 11, 11)
    wide[..., :8, :8] = maps
    wide[..., 8:, :] = 1 / 11  # what a padded row holds is anybody's guess
    visible = torch.zeros(1, 11, 11, dtype=torch.bool)
    visible[:, :8, :8] = torch.ones(8, 8, dtype=torch.bool).tril()
    padded = sink_measures(wide, torch.nn.functional.pad(content, (0, 3)), visible)
    for name in MEASURES:
        assert padded[name].tolist()[0] == pytest.approx(small[name].tolist()[0]), name


def test_a_sample_without_content_says_nothing_of_content() -> None:
    found = sink_measures(random_maps(1, 1, 6), nothing(1, 6))
    assert math.isnan(found["content_sink"].item()) and math.isnan(found["stripe_mass"].item())
    assert not math.isnan(found["row_entropy"].item())
