"""Who sees whom, by perturbation and gradient: the leaks of method 1.3 are exactly zero."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from karma_ray.data.collate import Batch
from karma_ray.model.backbone import run_body
from karma_ray.model.interest import InterestModel
from karma_ray.model.layout import build_layout
from tests import tiny
from tests.model.conftest import Build

PAGES = [0, 0, 1, 2, 2, 2, 3, 4]  # the result page of every step, which is also its hour
IDS = ["i3", "i14", "i8", "i5", "i30", "i21", "i44", "i2"]
every_variant = pytest.mark.parametrize(("layout", "query_mode"), tiny.VARIANTS)


def _batch() -> Batch:
    """A window with result pages of 2, 1, 3, 1 and 1 clicks, and a shorter one."""
    return tiny.batch(
        tiny.sequences(tiny.window(IDS, PAGES), tiny.window(["i7", "i9", "i11"], [0, 1, 1]))
    )


def _items(model: InterestModel, batch: Batch) -> Tensor:
    return model.encode_items(batch.item_tokens, batch.item_lengths).detach()


def _reached(values: Tensor, items: Tensor) -> set[int]:
    """Rows of `items` that a value depends on."""
    (gradient,) = torch.autograd.grad(values.pow(3).sum(), items, retain_graph=True)
    return set(gradient.abs().sum(1).nonzero().flatten().tolist())


# --- items -----------------------------------------------------------------------------------


@every_variant
def test_h_depends_on_the_items_of_earlier_pages_and_on_no_other(
    build: Build, layout: str, query_mode: str
) -> None:
    model, batch = build(layout, query_mode).interest, _batch()
    items = _items(model, batch).requires_grad_()
    h = model.interest(batch, items)
    for b, k in batch.step_mask.nonzero().tolist():
        earlier = batch.item_mask[b] & (batch.group[b] < batch.group[b, k])
        assert _reached(h[b, k], items) == set(batch.item_index[b][earlier].tolist())


@every_variant
@pytest.mark.parametrize("step", [0, 2, 4, 7])
def test_perturbing_an_item_changes_h_after_its_page_only(
    build: Build, layout: str, query_mode: str, step: int
) -> None:
    model, batch = build(layout, query_mode).interest, _batch()
    items = _items(model, batch)
    changed = items.clone()
    changed[batch.item_index[0, step]] = -3 * items[batch.item_index[0, step]]
    with torch.no_grad():
        moved = (model.interest(batch, changed) - model.interest(batch, items)).abs().amax(-1)
    for k, page in enumerate(PAGES):
        assert (moved[0, k] > 0) == (page > PAGES[step])
    assert (moved[1] == 0).all()


@pytest.mark.parametrize(
    ("layout", "query_mode"), [v for v in tiny.VARIANTS if v[0] != "items_only"]
)
def test_the_order_within_a_page_changes_nothing(
    build: Build, layout: str, query_mode: str
) -> None:
    model, batch = build(layout, query_mode).interest, _batch()
    items = _items(model, batch)
    index = batch.item_index.clone()
    index[0, [3, 4, 5]] = batch.item_index[0, [5, 3, 4]]
    with torch.no_grad():
        h = model.interest(batch, items)
        swapped = model.interest(replace(batch, item_index=index), items)
    torch.testing.assert_close(swapped, h, atol=1e-5, rtol=1e-5)


def test_under_items_only_the_steps_of_a_page_share_one_h(build: Build) -> None:
    model, batch = build("items_only", "none").interest, _batch()
    with torch.no_grad():
        h = model.interest(batch, _items(model, batch))[0]
    for first, second in ((0, 1), (3, 4), (4, 5)):
        assert torch.equal(h[first], h[second])


# --- queries ---------------------------------------------------------------------------------


@every_variant
@pytest.mark.parametrize("step", [1, 4])
def test_perturbing_a_query_changes_h_where_the_layout_says(
    build: Build, layout: str, query_mode: str, step: int
) -> None:
    model, batch = build(layout, query_mode).interest, _batch()
    items = _items(model, batch)
    index = batch.query_index.clone()
    index[0, step] = index[0, 7]
    assert index[0, step] != batch.query_index[0, step]
    with torch.no_grad():
        h = model.interest(batch, items)
        moved = (model.interest(replace(batch, query_index=index), items) - h).abs().amax(-1)
    for k, page in enumerate(PAGES):
        blind = query_mode == "none" or layout == "items_only"
        later = layout == "interleaved" and page > PAGES[step]
        assert (moved[0, k] > 0) == (not blind and (k == step or later))
    assert (moved[1] == 0).all()


# --- positions and references ----------------------------------------------------------------


@pytest.mark.parametrize("layout", ["interleaved", "query_last"])
def test_position_ids_are_shared_within_a_page(layout: str) -> None:
    batch = _batch()
    model = tiny.model(layout).interest
    found = model.prefix(batch, _items(model, batch)).layout
    prompt = len(model.user_decoder.prompt)
    queries, items = found.positions[0, prompt::2].tolist(), found.positions[0, prompt + 1 :: 2]
    for slots in (queries, items.tolist()):
        of_page = [{p for p, page in zip(slots, PAGES, strict=True) if page == n} for n in range(5)]
        assert [len(positions) for positions in of_page] == [1] * 5
        assert len(set().union(*of_page)) == 5
    assert found.positions[0].max() < prompt + 2 * len(PAGES)


def test_small_layouts_are_as_drawn() -> None:
    """One prompt slot, then q1 i1 q2 i2: rows see columns."""
    drawn = {
        "interleaved": (["10000", "11000", "11100", "11110", "11111"], [0, 1, 2, 3, 4], [1, 3]),
        "query_last": (["10000", "11000", "10100", "10110", "10101"], [0, 1, 1, 2, 2], [1, 3]),
        "items_only": (["10000", "10000", "10100", "10100", "10101"], [0, 1, 1, 2, 2], [0, 2]),
    }
    ones = torch.ones(1, 2, dtype=torch.bool)
    for kind, (visible, positions, readout) in drawn.items():
        found = build_layout(kind, 1, torch.ones(1, 2).long(), 1, torch.arange(2)[None], ones, ones)
        rows = ["".join(str(int(v)) for v in row) for row in found.visible[0]]
        assert (rows, found.positions[0].tolist(), found.readout[0].tolist()) == (
            visible, positions, readout,
        )  # fmt: skip


@every_variant
def test_without_shared_pages_each_layout_is_a_plain_causal_pass(
    build: Build, layout: str, query_mode: str
) -> None:
    """h_k equals the last state of [prompt, what the layout puts before k] with no mask at all."""
    model = build(layout, query_mode).interest
    batch = tiny.batch(tiny.sequences(tiny.window(IDS[:4])))
    prefix = model.prefix(batch, _items(model, batch))
    prompt = len(model.user_decoder.prompt)
    width = (prefix.embeddings.shape[1] - prompt) // 4 - 1
    head, blocks = prefix.embeddings[0, :prompt], prefix.embeddings[0, prompt:]
    blocks = blocks.view(4, width + 1, -1)
    lengths = batch.query_lengths[batch.query_index[0]] if query_mode == "tokens" else [1] * 4
    with torch.no_grad():
        h = model.interest(batch, _items(model, batch))[0]
        for k in range(4):
            if layout == "interleaved":
                parts = [head, blocks[:k].flatten(0, 1), blocks[k, :1]]
            else:
                parts = [head, blocks[:k, width]]
                if layout == "query_last":
                    parts.append(blocks[k, : lengths[k]])
            state = run_body(model.user_decoder.body, torch.cat(parts)[None])[:, -1]
            expected = torch.nn.functional.rms_norm(
                model.user_decoder.readout(state), state.shape[-1:], eps=1e-6
            )
            torch.testing.assert_close(h[k], expected[0], atol=1e-5, rtol=1e-5)
