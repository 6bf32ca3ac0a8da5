"""Collisions, use and errors against arithmetic by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from karma_ray.codes.codebooks import Codebooks
from karma_ray.codes.config import CodesConfig
from karma_ray.codes.quality import (
    Tally,
    codebook_use,
    coded,
    collisions,
    equal_vectors,
    quality,
)


def test_collisions_are_items_that_share_their_whole_code() -> None:
    codes = np.array([[0, 1], [0, 1], [1, 0], [0, 0], [1, 1], [0, 1]], np.int32)
    rate, per_code = collisions(codes, [2, 2])
    assert rate == pytest.approx(3 / 6)  # the three items with code (0, 1)
    assert per_code == pytest.approx(6 / 4)


def test_codes_of_large_levels_are_told_apart() -> None:
    size = 2**20
    codes = np.array([[size - 1, 0, 0], [0, size - 1, 0], [0, 0, size - 1]], np.int32)
    assert collisions(codes, [size] * 3) == (0.0, 1.0)


def test_use_is_the_share_of_codes_and_the_exponential_of_their_entropy() -> None:
    used, perplexity = codebook_use(np.array([0, 0, 1, 3], np.int32), 8)
    assert used == pytest.approx(3 / 8)
    assert perplexity == pytest.approx(math.exp(0.5 * math.log(2) + 2 * 0.25 * math.log(4)))
    assert codebook_use(np.arange(8, dtype=np.int32), 8) == pytest.approx((1.0, 8.0))


def test_errors_are_shares_of_the_variance_and_parts_add_up() -> None:
    vectors = np.random.default_rng(0).normal(size=(300, 6)).astype(np.float32)
    books = Codebooks.fit(vectors, CodesConfig(levels=2, codewords=4, fsq_levels=(3, 3)))
    codes, whole = coded(books, vectors)
    found = quality(whole, codes, books.config.sizes)
    rest = vectors - books.decode(codes)
    variance = ((vectors - vectors.mean(0)) ** 2).sum()
    assert found.errors[-1] == pytest.approx((rest**2).sum() / variance, rel=1e-4)
    decoded = books.decode(codes)
    lengths = np.linalg.norm(vectors, axis=1) * np.linalg.norm(decoded, axis=1)
    assert found.mean_cosine == pytest.approx(((vectors * decoded).sum(1) / lengths).mean())
    parts = Tally.sum(coded(books, part)[1] for part in np.split(vectors, [7, 150]))
    assert parts.items == whole.items and parts.variance == pytest.approx(whole.variance)
    assert parts.square_errors == pytest.approx(whole.square_errors, rel=1e-5)


def test_items_with_the_same_vector_are_counted() -> None:
    vectors = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    vectors[3] = vectors[1]
    assert equal_vectors(vectors) == pytest.approx(2 / 5)
