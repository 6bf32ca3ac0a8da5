"""Recorded attention is transformers' own eager attention, and what the layout says is seen."""

from __future__ import annotations

import pytest
import torch

from karma_ray.model.attention_maps import item_attention, recorded, user_attention
from karma_ray.model.backbone import stock_body, token_embeddings
from karma_ray.model.layers import Attention
from karma_ray.model.lora import adapt
from tests import tiny


def _tokens(count: int = 5, length: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, lengths = tiny.item_tokens()
    rows = [row for row in range(len(lengths)) if lengths[row] >= length][:count]
    return torch.from_numpy(tokens[rows, :length]).long(), torch.full((len(rows),), length)


@torch.no_grad()
def test_item_maps_are_those_of_stock_eager_attention() -> None:
    encoder = tiny.model().interest.item_encoder.eval()
    tokens, lengths = _tokens()
    maps = item_attention(encoder, tokens, lengths)
    stock = stock_body(encoder.body, "eager")
    embeddings = token_embeddings(encoder.body)[tokens]
    expected = stock(inputs_embeds=embeddings, output_attentions=True).attentions
    assert len(maps) == len(expected) == 2
    for ours, theirs in zip(maps, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_recording_changes_no_result_and_ends() -> None:
    encoder = tiny.model(instruction="a thing:").interest.item_encoder.eval()
    tokens, lengths = _tokens()
    before = encoder(tokens, lengths)
    with recorded(encoder.body) as maps:
        during = encoder(tokens, lengths)
    after = encoder(tokens, lengths)
    assert torch.equal(before, during) and torch.equal(before, after)
    assert len(maps) == 2  # not four: the last pass was not recorded
    assert maps[0].shape[-1] == tokens.shape[1] + len(encoder.instruction)
    assert not any(
        part._forward_pre_hooks for part in encoder.modules() if isinstance(part, Attention)
    )


@torch.no_grad()
def test_adapters_are_part_of_the_maps() -> None:
    encoder = tiny.model().interest.item_encoder.eval()
    tokens, lengths = _tokens()
    plain = item_attention(encoder, tokens, lengths)
    adapt(encoder.body, 2, seed=0)
    torch.testing.assert_close(item_attention(encoder, tokens, lengths)[0], plain[0])
    for name, value in encoder.named_parameters():
        if "lora_B" in name:
            value.fill_(0.3)
    assert (item_attention(encoder, tokens, lengths)[0] - plain[0]).abs().max() > 0.01


@pytest.mark.parametrize(("layout", "query_mode"), tiny.VARIANTS)
@torch.no_grad()
def test_user_maps_attend_to_what_is_visible_and_name_the_items(
    layout: str, query_mode: str
) -> None:
    interest = tiny.model(layout, query_mode).interest.eval()
    batch = tiny.collator().requests(
        tiny.examples(
            tiny.request(["i1", "i9", "i30"], "warm scarf", hours=[0, 1, 1]),
            tiny.request(["i4"], "mug"),
        )
    )
    tokens, lengths = tiny.item_tokens()
    items = interest.encode_items(
        torch.from_numpy(tokens[batch.item_rows]).long(), torch.from_numpy(lengths[batch.item_rows])
    )
    found = user_attention(interest, batch, items)
    assert found.items.sum(1).tolist() == [3, 1]
    real = found.visible.any(-1)
    for weights in found.maps:
        unseen = weights.masked_fill(found.visible[:, None], 0.0)
        assert unseen[real[:, None].expand(weights.shape[:3])].abs().max() == 0
        mass = (weights * found.visible[:, None]).sum(-1)
        torch.testing.assert_close(mass[:, 0][real], torch.ones(int(real.sum())))
