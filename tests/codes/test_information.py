"""Mutual information of two texts under an LLM, against the model's own classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from karma_ray.codes.information import by_chance, line_break, mutual_information
from karma_ray.data.prompts import encode_texts
from karma_ray.model.backbone import load_body
from karma_ray.model.backbones.checkpoints import load_lm_head
from tests.aligned_run import catalog, checkpoint, tokenizer


def test_it_is_what_one_text_adds_to_the_probability_of_the_other(tmp_path: Path) -> None:
    words = tokenizer()
    folder = checkpoint(str(tmp_path), words)
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens, lengths = encode_texts(words, catalog().texts()[:5], 10)
    between = line_break(words)

    def loss(before: list[int], text: list[int]) -> float:
        read = torch.tensor([before + text])
        with torch.no_grad():
            chances = theirs(read).logits[0, len(before) - 1 : -1].log_softmax(-1)
        return -float(chances.gather(1, torch.tensor(text)[:, None]).mean())

    items = [row[: length - 1].tolist() for row, length in zip(tokens, lengths, strict=True)]
    pairs = np.array([[0, 1], [3, 2], [4, 0]])
    expected = [
        np.mean([loss(between, b) - loss(a + between, b)
                 for a, b in ((items[one], items[two]), (items[two], items[one]))])
        for one, two in pairs
    ]  # fmt: skip
    judge = mutual_information(load_body(folder), load_lm_head(folder), tokens, lengths, words)
    assert judge(pairs).tolist() == pytest.approx(expected, abs=1e-4)
    np.testing.assert_allclose(judge(pairs[:, ::-1]), judge(pairs), atol=1e-5)


def test_the_given_share_of_random_pairs_is_above_the_level_of_chance() -> None:
    apart = lambda pairs: np.abs(pairs[:, 0] - pairs[:, 1]).astype(np.float32)  # noqa: E731
    least = by_chance(apart, 100, 0.05, seed=0)
    first, second = np.triu_indices(100, 1)
    every = apart(np.stack([first, second], 1))
    assert (every > least).mean() == pytest.approx(0.05, abs=0.02)
    assert by_chance(lambda pairs: apart(pairs), 2, 0.5, seed=0) == 1.0  # never an item with itself
