"""Queries, missing queries and wrong settings of the user decoder."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from karma_ray.errors import InputError
from karma_ray.model.backbone import build_tiny
from karma_ray.model.config import UserDecoderConfig
from karma_ray.model.user_decoder import UserDecoder, history_means
from tests import tiny


def _h(model: torch.nn.Module, **changes: float) -> tuple[torch.Tensor, torch.Tensor]:
    batch = tiny.batch(**changes)
    items = model.encode_items(batch.item_tokens, batch.item_lengths)
    return model.interest(batch, items), batch


@pytest.mark.parametrize("layout", ["interleaved", "items_only"])
def test_raw_query_tokens_need_the_query_last_layout(layout: str) -> None:
    with pytest.raises(InputError, match="query_last") as caught:
        tiny.model(layout, "tokens")
    assert caught.value.field == "model.user_decoder.query_mode"
    assert "embed_pool" in str(caught.value)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(InputError, match="prompt"):
        UserDecoder(build_tiny(tiny.BODY, 300, 0), UserDecoderConfig(prompt=""), [])


@pytest.mark.parametrize(
    ("layout", "query_mode"), [v for v in tiny.VARIANTS if v[0] != "items_only"]
)
def test_a_dropped_query_trains_the_no_query_vector(layout: str, query_mode: str) -> None:
    model = tiny.model(layout, query_mode).interest
    for share, reached in ((1.0, True), (0.0, query_mode == "none")):
        h, batch = _h(model, drop_query=share)
        found = tiny.gradients(model, h[batch.step_mask].pow(3).sum())
        moved = found.get("user_decoder.no_query", torch.zeros(1)).abs().sum() > 0
        assert bool(moved) == reached


@pytest.mark.parametrize("layout", ["interleaved", "query_last", "items_only"])
def test_without_any_query_h_is_finite_and_so_are_its_gradients(layout: str) -> None:
    model = tiny.model(layout).interest
    h, batch = _h(model, drop_query=1.0)
    assert h.isfinite().all()
    found = tiny.gradients(model, h[batch.step_mask].pow(3).sum())
    assert all(gradient.isfinite().all() for gradient in found.values())


def test_with_every_query_missing_embed_pool_is_no_query_mode() -> None:
    pooled, none = (
        tiny.model(query_mode="embed_pool").interest,
        tiny.model(query_mode="none").interest,
    )
    none.load_state_dict(pooled.state_dict(), strict=False)
    torch.testing.assert_close(_h(pooled, drop_query=1.0)[0], _h(none, drop_query=0.0)[0])


def test_the_read_out_starts_as_the_identity() -> None:
    body = build_tiny(tiny.BODY, 300, 0)
    decoder = UserDecoder(body, UserDecoderConfig(), [5, 6])
    assert torch.equal(decoder.readout.weight, torch.eye(32))


def test_a_query_encoder_reads_queries_with_the_item_encoder() -> None:
    model = tiny.model("query_last", "encoder").interest
    batch = tiny.batch()
    found = model.encoded_queries(batch.query_tokens, batch.query_lengths)
    for v in range(1, len(batch.query_lengths)):
        length = int(batch.query_lengths[v])
        closed = torch.cat([batch.query_tokens[v, :length], torch.tensor([model.end_of_text])])
        alone = model.encode_items(closed[None], torch.tensor([length + 1]))[0]
        torch.testing.assert_close(found[v], alone, atol=1e-5, rtol=1e-5)


def test_only_the_query_embedding_of_the_mode_is_built() -> None:
    names = {mode: dict(tiny.model("query_last", mode).named_parameters()) for mode in
             ("embed_pool", "tokens", "encoder", "none")}  # fmt: skip
    for mode, found in names.items():
        built = any("query_embedding" in name for name in found)
        assert built == (mode == "embed_pool")


# --- the words of the history ----------------------------------------------------------------


def test_the_mean_is_of_earlier_items_outside_the_page() -> None:
    batch = tiny.batch()
    items = torch.randn(len(batch.item_rows), 32, generator=torch.Generator().manual_seed(0))
    found = history_means(batch, items)
    for b in range(batch.num_windows):
        for t in range(batch.step_mask.shape[1]):
            seen = [
                items[batch.item_index[b, k]]
                for k in range(t)
                if batch.item_mask[b, k] and batch.group[b, k] != batch.group[b, t]
            ]
            mean = torch.stack(seen).mean(0) if seen else torch.zeros(32)
            scale = mean.pow(2).mean().sqrt() if seen else torch.ones(())
            torch.testing.assert_close(found[b, t], mean / scale, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("layout", "query_mode"), tiny.VARIANTS)
def test_neither_the_future_nor_the_page_is_in_h(layout: str, query_mode: str) -> None:
    model, batch = tiny.model(layout, query_mode, lexical=6).interest, tiny.batch()
    model.item_encoder.words.fit(*tiny.item_tokens())
    items = model.encode_items(batch.item_tokens, batch.item_lengths).detach()
    changed = torch.randn(items.shape, generator=torch.Generator().manual_seed(1))
    before, other = model.interest(batch, items), torch.cat([items, changed])
    for step in range(batch.step_mask.shape[1]):
        # all items from this step's page on are others
        same = batch.group == batch.group[:, step : step + 1]
        late = same | (torch.arange(same.shape[1]) >= step)
        moved = replace(batch, item_index=batch.item_index + late * len(items))
        after = model.interest(moved, other)
        real = batch.step_mask[:, step]
        torch.testing.assert_close(after[real, step], before[real, step], atol=1e-5, rtol=1e-5)
    first = replace(batch, item_index=batch.item_index.clone())
    first.item_index[:, 0] += len(items)
    reached = (model.interest(first, other) - before).abs().amax(-1) > 1e-3
    outside = batch.step_mask & (batch.group != batch.group[:, :1])
    assert torch.equal(reached & outside, outside)
