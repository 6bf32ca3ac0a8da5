"""Queries, missing queries and wrong settings of the user decoder."""

from __future__ import annotations

import pytest
import torch

from karma_ray.errors import InputError
from karma_ray.model.backbone import build_tiny
from karma_ray.model.config import UserDecoderConfig
from karma_ray.model.user_decoder import UserDecoder
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
    found = model._encode_queries(batch)
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
