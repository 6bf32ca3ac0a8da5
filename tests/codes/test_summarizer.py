"""What a related item's text learns of an item, and where the summary tokens start."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from karma_ray.codes.summarizer import Summarizer
from karma_ray.codes.tuning import TuningConfig
from karma_ray.data.prompts import SpecialIds, encode_texts
from karma_ray.errors import InputError
from karma_ray.model.decodability import TextTargets, text_targets
from karma_ray.model.interest import InterestModel
from tests.aligned_run import catalog, interest_model, tokenizer

WORDS = tokenizer()
SPECIAL = SpecialIds.of(WORDS)


def summarizer(interest: InterestModel, num_summary: int = 1) -> Summarizer:
    head = torch.randn(len(WORDS.get_vocab()), 32, generator=torch.Generator().manual_seed(3))  # type: ignore[attr-defined]
    return Summarizer(interest.item_encoder, SPECIAL.end_of_text, num_summary, 0.1 * head).eval()


def texts(*words: str) -> tuple[Tensor, Tensor]:
    tokens, lengths = encode_texts(WORDS, words, 10)
    return torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(lengths)


def targets(*words: str) -> TextTargets:
    return text_targets(*texts(*words), SPECIAL, 10)


def cut(model: Summarizer, first: int, count: int, value: list[Tensor] | None) -> ExitStack:
    """Take the summary's states out of the graph in every layer, or replace them by values."""
    stack, layers = ExitStack(), list(model.body.layers)  # type: ignore[union-attr, arg-type]

    def hook(number: int) -> Any:
        def change(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
            at = torch.arange(output.shape[1])[:, None]
            kept = output.detach() if value is None else value[number]
            return torch.where((at >= first) & (at < first + count), kept, output)

        return change

    for number, layer in enumerate(layers):
        stack.callback(layer.register_forward_hook(hook(number)).remove)
    return stack


@pytest.mark.parametrize("is_cut", [False, True])
def test_an_items_text_reaches_a_related_text_through_the_summary_alone(is_cut: bool) -> None:
    model = summarizer(interest_model(WORDS), 2)
    (tokens, lengths), wanted = texts("red shirt"), targets("blue mug")
    rows = model.body.embed_tokens.weight  # type: ignore[union-attr]
    own = sorted(set(tokens[0, :-1].tolist()) - set(wanted.inputs[0].tolist()))
    assert own
    with ExitStack() as stack:
        if is_cut:
            stack.enter_context(cut(model, tokens.shape[1] - 1, 2, None))
        _, states = model(tokens, lengths, wanted)
        model.text_losses(states, wanted).sum().backward()
    leaked = rows.grad[own].abs()
    assert bool((leaked == 0).all()) if is_cut else bool((leaked > 0).any())


def test_another_text_with_the_same_summary_states_predicts_the_same() -> None:
    model = summarizer(interest_model(WORDS))
    (one, lengths), (other, _), wanted = texts("red shirt"), texts("shirt red"), targets("blue mug")
    assert one.shape == other.shape and not torch.equal(one, other)
    seen: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _m, _i, output: seen.append(output))
        for layer in model.body.layers  # type: ignore[union-attr]
    ]
    _, expected = model(one, lengths, wanted)
    for made in hooks:
        made.remove()
    assert not torch.allclose(model(other, lengths, wanted)[1], expected)
    with cut(model, one.shape[1] - 1, 1, seen):
        found = model(other, lengths, wanted)[1]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("pool", ["eos", "emb_token"])
@pytest.mark.parametrize("instruction", ["", "an item:"])
def test_one_summary_token_starts_as_the_encoders_own_embedding(
    pool: str, instruction: str
) -> None:
    interest = interest_model(WORDS, pool, instruction)
    model, read = summarizer(interest), texts("red shirt", "blue", "a pink kettle of steel")
    with torch.no_grad():
        found = model.embed(model(*read)[0])
        torch.testing.assert_close(found, interest.encode_items(*read), atol=1e-4, rtol=1e-4)
        several = summarizer(interest, 4)
        near = several.embed(several(*read)[0])
    assert not torch.equal(several.summary[0], several.summary[1])
    assert cosine_similarity(near, found).min() > 0.8


def test_a_mean_of_all_states_is_met_by_a_fitted_map() -> None:
    interest = interest_model(WORDS, "mean")
    model, read = summarizer(interest), texts(*catalog().texts())
    with torch.no_grad():
        own, summaries = interest.encode_items(*read), model(*read)[0]
        before = cosine_similarity(model.embed(summaries), own).mean()
        model.fit(summaries, own)
        after = cosine_similarity(model.embed(summaries), own).mean()
    assert after > before and after > 0.9


def test_padding_and_other_rows_change_nothing() -> None:
    model = summarizer(interest_model(WORDS), 2)
    many = model(*texts("red", "a white kettle of steel"), targets("blue mug", "a tie"))
    alone = model(*texts("red"), targets("blue mug"))
    torch.testing.assert_close(many[0][:1], alone[0], atol=1e-5, rtol=1e-4)
    count = alone[1].shape[1]
    torch.testing.assert_close(many[1][:1, :count], alone[1], atol=1e-5, rtol=1e-4)


def test_numbers_out_of_range_are_refused() -> None:
    with pytest.raises(InputError, match=r"align\.summary_tokens"):
        TuningConfig(summary_tokens=0).check()
