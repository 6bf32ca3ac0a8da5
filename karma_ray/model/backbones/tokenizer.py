"""Tokenizers of any family: loading, saving, and training one for a tiny backbone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from karma_ray.data.prompts import SpecialTokens, Tokenizer
from karma_ray.errors import InputError
from karma_ray.model.backbones.checkpoint_files import check_tokenizer_files

KNOWN = (SpecialTokens("<|endoftext|>", "<|im_start|>", "<|im_end|>"),)


def load_tokenizer(checkpoint: str) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a checkpoint folder, with the special tokens of its family.

    Raises InputError when the folder has none, or when it lacks special tokens of every family.
    """
    check_tokenizer_files(checkpoint, "tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    except (OSError, ValueError) as error:
        raise InputError("tokenizer", checkpoint, f"cannot be loaded ({error})") from None
    known = tokenizer.get_vocab()
    # Found by the vocabulary, since a bundle's tokenizer has no config.json beside it.
    choices = KNOWN
    missing = [[token for token in special if token not in known] for special in choices]
    found = min(range(len(choices)), key=lambda number: len(missing[number]))
    if missing[found]:
        raise InputError("tokenizer", checkpoint, f"lacks the special token {missing[found][0]}")
    cast(Any, tokenizer).text_marks = choices[found]
    return cast(PreTrainedTokenizerFast, tokenizer)


def save_tokenizer(tokenizer: Tokenizer, folder: str) -> None:
    """Write the tokenizer's files."""
    cast(PreTrainedTokenizerFast, tokenizer).save_pretrained(folder)


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of at most `vocab_size` tokens with the tiny family's tokens."""
    if vocab_size < 300:
        raise InputError("model.tiny.vocab_size", vocab_size, "must be at least 300 (256 bytes)")
    special = KNOWN[0]
    tokenizer = FastTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    end = special.end_of_text
    trained = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token=end)
    trained.text_marks = special
    return trained
