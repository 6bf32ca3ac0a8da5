"""Fitting, encoding and decoding of both kinds."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from karma_ray.codes.codebooks import Codebooks, sample_of
from karma_ray.codes.config import KINDS, CodesConfig
from karma_ray.codes.quality import codebook_use
from karma_ray.errors import InputError

CONFIG = CodesConfig(levels=3, codewords=8, fsq_levels=(4, 5), iterations=10)
kinds = pytest.mark.parametrize("kind", KINDS)


def drawn(count: int = 600, width: int = 12, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    centres = random.normal(size=(10, width))
    noise = 0.3 * random.normal(size=(count, width))
    return (centres[random.integers(10, size=count)] + noise).astype(np.float32)


def fitted(kind: str, **changes: object) -> Codebooks:
    return Codebooks.fit(drawn(), dataclasses.replace(CONFIG, kind=kind, **changes), "b")


@kinds
def test_a_reconstruction_is_the_sum_of_its_levels_and_the_residual_is_the_rest(kind: str) -> None:
    books, vectors = fitted(kind), drawn()
    codes = books.encode(vectors)
    parts = [level.decode(codes[:, place]) for place, level in enumerate(books.levels)]
    np.testing.assert_allclose(books.decode(codes), sum(parts), atol=1e-5)
    *_, (_, residual) = books.steps(vectors)
    np.testing.assert_allclose(books.decode(codes) + residual, vectors, atol=1e-5)


@kinds
def test_every_level_lowers_the_error(kind: str) -> None:
    errors = [float((rest**2).mean()) for _, rest in fitted(kind).steps(drawn())]
    assert errors[0] < float(drawn().var(0).mean())
    assert errors == sorted(errors, reverse=True) and len(set(errors)) == len(errors)


@kinds
def test_codes_lie_within_the_sizes_of_the_levels(kind: str) -> None:
    books = fitted(kind)
    codes = books.encode(drawn())
    assert codes.dtype == np.int32 and codes.shape == (600, 3)
    assert books.config.sizes == [8, 8, 20] == [level.size for level in books.levels]
    assert (codes >= 0).all() and (codes < books.config.sizes).all()
    assert books.config.num_codes == 8 * 8 * 20


@kinds
def test_the_seed_decides_the_codes(kind: str) -> None:
    codes = fitted(kind).encode(drawn())
    assert np.array_equal(codes, fitted(kind).encode(drawn()))
    assert not np.array_equal(codes, fitted(kind, seed=1).encode(drawn()))


@kinds
def test_codes_of_an_item_do_not_depend_on_the_other_items(kind: str) -> None:
    books, vectors = fitted(kind), drawn()
    parts = [books.encode(part) for part in np.split(vectors, [100, 101, 350])]
    assert np.array_equal(np.concatenate(parts), books.encode(vectors))


@kinds
def test_stored_codebooks_give_the_same_codes(kind: str, tmp_path) -> None:
    books = fitted(kind)
    books.save(str(tmp_path))
    loaded = Codebooks.load(str(tmp_path))
    assert loaded.config == books.config and loaded.bundle == "b"
    assert np.array_equal(loaded.encode(drawn(seed=1)), books.encode(drawn(seed=1)))
    codes = books.encode(drawn())
    assert np.array_equal(loaded.decode(codes), books.decode(codes))


def test_few_large_residuals_do_not_push_the_others_into_one_code() -> None:
    vectors = np.random.default_rng(0).normal(size=(2000, 4)).astype(np.float32)
    vectors[:20] *= 1000
    books = Codebooks.fit(vectors, CodesConfig(levels=1, fsq_levels=(8, 5)))
    codes = books.encode(vectors)
    used, perplexity = codebook_use(codes[:, 0], 40)
    assert used == 1 and perplexity > 30


def test_only_the_last_level_tells_the_kinds_apart() -> None:
    ours, rival = fitted("res_kmeans_fsq").encode(drawn()), fitted("rq_kmeans").encode(drawn())
    assert np.array_equal(ours[:, :2], rival[:, :2])
    assert not np.array_equal(ours[:, 2], rival[:, 2])


def test_a_sample_is_drawn_by_the_seed_and_keeps_the_order() -> None:
    vectors = np.arange(50, dtype=np.float32)[:, None]
    config = CodesConfig(sample=10, seed=3)
    found = sample_of(vectors, config)[:, 0]
    assert len(found) == 10 and (np.diff(found) > 0).all()
    assert np.array_equal(found, sample_of(vectors, config)[:, 0])
    assert len(sample_of(vectors, CodesConfig(sample=50))) == 50


def test_what_cannot_be_fitted_is_refused_with_the_field() -> None:
    with pytest.raises(InputError, match=r"codes\.codewords .* there are 5"):
        Codebooks.fit(drawn(5), CONFIG)
    with pytest.raises(InputError, match=r"codes\.fsq_levels.*more dimensions"):
        Codebooks.fit(drawn(width=1), CONFIG)
    with pytest.raises(InputError, match="width of the embeddings: 3"):
        fitted("rq_kmeans").encode(drawn(width=3))


@pytest.mark.parametrize(
    ("field", "value"),
    [("kind", "pq"), ("levels", 0), ("codewords", 1), ("fsq_levels", (1,)), ("fsq_levels", ())],
)
def test_a_choice_out_of_range_is_refused_with_its_name(field: str, value: object) -> None:
    with pytest.raises(InputError, match=rf"codes\.{field}"):
        CodesConfig(**{field: value}).check()


def test_more_codes_than_an_integer_can_count_are_refused() -> None:
    with pytest.raises(InputError, match=r"2\^62"):
        CodesConfig(levels=16).check()
