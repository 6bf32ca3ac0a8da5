"""e is its own text's embedding: neither padding nor neighbours enter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from karma_ray.metrics.collapse import effective_rank, mean_cosine
from karma_ray.model import item_encoder
from karma_ray.model.backbone import build_tiny, run_body, token_embeddings
from karma_ray.model.config import ItemEncoderConfig, TinyBackboneConfig
from karma_ray.model.item_encoder import ItemEncoder
from tests import tiny

POOLS = ("eos", "emb_token", "mean")
every_pool = pytest.mark.parametrize("pool", POOLS)


def _texts() -> tuple[Tensor, Tensor]:
    tokens, lengths = tiny.item_tokens()
    assert len(set(lengths.tolist())) > 1
    return torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(lengths)


@torch.no_grad()
def _encode(encoder: ItemEncoder, tokens: Tensor, lengths: Tensor) -> Tensor:
    return encoder(tokens, lengths)


@torch.no_grad()
def _states(encoder: ItemEncoder, ids: list[int], last: Tensor | None = None) -> Tensor:
    """Plain causal states [L, D] of one text."""
    rows = token_embeddings(encoder.body)[torch.tensor(ids)]
    rows = rows if last is None else torch.cat([rows[:-1], last[None]])
    return run_body(encoder.body, rows[None])[0]


@every_pool
@pytest.mark.parametrize("instruction", ["", "find the item:"])
def test_each_pool_is_its_reference_on_the_bare_text(pool: str, instruction: str) -> None:
    encoder = tiny.model(pool=pool, instruction=instruction).interest.item_encoder
    tokens, lengths = _texts()
    e = _encode(encoder, tokens, lengths)
    for row in (0, 5, 17):
        ids = encoder.instruction.tolist() + tokens[row, : lengths[row]].tolist()
        last = encoder.item_token if pool == "emb_token" else None
        states = _states(encoder, ids, last)
        raw = states.mean(0) if pool == "mean" else states[-1]
        expected = functional.rms_norm(encoder.output(raw), (32,), eps=1e-6)
        torch.testing.assert_close(e[row], expected.detach(), atol=1e-5, rtol=1e-5)


@every_pool
def test_padding_changes_nothing(pool: str) -> None:
    encoder = tiny.model(pool=pool).interest.item_encoder
    tokens, lengths = _texts()
    e = _encode(encoder, tokens, lengths)
    wider = functional.pad(tokens, (0, 5), value=int(tokens.max()))
    torch.testing.assert_close(_encode(encoder, wider, lengths), e, atol=5e-6, rtol=1e-5)


@every_pool
def test_what_the_padding_holds_changes_nothing_at_all(pool: str) -> None:
    encoder = tiny.model(pool=pool).interest.item_encoder
    tokens, lengths = _texts()
    padding = torch.arange(tokens.shape[1]) >= lengths[:, None]
    assert padding.any()
    other = tokens.masked_fill(padding, 77)
    assert torch.equal(_encode(encoder, other, lengths), _encode(encoder, tokens, lengths))


@every_pool
def test_neighbours_and_their_order_change_nothing(pool: str) -> None:
    encoder = tiny.model(pool=pool).interest.item_encoder
    tokens, lengths = _texts()
    e = _encode(encoder, tokens, lengths)
    back = _encode(encoder, tokens.flip(0), lengths.flip(0)).flip(0)
    torch.testing.assert_close(back, e, atol=5e-6, rtol=1e-5)
    alone = _encode(encoder, tokens[3:4, : lengths[3]], lengths[3:4])
    torch.testing.assert_close(alone[0], e[3], atol=5e-6, rtol=1e-5)


@every_pool
def test_every_word_reaches_the_embedding(pool: str) -> None:
    encoder = tiny.model(pool=pool).interest.item_encoder
    tokens, lengths = _texts()
    e = _encode(encoder, tokens[:1], lengths[:1])
    for position in range(int(lengths[0]) - 1):
        changed = tokens[:1].clone()
        changed[0, position] = 77
        assert (_encode(encoder, changed, lengths[:1]) - e).abs().max() > 1e-4


def test_equal_texts_have_equal_embeddings_and_others_do_not() -> None:
    encoder = tiny.model().interest.item_encoder
    tokens, lengths = _texts()
    e = _encode(encoder, tokens[[0, 0, 1]], lengths[[0, 0, 1]])
    torch.testing.assert_close(e[0], e[1])
    assert (e[0] - e[2]).abs().max() > 1e-2


@every_pool
def test_embeddings_have_unit_root_mean_square(pool: str) -> None:
    e = _encode(tiny.model(pool=pool).interest.item_encoder, *_texts())
    torch.testing.assert_close(e.square().mean(1), torch.ones(len(e)), atol=1e-4, rtol=0)


def test_the_instruction_changes_the_embedding() -> None:
    plain, told = (
        tiny.model(instruction=text).interest.item_encoder for text in ("", "find the item:")
    )
    told.body = plain.body
    assert (_encode(plain, *_texts()) - _encode(told, *_texts())).abs().max() > 1e-2


def test_under_emb_token_the_learned_vector_stands_in_for_the_end() -> None:
    encoder = tiny.model(pool="emb_token").interest.item_encoder
    tokens, lengths = _texts()
    other = tokens.clone()
    other[torch.arange(len(tokens)), lengths - 1] = 77
    assert torch.equal(_encode(encoder, other, lengths), _encode(encoder, tokens, lengths))
    encoder(tokens, lengths).pow(3).sum().backward()
    assert encoder.item_token.grad is not None and encoder.item_token.grad.abs().sum() > 0


@every_pool
def test_whitening_gives_item_embeddings_all_their_directions(pool: str) -> None:
    encoder = tiny.model(pool=pool).interest.item_encoder
    texts = _texts()
    before = _encode(encoder, *texts)
    encoder.whiten(*texts, ridge=1e-4)
    with torch.no_grad():
        centred = encoder.output(encoder.pooled(*texts) - encoder.mean)
    torch.testing.assert_close(centred.mean(0), torch.zeros(32), atol=1e-4, rtol=0)
    after = _encode(encoder, *texts)
    assert abs(mean_cosine(after)) < 0.1
    assert effective_rank(after) > effective_rank(before)


def test_whitening_in_portions_equals_whitening_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = (tiny.model(pool="mean").interest.item_encoder for _ in range(2))
    whole.whiten(*_texts())
    monkeypatch.setattr(item_encoder, "SAMPLED_AT_ONCE", 2)
    parts.whiten(*_texts())
    torch.testing.assert_close(parts.mean, whole.mean)
    torch.testing.assert_close(parts.output.weight, whole.output.weight, atol=1e-3, rtol=1e-3)


@every_pool
def test_whitening_again_changes_nothing_but_the_rotation(pool: str) -> None:
    encoder = tiny.model(pool=pool).interest.item_encoder
    encoder.whiten(*_texts())
    mean = encoder.mean.clone()
    once = mean_cosine(_encode(encoder, *_texts()))
    encoder.whiten(*_texts())
    torch.testing.assert_close(encoder.mean, mean)
    assert mean_cosine(_encode(encoder, *_texts())) == pytest.approx(once, abs=0.05)


def test_items_that_read_the_same_are_left_alone_and_stay_finite(
    caplog: pytest.LogCaptureFixture,
) -> None:
    encoder = tiny.model().interest.item_encoder
    tokens, lengths = _texts()
    same = tokens[:1].expand(5, -1), lengths[:1].expand(5)
    before = _encode(encoder, *same)
    encoder.whiten(*same)
    torch.testing.assert_close(_encode(encoder, *same), before)
    assert "all of 5 sampled items have the same text" in caplog.text
    encoder.whiten(tokens[:1], lengths[:1])
    assert _encode(encoder, *same).isfinite().all()


def test_an_item_body_of_another_width_maps_orthogonally_to_the_users() -> None:
    wide = TinyBackboneConfig(
        hidden_size=48, num_layers=1, num_heads=2, num_key_value_heads=1, intermediate_size=64
    )
    encoder = ItemEncoder(build_tiny(wide, 400, 0), ItemEncoderConfig(), 32, [], 0)
    assert _encode(encoder, *_texts()).shape == (tiny.catalog().num_items, 32)
    weight = encoder.output.weight.detach()
    torch.testing.assert_close(weight @ weight.T, torch.eye(32), atol=1e-5, rtol=0)
