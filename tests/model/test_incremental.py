"""An interest read from stored keys and values is the interest of the whole request."""

from __future__ import annotations

import datetime as dt

import pytest
import torch

from karma_ray.data.collate import Collator
from karma_ray.model.incremental import IncrementalReader, Step
from karma_ray.retrieval.requests import HistoryItem, Request, request_table
from tests import tiny

TIMES = [tiny.MONDAY + dt.timedelta(hours=h) for h in (0, 1, 1, 1, 2, 3, 3, 4)]
ROWS = [3, 21, 8, 3, 40, 17, 2, 30]
TEXTS = ["mug", "", "warm scarf", "lamp", "", "boots", "a red chair for the garden", "mug"]
QUERIES = ["boots", "", "a red chair for the garden", "lamp"]


def request_of(size: int, query: str) -> Request:
    past = zip(ROWS[:size], TEXTS[:size], TIMES[:size], strict=True)
    return Request(query, [HistoryItem(f"i{row}", text, at) for row, text, at in past])


def steps_of(size: int, start: int = 0) -> list[Step]:
    return [Step(ROWS[n], TEXTS[n], n > 0 and TIMES[n] == TIMES[n - 1]) for n in range(start, size)]


def reader_of(layout: str, mode: str, lexical: int = 0) -> tuple[IncrementalReader, Collator]:
    model = tiny.model(layout, mode, lexical=lexical).interest.eval()
    collator = tiny.collator()
    items = torch.randn(len(tiny.catalog().item_ids), model.width)
    return IncrementalReader(model, items, collator.encode_queries), collator


@pytest.mark.parametrize(("layout", "mode", "lexical"), [
    *((layout, mode, 0) for layout, mode in tiny.VARIANTS),
    ("interleaved", "embed_pool", 8), ("items_only", "none", 8),
])  # fmt: skip
def test_h_is_that_of_the_whole_request_however_it_was_split(
    layout: str, mode: str, lexical: int
) -> None:
    reader, collator = reader_of(layout, mode, lexical)
    sizes = [0, 1, 3, 8]
    requests = [request_of(size, query) for size, query in zip(sizes, QUERIES, strict=True)]
    batch = collator.requests(request_table(requests))
    whole = reader.interest.last_interest(batch, reader.items[batch.item_rows])
    h, states = reader.read([reader.empty] * 4, [steps_of(size) for size in sizes], QUERIES)
    assert torch.allclose(h, whole, atol=1e-5)
    again, same = reader.read(states, [[]] * 4, QUERIES)
    assert torch.allclose(again, whole, atol=1e-5)
    assert all(a is b for a, b in zip(states, same, strict=True))
    # In two parts, with a cut inside a group, and other requests beside it.
    for cut in range(8):
        _, first = reader.read([reader.empty] * 2, [steps_of(cut), steps_of(5)], ["", "mug"])
        parted, _ = reader.read(first, [steps_of(8, cut), []], [QUERIES[3], "lamp"])
        assert torch.allclose(parted[0], whole[3], atol=1e-5)
