"""JS@K: term sets, both readings, with and without the truth."""

from __future__ import annotations

import numpy as np
import pytest

from karma_ray.metrics.semantic import TermMatrix, terms, without_truth

TITLES = ["Red Cotton Shirt", "red wool shirt, striped", "The mug", "...", "blue jeans (2.5 oz)"]


def test_terms_are_lowercase_without_punctuation_and_keep_stop_words() -> None:
    assert terms("The Red-Mug, 2.5 oz & a_b!") == ["the", "red", "mug", "2.5", "oz", "a", "b"]
    assert terms("...") == terms("") == []


def test_chinese_is_cut_into_words() -> None:
    found = terms("红色 Nike 运动鞋，2双")
    assert "nike" in found and "红色" in found and "，" not in found
    assert len(found) > 3


def jaccard(left: set[str], right: set[str]) -> float:
    return len(left & right) / len(left | right) if left | right else 0.0


@pytest.mark.parametrize("mode", ["per_item", "pooled"])
def test_the_sparse_form_equals_the_definition(mode) -> None:
    generator = np.random.default_rng(0)
    words = [f"w{number}" for number in range(12)]
    titles = [" ".join(generator.choice(words, size=generator.integers(0, 6))) for _ in range(30)]
    truths = generator.integers(0, 30, size=9)
    retrieved = np.stack([generator.permutation(30)[:7] for _ in truths])
    sets = [set(terms(title)) for title in titles]
    values = TermMatrix.from_titles(titles).jaccard(truths, retrieved, mode)
    for value, truth, row in zip(values, truths, retrieved, strict=True):
        if mode == "per_item":
            expected = np.mean([jaccard(sets[truth], sets[item]) for item in row])
        else:
            expected = jaccard(sets[truth], set().union(*(sets[item] for item in row)))
        assert value == pytest.approx(expected, abs=1e-12)


def test_the_golden_pair() -> None:
    matrix = TermMatrix.from_titles(TITLES)
    # {red cotton shirt} against {red wool shirt striped}: 2 of 5; against {the mug}: 0.
    assert matrix.jaccard(np.array([0]), np.array([[1, 2]])).tolist() == [0.2]
    assert matrix.jaccard(np.array([0]), np.array([[1, 2]]), "pooled").tolist() == [2 / 7]


def test_an_unknown_truth_an_empty_title_and_an_empty_list_give_zero() -> None:
    matrix = TermMatrix.from_titles(TITLES)
    assert matrix.jaccard(np.array([-1, 3]), np.array([[0, 1], [3, 3]])).tolist() == [0.0, 0.0]
    assert matrix.jaccard(np.array([0]), np.zeros((1, 0), dtype=np.int64)).tolist() == [0.0]
    assert TermMatrix.from_titles(["!", "?"]).jaccard(np.array([0]), np.array([[1]])) == [0.0]


def test_the_truth_is_removed_before_the_list_is_cut() -> None:
    retrieved = np.array([[7, 3, 9], [1, 2, 3]])
    assert without_truth(np.array([3, 8]), retrieved).tolist() == [[7, 9], [1, 2]]
