"""Training clicks and the popularity floor."""

from __future__ import annotations

import pyarrow as pa

from karma_ray.baselines.popularity import (
    PopularityRanker,
    click_shares,
    training_clicks,
    warm_mask,
)
from tests import tiny


def test_each_training_click_counts_once_and_context_does_not(catalog, sequences) -> None:
    clicks = dict(zip(catalog.item_ids, training_clicks(sequences, catalog), strict=True))
    assert clicks == {"a": 1, "b": 3, "c": 0, "d": 0, "e": 0, "f": 0, "g": 0, "h": 0}


def test_context_makes_an_item_warm(catalog, sequences) -> None:
    warm = warm_mask(sequences, catalog)
    assert {catalog.item_ids[row] for row in warm.nonzero()[0]} == {"a", "b", "e"}


def test_chunks_of_the_table_change_nothing(catalog, sequences) -> None:
    chunked = pa.concat_tables([sequences.slice(0, 1), sequences.slice(1)])
    assert (training_clicks(chunked, catalog) == training_clicks(sequences, catalog)).all()


def test_everybody_gets_the_most_clicked_items_first(catalog, sequences, requests_table) -> None:
    ranker = PopularityRanker(training_clicks(sequences, catalog))
    scores = ranker.score(requests_table([("red", []), (None, ["a"])]))
    assert scores.shape == (2, 8) and (scores[0] == scores[1]).all()
    assert catalog.item_ids[scores[0].argmax()] == "b"


def test_no_sequence_is_no_click(catalog, sequences) -> None:
    assert training_clicks(sequences.slice(0, 0), catalog).sum() == 0


def test_items_of_equal_content_share_their_clicks() -> None:
    """And one that nobody clicked counts as clicked once: its share is not 0."""
    rows = tiny.sequences(
        tiny.window(["i0", "i1", "copy"], loss=[True, True, True]),
        tiny.window(["i2", "i0"], loss=[False, True]),
    )
    shares = dict(zip(tiny.catalog().item_ids, click_shares(rows, tiny.catalog()), strict=True))
    assert shares["i0"] == shares["copy"] == 0.75
    assert shares["i1"] == shares["i2"] == shares["i47"] == 0.25


def test_without_clicks_every_share_is_still_a_chance() -> None:
    shares = click_shares(tiny.sequences(), tiny.catalog())
    assert (shares == 1).all() and shares.dtype == "float32"
