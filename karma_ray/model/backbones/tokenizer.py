"""Tokenizers of any family: loading, saving, and training one for a tiny backbone.

Special tokens are roles (`SpecialTokens`), which a vocabulary fills with tokens that it has: none
is added, because that would change a head that is tied to the token embeddings. A tokenizer saved
here has its roles in a file beside it, so that a bundle is served with those it was trained with.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from karma_ray.data.prompts import SpecialTokens, Tokenizer
from karma_ray.errors import InputError
from karma_ray.model.backbones.checkpoint_files import check_tokenizer_files
from karma_ray.node_cache import local_copy

ROLES = "roles.json"
KNOWN = (
    SpecialTokens("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    SpecialTokens("<|end_of_text|>", "<|begin_of_text|>", "<|eot_id|>"),
    SpecialTokens("</s>", "<s>", "</s>"),
)
"""Tokens of the common vocabularies, in the order in which they are looked for; the first belongs
to the tiny models."""
FILLER = re.compile(r"\[PAD\d+\]")
"""Names of rows that no text leads to, as they stand in GGUF files."""


def load_tokenizer(checkpoint: str, field: str = "tokenizer") -> PreTrainedTokenizerFast:
    """Load the tokenizer of a folder, hub name or URI, and the tokens of its roles as `text_marks`.

    Raises InputError when there is none, or when no token of it fills a role.
    """
    check_tokenizer_files(checkpoint := local_copy(checkpoint), field)
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(field, checkpoint, f"cannot be loaded ({error})") from None
    stored = Path(checkpoint) / ROLES
    find = _stored_roles if stored.is_file() else _roles
    cast(Any, tokenizer).text_marks = find(tokenizer, checkpoint, field)
    return cast(PreTrainedTokenizerFast, tokenizer)


def save_tokenizer(tokenizer: Tokenizer, folder: str) -> None:
    """Write the tokenizer's files and its roles."""
    cast(PreTrainedTokenizerFast, tokenizer).save_pretrained(folder)
    roles = json.dumps(tokenizer.text_marks._asdict(), indent=2) + "\n"
    Path(folder, ROLES).write_text(roles, encoding="utf-8")


def save_framed(
    tokenizer: Tokenizer, folder: str, before: list[int], after: int, max_tokens: int
) -> None:
    """Write a tokenizer that puts `before` and `after` around every text it is given.

    Texts are cut so that at most `max_tokens` tokens remain with these, and padded on the right.
    """
    end = tokenizer.text_marks.end_of_text
    backend = FastTokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    frame = {"before": before, "after": [after]}
    backend.post_processor = processors.TemplateProcessing(
        single=(["before"] if before else []) + ["$A", "after"],
        special_tokens=[
            {"id": name, "ids": ids, "tokens": [backend.id_to_token(i) or name for i in ids]}
            for name, ids in frame.items()
        ],
    )
    # The plain class: those of the families build their own frame when they are loaded.
    framed = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=end, pad_token=end, padding_side="right",
        model_max_length=max_tokens, model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
    framed.save_pretrained(folder)


def token_ids(folder: str, texts: list[str]) -> list[list[int]]:
    """Return the tokens of texts, cut, by the tokenizer of a folder as other programs load it."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return cast(list[list[int]], tokenizer(texts, truncation=True)["input_ids"])


def check_tokens_shared(item: str, user: str, item_rows: int, user_rows: int) -> None:
    """Raise InputError unless both checkpoints mean the same by the user decoder's tokens.

    Its tokenizer makes the tokens of both. `item_rows` and `user_rows` are the numbers of their
    token embeddings.
    """
    fields = [f"model.{part}.checkpoint" for part in ("item_encoder", "user_decoder")]
    tokenizer = load_tokenizer(user, fields[1])
    tokens = _made_from_text(tokenizer)
    for field, name, rows in ((fields[0], item, item_rows), (fields[1], user, user_rows)):
        if (last := max(tokens.values())) >= rows:
            message = f"has embeddings of {rows} tokens, but the tokenizer of {user} makes {last}"
            raise InputError(field, name, message)
    if item == user:
        return
    known = load_tokenizer(item, fields[0]).get_vocab()
    other = [token for token, number in tokens.items() if known.get(token) != number]
    if other:
        raise InputError(
            fields[0], item,
            f"does not share the tokenizer of model.user_decoder.checkpoint {user!r}: {len(other)}"
            f" of {len(tokens)} tokens differ, such as {min(other, key=lambda t: tokens[t])!r}",
        )  # fmt: skip


def _made_from_text(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """Return the tokens, with their ids, that texts are made of, and those of the roles.

    Tokens that were added for conversations or tools may differ between models of one vocabulary.
    """
    added, roles = tokenizer.get_added_vocab(), cast(Any, tokenizer).text_marks
    return {
        token: number
        for token, number in tokenizer.get_vocab().items()
        if token in roles or (token not in added and not FILLER.fullmatch(token))
    }


def _stored_roles(tokenizer: Any, checkpoint: str, field: str) -> SpecialTokens:
    try:
        marks = SpecialTokens(**json.loads((Path(checkpoint) / ROLES).read_bytes()))
    except (ValueError, TypeError) as error:
        raise InputError(field, checkpoint, f"has a damaged {ROLES} ({error})") from None
    if missing := set(marks) - set(tokenizer.get_vocab()):
        reason = f"names {min(missing)!r} in {ROLES}, which its vocabulary lacks"
        raise InputError(field, checkpoint, reason)
    return marks


def _roles(tokenizer: Any, checkpoint: str, field: str) -> SpecialTokens:
    """Return the known tokens that the vocabulary has, or else those that it declares."""
    vocabulary = tokenizer.get_vocab()
    for marks in KNOWN:
        if all(token in vocabulary for token in marks):
            return marks
    start, end = tokenizer.bos_token, tokenizer.eos_token
    if start in vocabulary and end in vocabulary and start != end:
        return SpecialTokens(end_of_text=end, text_start=start, text_end=end)
    known = "; ".join(" ".join(dict.fromkeys(marks)) for marks in KNOWN)
    raise InputError(
        field, checkpoint,
        "has no tokens for the roles end of text, text start and text end: neither a known set "
        f"({known}) nor a bos_token and another eos_token (it declares {start!r} and {end!r})",
    )  # fmt: skip


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
