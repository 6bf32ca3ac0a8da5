"""The encoder of a catalogue's items in one process, and the parts of embeddings that it writes.

Texts are sorted by length, first by characters and then, portion by portion, by tokens, so that a
batch has little padding. A thread makes the tokens of the next portion while one is encoded.

Legend: n items, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch

from karma_ray.artifacts import read_manifest
from karma_ray.data.catalog import Catalog
from karma_ray.data.pixels import PixelTable, catalog_pixels
from karma_ray.data.prompts import encode_texts
from karma_ray.data.work_folder import Part, WorkFolder
from karma_ray.model.device import this_device
from karma_ray.retrieval.encode import GPU_SLOTS, embedding_rows, encode_catalog, item_batches
from karma_ray.retrieval.export import item_encoder_config, load_bundle
from karma_ray.retrieval.known_vectors import Hashes, KnownVectors, content_hashes

if TYPE_CHECKING:
    from numpy.typing import NDArray

CPU_SLOTS = 4096
"""Slots of a padded batch that a CPU encodes at once."""
PORTION = 2048
"""Items whose tokens are made at once."""
COMPARED = 128
"""Items that are encoded in float32 as well, to tell what bfloat16 changes."""


@dataclass(frozen=True)
class Embedding:
    """What encoders have to know; sent to the workers as it stands."""

    bundle: str
    data: str
    precision: str
    work: WorkFolder
    known: tuple[str, ...] = ()
    """Folders of embeddings whose vectors may be used again."""


@dataclass(frozen=True)
class Contents:
    """What a bundle's item encoder reads of the items."""

    is_of_ids: bool
    """Whether it is a model over item ids, for which an item is its id."""
    pictures: PixelTable | None
    """The pictures, for an encoder that reads them."""

    @classmethod
    def of(cls, bundle: str, catalog: Catalog, data: str) -> Contents:
        """Look up what a bundle reads of a catalogue; raises InputError if it cannot be had."""
        config = item_encoder_config(bundle)
        if config is None or config.modality != "multimodal":
            return cls(config is None, None)
        return cls(False, catalog_pixels(catalog, data, config.image_size))

    def hashes(self, items: Catalog, first: int = 0) -> Hashes:
        """Return the hashes of consecutive items, of which the first has the row `first`."""
        texts = items.item_ids if self.is_of_ids else items.texts()
        return content_hashes(texts, self.pictures, first)


@dataclass(frozen=True)
class Encoded:
    """Vectors of items, and how much of the work was padding."""

    vectors: NDArray[np.float32]  # [n, D]
    tokens: int
    slots: int


class CatalogEncoder:
    """A bundle's item encoder and the node's catalogue, loaded once per process."""

    def __init__(
        self, bundle: str, data: str, precision: str, device: torch.device | None = None
    ) -> None:
        self.bundle, self.catalog, self.precision = (
            load_bundle(bundle, reads_requests=False),
            Catalog.load(data),
            precision,
        )
        self.device = this_device() if device is None else device
        self.bundle.interest.to(self.device)
        self.bundle.interest.attach_catalog(self.catalog, data)
        self.slots = CPU_SLOTS if self.device.type == "cpu" else GPU_SLOTS

    @property
    def width(self) -> int:
        """D."""
        return self.bundle.interest.width

    def encode(self, rows: NDArray[np.int64]) -> Encoded:
        """Encode rows [n] of the catalogue."""
        texts = Catalog(self.catalog.table.take(pa.array(rows))).texts()
        order = np.argsort([len(text) for text in texts], kind="stable")
        portions = [order[start : start + PORTION] for start in range(0, len(order), PORTION)]
        vectors, tokens, slots = np.empty((len(rows), self.width), np.float32), 0, 0
        with ThreadPoolExecutor(1) as ahead:
            upcoming = ahead.submit(self.tokens, [texts[place] for place in portions[0]])
            for some, following in zip(portions, [*portions[1:], None], strict=True):
                found, lengths = upcoming.result()
                if following is not None:
                    upcoming = ahead.submit(self.tokens, [texts[place] for place in following])
                vectors[some] = encode_catalog(
                    self.bundle.interest, found, lengths, precision=self.precision,
                    rows=rows[some], slots=self.slots,
                )  # fmt: skip
                tokens += int(lengths.sum())
                slots += padded_slots(lengths, self.slots)
        return Encoded(vectors, tokens, slots)

    def tokens(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens [n, L] and lengths [n] of texts."""
        limit = self.bundle.collate_config.max_item_tokens
        return encode_texts(self.bundle.tokenizer, texts, limit)


def padded_slots(lengths: NDArray[np.int64], slots: int) -> int:
    """Return the slots of all batches of items with these lengths, padding included."""
    order = np.argsort(lengths, kind="stable")
    batches = item_batches(order, lengths, torch.device("cpu"), None, slots)
    return int(sum(len(some) * lengths[some].max() for some in batches))


class PartEncoder:
    """Writes parts of the embeddings of a catalogue."""

    def __init__(self, of: Embedding, device: torch.device | None = None) -> None:
        self.of, self.device, self.catalog = of, device, Catalog.load(of.data)
        self.width = int(read_manifest(of.bundle, "bundle")["width"])
        self.has_categories = self.catalog.has_categories
        self.contents = Contents.of(of.bundle, self.catalog, of.data)
        self.known = [KnownVectors(folder) for folder in of.known]

    @cached_property
    def encoder(self) -> CatalogEncoder:
        """The model, which is loaded when something has to be encoded."""
        return CatalogEncoder(self.of.bundle, self.of.data, self.of.precision, self.device)

    def knows(self, part: Part) -> bool:
        """Whether all vectors of a part are known."""
        hashes = self.contents.hashes(self.items(part), part.first)
        return not self.reused(hashes)[1].any()

    def items(self, part: Part) -> Catalog:
        """Return the items of a part."""
        return Catalog(self.catalog.table.slice(part.first, part.end - part.first))

    def reused(self, hashes: Hashes) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Return vectors [n, D] of items with these hashes, and the mask [n] of missing ones."""
        vectors = np.zeros((len(hashes), self.width), np.float32)
        missing = np.ones(len(hashes), bool)
        for source in self.known:
            rows = np.flatnonzero(missing)
            found, known = source.find(hashes[rows])
            vectors[rows[found]], missing[rows[found]] = known, False
        return vectors, missing

    def __call__(self, part: Part) -> dict[str, Any]:
        """Write a part and return its facts; one that is finished is not encoded again."""
        done: dict[str, Any] | None = self.of.work.finished_part(part.name)
        if done is not None:
            return done
        items = self.items(part)
        hashes = self.contents.hashes(items, part.first)
        vectors, missing = self.reused(hashes)
        rows = np.flatnonzero(missing)
        _, some, of_which = np.unique(hashes[rows], return_index=True, return_inverse=True)
        facts: dict[str, Any] = {"encoded": len(some), "reused": items.num_items - len(some)}
        if len(rows):
            new = self.encoder.encode(rows[some] + part.first)  # of equal items one is enough
            vectors[rows] = new.vectors[of_which]
            facts |= {"tokens": new.tokens, "slots": new.slots}
        if part.first == 0 and len(rows) and self.of.precision != "float32":
            facts["accuracy"] = self.accuracy()
        categories = items.column("category") if self.has_categories else None
        table = embedding_rows(items.item_ids, items.titles, vectors, categories, hashes)
        self.of.work.write(part.name, table, facts)
        return facts

    def accuracy(self) -> dict[str, float]:
        """Compare vectors with those of float32, for items evenly spaced over the catalogue."""
        last = self.catalog.num_items - 1
        rows = np.unique(np.linspace(0, last, COMPARED).astype(np.int64))
        exact = CatalogEncoder(self.of.bundle, self.of.data, "float32", self.encoder.device)
        pairs = (encoder.encode(rows).vectors for encoder in (self.encoder, exact))
        found, expected = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in pairs)
        cosines = (found * expected).sum(1)
        return {
            "items": len(rows),
            "mean_cosine": round(float(cosines.mean()), 6),
            "min_cosine": round(float(cosines.min()), 6),
        }


def encode_here(of: Embedding, parts: list[Part]) -> Iterator[dict[str, Any]]:
    """Encode one part after another in this process."""
    yield from map(PartEncoder(of), parts)
