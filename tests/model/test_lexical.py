"""The last dimensions of e are the item's own words, counted, and of h the history's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from karma_ray.errors import InputError
from karma_ray.evaluation.alarm import Alarm
from karma_ray.model.lexical import LexicalBlock
from karma_ray.objectives.losses import ObjectiveConfig
from karma_ray.training.step import JointStep
from tests import tiny

SIZE = 6


def _fitted(size: int = SIZE) -> LexicalBlock:
    block = LexicalBlock(len(tiny.tokenizer().get_vocab()), size, 32)  # type: ignore[attr-defined]
    block.fit(*tiny.item_tokens())
    return block


def _block(block: LexicalBlock) -> np.ndarray:
    tokens, lengths = tiny.item_tokens()
    return block(torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(lengths)).numpy()


def _weighted() -> np.ndarray:
    """Counts [I, V] times the root of the inverse document frequency, token by token."""
    tokens, lengths = tiny.item_tokens()
    counts = np.zeros((len(tokens), len(tiny.tokenizer().get_vocab())))  # type: ignore[attr-defined]
    for row, (ids, length) in enumerate(zip(tokens, lengths, strict=True)):
        for token in ids[:length]:
            counts[row, token] += 1
    present = (counts > 0).sum(0)
    idf = np.where(present > 0, np.log(len(counts) / np.maximum(present, 1)), 0)
    return counts * np.sqrt(idf)


def test_the_block_is_the_latent_semantic_analysis_of_the_words() -> None:
    weighted = _weighted()
    left, strengths, _ = np.linalg.svd(weighted, full_matrices=False)
    expected = (left * strengths)[:, :SIZE]
    expected -= expected.mean(0)
    expected *= np.sqrt(32) / np.linalg.norm(expected, axis=1, keepdims=True)
    found = _block(_fitted())
    # axes have no sign of their own
    signs = np.sign((found * expected).sum(0))
    np.testing.assert_allclose(found * signs, expected, atol=2e-3)


def test_with_every_direction_similarity_is_that_of_the_weighted_words() -> None:
    weighted = _weighted()
    weighted = weighted - weighted.mean(0)
    full = _fitted(min(len(weighted), int((weighted != 0).any(0).sum())) - 1)
    found = _block(full)
    norms = np.linalg.norm(weighted, axis=1)
    cosines = weighted @ weighted.T / np.outer(norms, norms)
    np.testing.assert_allclose(found @ found.T / 32, cosines, atol=5e-3)


def test_padding_and_its_content_change_nothing() -> None:
    block = _fitted()
    tokens, lengths = (torch.from_numpy(array.astype(np.int64)) for array in tiny.item_tokens())
    padding = torch.arange(tokens.shape[1]) >= lengths[:, None]
    other = functional.pad(tokens.masked_fill(padding, 77), (0, 4), value=78)
    assert torch.equal(block(other, lengths), block(tokens, lengths))


def test_a_text_without_a_counting_word_is_finite() -> None:
    """`<|endoftext|>` ends every text, so it tells nothing apart."""
    tokens, lengths = tiny.item_tokens()
    end = int(tokens[0, lengths[0] - 1])
    block = _fitted()
    assert block.weight[end].abs().max() < 1e-6
    found = block(torch.tensor([[end]]), torch.tensor([1]))
    assert torch.isfinite(found).all()


def test_two_fits_are_the_same() -> None:
    assert torch.equal(_fitted().weight, _fitted().weight)


def test_more_dimensions_than_the_catalogue_has_are_refused() -> None:
    with pytest.raises(InputError, match=r"model\.item_encoder\.lexical: 49 must be at most 45"):
        _fitted(49)


def test_items_that_all_say_the_same_are_refused() -> None:
    block = LexicalBlock(400, 2, 32)
    with pytest.raises(InputError, match=r"lexical: 2 needs items of different words"):
        block.fit(np.tile(np.arange(5), (9, 1)), np.full(9, 5))


def test_a_negative_number_is_refused() -> None:
    with pytest.raises(InputError, match=r"lexical: -1 should be greater than or equal to 0"):
        tiny.model(lexical=-1)


# --- inside the model ------------------------------------------------------------------------


def test_e_is_what_is_learned_and_then_the_words() -> None:
    model = tiny.model(lexical=SIZE).interest
    tokens, lengths = tiny.item_tokens()
    model.item_encoder.words.fit(tokens, lengths)
    ids, sizes = torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(lengths)
    e = model.encode_items(ids, sizes)
    assert e.shape == (len(tokens), 32 + SIZE) == (len(tokens), model.width)
    np.testing.assert_allclose(e[:, -SIZE:].detach(), _block(_fitted()), atol=1e-5)
    learned = functional.rms_norm(
        model.item_encoder.output(model.item_encoder.pooled(ids, sizes)), (32,), eps=1e-6
    )
    torch.testing.assert_close(e[:, :-SIZE], learned, atol=1e-5, rtol=1e-5)


def test_training_leaves_the_words_alone() -> None:
    model = tiny.model(lexical=SIZE).interest
    model.item_encoder.words.fit(*tiny.item_tokens())
    assert not [n for n, _ in model.named_parameters() if "words" in n]
    batch = tiny.batch()
    items = model.encode_items(batch.item_tokens, batch.item_lengths)
    with pytest.raises(RuntimeError, match="does not require grad"):
        model.item_encoder.words(batch.item_tokens, batch.item_lengths).sum().backward()
    found = tiny.gradients(model, items[:, -SIZE:].pow(3).sum() + 0 * items.sum())
    assert all(not value.any() for value in found.values())


def test_the_words_of_h_are_the_histories() -> None:
    model = tiny.model(lexical=SIZE).interest
    model.item_encoder.words.fit(*tiny.item_tokens())
    batch = tiny.batch()
    items = model.encode_items(batch.item_tokens, batch.item_lengths)
    h, weight = model.interest(batch, items), model.user_decoder.lexical_weight.detach()
    assert torch.allclose(items[:, -SIZE:].norm(dim=1), items[:, :-SIZE].norm(dim=1), rtol=1e-3)
    for b, t in batch.step_mask.nonzero().tolist():
        past = [k for k in range(t) if batch.group[b, k] != batch.group[b, t]]
        if past:
            mean = items[batch.item_index[b, past], -SIZE:].mean(0)
            assert functional.cosine_similarity(h[b, t, -SIZE:], mean, dim=0) > 0.999
            words, learned = h[b, t, -SIZE:].norm(), h[b, t, :-SIZE].norm()
            torch.testing.assert_close(words, weight.abs() * learned, rtol=1e-3, atol=1e-3)
        else:
            assert not h[b, t, -SIZE:].any()
    learned = tiny.gradients(model, h[batch.step_mask].pow(3).sum())
    assert learned["user_decoder.lexical_weight"].abs() > 0


def test_words_hide_no_collapse() -> None:
    """The probes look at what can collapse: with all learned parts alike the rank is 1."""
    karma = tiny.model(lexical=SIZE, lm_head=None)
    interest = karma.interest
    interest.item_encoder.words.fit(*tiny.item_tokens())
    with torch.no_grad():
        interest.item_encoder.output.weight.zero_()
        interest.item_encoder.output.weight[0] = 1e-9
        interest.item_encoder.mean.fill_(1.0)
    assert interest.learned_width == interest.width - SIZE == 32
    probed = JointStep(ObjectiveConfig()).probe(karma, tiny.batch())
    assert probed["collapse/effective_rank_e"] < 1.5
    assert Alarm.of(karma, 10, []).width == 32  # type: ignore[union-attr]


def test_nobody_asks_for_words_in_a_model_without_them() -> None:
    names = tiny.model().interest.state_dict()
    assert not [name for name in names if "lexical" in name or "words" in name]
