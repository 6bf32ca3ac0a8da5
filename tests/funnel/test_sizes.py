"""Sizes of the stages: the paper's on a large catalogue, shares of a small one."""

from __future__ import annotations

from karma_ray.funnel.sizes import Sizes


def test_a_large_catalogue_has_the_papers_numbers() -> None:
    sizes = Sizes.of(10_000_000)
    assert sizes == Sizes(recalled=5000, pool=5000, kept=500)
    assert (sizes.recall_metric, sizes.prerank_metric) == ("HR@5000", "HR@500")


def test_a_small_catalogue_has_the_same_shares() -> None:
    sizes = Sizes.of(1200)
    assert sizes == Sizes(recalled=24, pool=240, kept=24)
    assert (sizes.recall_metric, sizes.prerank_metric) == ("HR@2%", "HR@10%")


def test_a_catalogue_between_them_has_both() -> None:
    sizes = Sizes.of(105_542)
    assert sizes == Sizes(recalled=2111, pool=5000, kept=500)
    assert (sizes.recall_metric, sizes.prerank_metric) == ("HR@2%", "HR@500")


def test_a_tiny_catalogue_keeps_something() -> None:
    assert Sizes.of(3) == Sizes(recalled=1, pool=1, kept=1)
