"""The catalogue's tokens, written once per node and memory-mapped by all its processes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from karma_ray.data.catalog import Catalog
from karma_ray.data.memory_map import mapped_array
from karma_ray.data.prompts import SpecialIds, Tokenizer, encode_texts

FORMAT = 1
"""Raised when the code makes other tokens from the same text, so that old files are ignored."""

CHUNK = 65_536
"""Items tokenised at once, which bounds the memory of the process that writes the file."""


WORTH_TELLING = 0.1
"""Smallest share of cut texts that causes a warning."""
SAMPLED = 2_000
"""Items whose texts are measured, so that a large catalogue is not tokenised twice."""


@dataclass(frozen=True)
class TextLengths:
    """Lengths of the catalogue's texts in tokens, and the share that is cut."""

    median: int
    p95: int
    read: int
    """Tokens that are read of a text, without its end token."""
    share_cut: float

    @classmethod
    def of(cls, catalog: Catalog, tokenizer: Tokenizer, max_tokens: int) -> TextLengths:
        """Measure at most about `SAMPLED` items, evenly spaced over the catalogue."""
        texts = catalog.texts(step=-(-catalog.num_items // SAMPLED))
        encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
        counts, read = np.array([len(ids) for ids in encoded]), max_tokens - 1
        middle, late = (int(np.ceil(np.quantile(counts, share))) for share in (0.5, 0.95))
        return cls(middle, late, read, round(float((counts > read).mean()), 4))

    def warning(self) -> str:
        """Return a warning if many texts are cut, otherwise ""."""
        if self.share_cut < WORTH_TELLING:
            return ""
        return (
            f"{self.share_cut:.0%} of the item texts are cut: {self.read} tokens of each are "
            f"read; the median text has {self.median}, the 95th percentile {self.p95}. "
            "To read 95% of the texts completely, with longer steps: --set "
            f"collate.max_item_tokens={self.p95 + 1}"
        )


def catalog_tokens(
    catalog: Catalog, tokenizer: Tokenizer, max_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens [I, L] int32 and lengths [I] int64 of all item texts, as `encode_texts` does.

    For a catalogue that was loaded from a data folder they are kept beside its copy on the node,
    in a file named by the contents of items and tokenizer, whose pages are shared.
    """
    if catalog.copy is None:
        return encode_texts(tokenizer, catalog.texts(), max_tokens)
    name = f"{catalog.copy.stem}-{tokenizer_hash(tokenizer)}-{max_tokens}-{FORMAT}.tokens.npy"
    table = mapped_array(
        catalog.copy.with_name(name), np.int32, (catalog.num_items, 1 + max_tokens),
        lambda table: _fill(table, catalog, tokenizer, max_tokens),
    )  # fmt: skip
    # In a file of their own: to gather them from the table would read all of it, in each process.
    lengths = mapped_array(
        catalog.copy.with_name(name.replace(".tokens.", ".lengths.")), np.int64, table.shape[:1],
        lambda lengths: np.copyto(lengths, table[:, 0]),
    )  # fmt: skip
    return table[:, 1 : 1 + int(lengths.max())], lengths


def _fill(table: np.ndarray, catalog: Catalog, tokenizer: Tokenizer, max_tokens: int) -> None:
    """Write one row per item [1 + max_tokens]: its length, then its tokens."""
    padding = SpecialIds.of(tokenizer).end_of_text
    for start in range(0, catalog.num_items, CHUNK):
        tokens, lengths = encode_texts(tokenizer, catalog.texts(start, start + CHUNK), max_tokens)
        rows = table[start : start + len(tokens)]
        rows[:, 0], rows[:, 1 : 1 + tokens.shape[1]] = lengths, tokens
        rows[:, 1 + tokens.shape[1] :] = padding


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """Return a content hash of a tokenizer."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()[:16]
