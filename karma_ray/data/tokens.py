"""The catalogue's tokens: written once per node, memory-mapped by all processes on it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from karma_ray.data.catalog import Catalog
from karma_ray.data.memory_map import mapped_array
from karma_ray.data.prompts import SpecialIds, Tokenizer, encode_texts

FORMAT = 1
"""Raised when the code makes other tokens of the same text: older files are then not found."""

CHUNK = 65_536
"""Items tokenized at once; bounds the memory of the process that writes the file."""


WORTH_TELLING = 0.1
"""Share of the texts that lose their end."""
SAMPLED = 2_000
"""Items whose texts are measured; a large catalogue is not tokenized twice."""


@dataclass(frozen=True)
class TextLengths:
    """How long the catalogue's texts are, in tokens, and how many lose their end."""

    median: int
    p95: int
    read: int
    """Tokens of a text that are read; its end token takes the last place."""
    share_cut: float

    @classmethod
    def of(cls, catalog: Catalog, tokenizer: Tokenizer, max_tokens: int) -> TextLengths:
        """Of about `SAMPLED` items at most, evenly spaced over the catalogue."""
        texts = catalog.texts(step=-(-catalog.num_items // SAMPLED))
        encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
        counts, read = np.array([len(ids) for ids in encoded]), max_tokens - 1
        middle, late = (int(np.ceil(np.quantile(counts, share))) for share in (0.5, 0.95))
        return cls(middle, late, read, round(float((counts > read).mean()), 4))

    def warning(self) -> str:
        """What to tell when many texts lose their end; "" when few do."""
        if self.share_cut < WORTH_TELLING:
            return ""
        return (
            f"{self.share_cut:.0%} of the item texts lose their end: {self.read} tokens of each "
            f"are read, they have {self.median} in the middle, {self.p95} at the 95th percentile. "
            "To read 95% of them whole, at the cost of longer steps: --set "
            f"collate.max_item_tokens={self.p95 + 1}"
        )


def catalog_tokens(
    catalog: Catalog, tokenizer: Tokenizer, max_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [I, L] int32 and lengths [I] int64 of every item's text, as by `encode_texts`.

    Of a catalogue loaded from a data folder they lie beside its copy on the node, under the
    content of items and tokenizer; pages of the tokens are shared.
    """
    if catalog.copy is None:
        return encode_texts(tokenizer, catalog.texts(), max_tokens)
    name = f"{catalog.copy.stem}-{tokenizer_hash(tokenizer)}-{max_tokens}-{FORMAT}.tokens.npy"
    table = mapped_array(
        catalog.copy.with_name(name), np.int32, (catalog.num_items, 1 + max_tokens),
        lambda table: _fill(table, catalog, tokenizer, max_tokens),
    )  # fmt: skip
    lengths = table[:, 0].astype(np.int64)
    return table[:, 1 : 1 + int(lengths.max())], lengths


def _fill(table: np.ndarray, catalog: Catalog, tokenizer: Tokenizer, max_tokens: int) -> None:
    """One row per item [1 + max_tokens]: its length, then its tokens."""
    padding = SpecialIds.of(tokenizer).end_of_text
    for start in range(0, catalog.num_items, CHUNK):
        tokens, lengths = encode_texts(tokenizer, catalog.texts(start, start + CHUNK), max_tokens)
        rows = table[start : start + len(tokens)]
        rows[:, 0], rows[:, 1 : 1 + tokens.shape[1]] = lengths, tokens
        rows[:, 1 + tokens.shape[1] :] = padding


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """Return a content hash of a tokenizer."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()[:16]
