"""Text anchors of items (SARM, 2602.09401): what a run's decoder says of them, or their own words.

`decoded` is the text that Task 2 reads from e_i alone, as in the warm-up; `words`, the control, is
the text that e_i was made of. Both are tokens of the run's tokenizer, at most `max_tokens`, so
that the two differ in what they say alone. The table is made once for a bundle and a catalogue, in
parts that a job which was killed finds again, and is refused for any other.

Legend: I items, K different anchors, L anchor tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch

from karma_ray.artifacts import (
    exists,
    join,
    locked,
    read_manifest,
    read_table,
    table_files,
    value_hash,
    write_manifest,
    write_table,
)
from karma_ray.data.catalog import Catalog
from karma_ray.data.fragments import items_folder
from karma_ray.errors import InputError, SkewError
from karma_ray.model.backbones.checkpoints import load_lm_head
from karma_ray.model.interest import InterestModel
from karma_ray.model.karma import KarmaModel
from karma_ray.node_cache import known_hash
from karma_ray.ranking.vectors import vectors_of
from karma_ray.retrieval.export import USER_DECODER, load_bundle
from karma_ray.retrieval.parts import served
from karma_ray.retrieval.retriever import check_run

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from karma_ray.data.prompts import Tokenizer

KIND = "item_anchors"
VERSION = 1
"""Raised when the code makes other anchors of the same vectors."""
SOURCES = ("decoded", "words")
PART_ITEMS = 4096
"""Items of a part, all that is lost when a job is killed."""
AT_ONCE = 256
"""Items that are decoded at once."""
ANCHORS = pa.schema([pa.field("item_id", pa.string()), pa.field("text", pa.string())])


@dataclass(frozen=True)
class Anchors:
    """Anchors as numbers: token t of the run's tokenizer is the t-th of those that occur."""

    tokens: NDArray[np.int64]  # [K, L] from 1 on; 0 after the last one
    place: NDArray[np.int64]  # [I] which of them an item has
    texts: list[str]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """K, how many different tokens there are, without 0, and L."""
        return len(self.tokens), int(self.tokens.max(initial=0)), self.tokens.shape[1]

    @classmethod
    def of(cls, texts: list[str], tokenizer: Tokenizer, max_tokens: int) -> Anchors:
        """Read texts by catalogue row."""
        found = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        kept = [ids[:max_tokens] for ids in found]
        padded = np.full((len(kept), max(1, max(map(len, kept), default=1))), -1, np.int64)
        for row, ids in enumerate(kept):
            padded[row, : len(ids)] = ids
        known = np.unique(padded[padded >= 0])
        tokens = np.where(padded < 0, 0, np.searchsorted(known, padded) + 1)
        different, place = np.unique(tokens.astype(np.int64), axis=0, return_inverse=True)
        return cls(different, place.reshape(-1).astype(np.int64), texts)


def ensure_anchors(run: str, data: str, source: str, max_tokens: int, cache: str) -> str:
    """Return the folder of a run's anchors for a catalogue, making what `cache` lacks.

    Raises InputError when the run is not finished, is of another catalogue or cannot decode.
    """
    if source not in SOURCES:
        raise InputError("ranking.anchors", source, choices=SOURCES)
    check_run(run)
    made_of = _made_of(run, data, source, max_tokens)
    folder = join(cache, f"anchors-{value_hash(made_of)}")
    with locked(folder):
        if not exists(join(folder, "manifest.json")):
            _make(run, data, source, max_tokens, folder)
            write_manifest(folder, KIND, **made_of)
    return folder


def load_anchors(folder: str, run: str, data: str) -> Anchors:
    """Load anchors; raises SkewError on those of another run or catalogue."""
    facts = read_manifest(folder, KIND)
    wanted = _made_of(run, data, facts["source"], facts["max_tokens"])
    for name, found in facts["parents"].items():
        if found != wanted["parents"][name]:
            raise SkewError(
                f"{folder} holds anchors made with {name} {found}, but {run} and {data} have "
                f"{wanted['parents'][name]}: make them again"
            )
    table = read_table(folder, ANCHORS.names)
    catalog = Catalog.load(data)
    rows = catalog.rows(table.column("item_id").combine_chunks())
    texts = [""] * catalog.num_items
    for row, text in zip(rows, table.column("text").to_pylist(), strict=True):
        texts[row] = text
    bundle = load_bundle(served(run).bundle, encodes_items=False)
    return Anchors.of(texts, bundle.tokenizer, facts["max_tokens"])


def _made_of(run: str, data: str, source: str, max_tokens: int) -> dict[str, Any]:
    bundle = read_manifest(served(run).bundle, "bundle")["content_hash"]
    parents = {"bundle": bundle, "items": known_hash(items_folder(data))}
    return {"version": VERSION, "source": source, "max_tokens": max_tokens, "parents": parents}


def _make(run: str, data: str, source: str, max_tokens: int, folder: str) -> None:
    catalog, done = Catalog.load(data), _parts(folder)
    vectors, model = None, None
    if source == "decoded":
        vectors, model = vectors_of(run, data).embeddings, decoder_of(run)
    for first in range(0, catalog.num_items, PART_ITEMS):
        name = f"part-{first:012d}"
        if name in done:
            continue
        stop = min(first + PART_ITEMS, catalog.num_items)
        if model is None or vectors is None:
            texts = catalog.texts(first, stop)
        else:
            texts = spoken(model, vectors[first:stop], max_tokens)
        table = pa.table({"item_id": catalog.item_ids[first:stop], "text": texts}, schema=ANCHORS)
        write_table(table, folder, name)


def _parts(folder: str) -> set[str]:
    if not exists(folder):
        return set()
    return {path.rsplit("/", 1)[-1].removesuffix(".parquet") for path in table_files(folder)}


def decoder_of(run: str) -> KarmaModel:
    """Return a run's model with the decoder that Task 2 shares with the user's; raises InputError
    when the run has none in its bundle."""
    bundle = load_bundle(served(run).bundle, encodes_items=False)
    if not isinstance(bundle.interest, InterestModel):
        raise InputError("--vectors", run, "is a baseline over item ids and decodes no text")
    if load_lm_head(join(served(run).bundle, USER_DECODER), empty=True) is not None:
        raise InputError(
            "--vectors", run, "has an output head of its own, which its bundle leaves out, so it "
            "decodes no text there: take ranking.anchors=words",
        )  # fmt: skip
    return KarmaModel(bundle.interest, bundle.tokenizer, decodes=False).eval()


def spoken(model: KarmaModel, vectors: NDArray[np.float32], max_tokens: int) -> list[str]:
    """Return the text that a model decodes from each item vector alone.  # [I, D] -> I texts"""
    texts: list[str] = []
    for start in range(0, len(vectors), AT_ONCE):
        part = torch.from_numpy(np.asarray(vectors[start : start + AT_ONCE], np.float32))
        texts += model.speak(part, max_tokens=max_tokens)
    return texts
