"""The tiny stand-in for a pretrained LLM is an ordinary Hugging Face folder that has learned."""

from __future__ import annotations

from pathlib import Path

import torch

from karma_ray.data.prompts import encode_texts
from karma_ray.model.backbone import load_body
from karma_ray.model.backbones.tokenizer import load_tokenizer
from karma_ray.training.config import PretrainConfig
from karma_ray.training.language import pretrain, token_batches
from tests import tiny


def _pretrained(folder: Path, steps: int) -> list[dict[str, float]]:
    records: list[dict[str, float]] = []
    pretrain(
        tiny.catalog(),
        str(folder),
        tiny=tiny.BODY,
        config=PretrainConfig(steps=steps, batch_size=16),
        max_tokens=16,
        seed=0,
        report=records.append,
    )
    return records


def test_pretraining_lowers_the_loss_and_leaves_a_loadable_folder(tmp_path: Path) -> None:
    records = _pretrained(tmp_path / "lm", 60)
    assert records[-1]["loss/pretrain"] < 0.8 * records[0]["loss/pretrain"]
    body, tokenizer = load_body(str(tmp_path / "lm")), load_tokenizer(str(tmp_path / "lm"))
    assert len(tokenizer) == body.config.vocab_size
    assert not (tmp_path / "lm.tmp").exists()


def test_the_same_seed_gives_the_same_weights(tmp_path: Path) -> None:
    _pretrained(tmp_path / "a", 3)
    _pretrained(tmp_path / "b", 3)
    left, right = (load_body(str(tmp_path / name)).state_dict() for name in "ab")
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_an_epoch_of_token_batches_holds_every_item_once() -> None:
    tokens, lengths = encode_texts(tiny.tokenizer(), tiny.catalog().texts(), 16)
    batches = token_batches(tokens, lengths, 10, seed=0)
    count = -(-len(tokens) // 10)
    epoch = [next(batches) for _ in range(count)]
    seen = sorted(
        tuple(row[:length].tolist())
        for batch in epoch
        for row, length in zip(batch.tokens, batch.lengths, strict=True)
    )
    assert seen == sorted(tuple(row[:n].tolist()) for row, n in zip(tokens, lengths, strict=True))
