"""Vectors of texts by the run's pretrained LLM as it is, for the floors `llm` and `llm_affinity`.

A text's vector is the mean of the states of its tokens, whitened with the mean and the variances of
the whole catalogue, at length 1. Those of the items are computed once and kept in the cache, under
the content of all that they depend on.

Legend: I items, n texts, L tokens, D width of the LLM.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from karma_ray.artifacts import exists, join, locked, new_file, open_filesystem, value_hash
from karma_ray.baselines.llm import TextVectors
from karma_ray.config import Config
from karma_ray.data.catalog import Catalog
from karma_ray.data.pixels import NO_PICTURE
from karma_ray.data.prompts import Tokenizer, encode_texts
from karma_ray.data.tokens import catalog_tokens, tokenizer_hash
from karma_ray.model.backbone import hidden_size, load_item_body
from karma_ray.model.backbones.tokenizer import load_tokenizer
from karma_ray.model.config import ItemEncoderConfig
from karma_ray.model.device import this_device
from karma_ray.model.item_encoder import ItemEncoder
from karma_ray.node_cache import checkpoint_hash, known_hash
from karma_ray.pretrained import names_llm
from karma_ray.retrieval.encode import encode_catalog
from karma_ray.runs.plain_checkpoints import with_plain_checkpoints

LOG = logging.getLogger(__name__)
VERSION = 1
"""Raised when the code computes other vectors from the same input: older files are not found."""
BATCH_SLOTS = 4096
"""Slots of a padded batch that is encoded at once."""
MAX_FITTED = 200_000
"""Items that the whitening is fitted on at most, evenly spaced over a larger catalogue."""


@dataclass(frozen=True)
class LlmTexts:
    """An LLM without training, and the catalogue whose texts it encodes."""

    config: ItemEncoderConfig
    max_tokens: int
    items_uri: str
    cache: str
    precision: str = "bfloat16"

    @classmethod
    def of(cls, config: Config, items_uri: str, cache: str) -> LlmTexts | None:
        """Return those of a run; None if its configuration names no pretrained LLM."""
        if not names_llm(config):
            return None
        encoder = with_plain_checkpoints(config, cache).model.item_encoder
        bare = ItemEncoderConfig(
            encoder.checkpoint, pool="mean", layers=encoder.layers, modality=encoder.modality,
            image_size=encoder.image_size,
        )  # fmt: skip
        return cls(bare, config.collate.max_item_tokens, items_uri, cache)

    def key(self) -> str:
        """Return a hash of everything that the vectors depend on."""
        return value_hash({
            "version": VERSION,
            "items": known_hash(join(self.items_uri, "items")),
            "weights": checkpoint_hash(self.config.checkpoint),
            "tokenizer": tokenizer_hash(self.tokenizer),
            "layers": self.config.layers,
            "max_tokens": self.max_tokens,
            "precision": self.precision,
        })  # fmt: skip

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the checkpoint."""
        return cast(
            Tokenizer, load_tokenizer(self.config.checkpoint, "model.item_encoder.checkpoint")
        )

    @cached_property
    def encoder(self) -> ItemEncoder:
        """The LLM with mean pooling, not yet whitened."""
        body = load_item_body(self.config)
        with torch.random.fork_rng():  # a run draws the same numbers whether the file exists
            encoder = ItemEncoder(body, self.config, hidden_size(body), [], 0)
        return encoder.requires_grad_(False).to(this_device()).eval()

    def vectors(self) -> TextVectors:
        """Return the vectors of all items, computed unless the cache has them."""
        path = join(self.cache, f"text-vectors-{self.key()}.npz")
        with locked(path):
            if not exists(path):
                self._make(path)
        fs, place = open_filesystem(path)
        with fs.open(place, "rb") as source, np.load(source) as found:
            items, mean, whitener = (found[name] for name in ("items", "mean", "whitener"))

        def encode(texts: Sequence[str]) -> NDArray[np.float32]:
            states = self._pooled(*encode_texts(self.tokenizer, texts, self.max_tokens))
            return _whitened(states, torch.from_numpy(mean), torch.from_numpy(whitener))

        return TextVectors(items, encode)

    def _make(self, path: str) -> None:
        tokens, lengths = catalog_tokens(
            Catalog.load(self.items_uri), self.tokenizer, self.max_tokens
        )
        LOG.info("encoding %d items with %s as it is", len(lengths), self.config.checkpoint)
        states = self._pooled(tokens, lengths)
        encoder = self.encoder
        fitted = states[:: -(-len(states) // MAX_FITTED)]
        encoder.whiten_states(fitted.to(encoder.mean.device))
        mean, whitener = encoder.mean.cpu(), encoder.output.weight.cpu()
        items = _whitened(states, mean, whitener)
        with new_file(path) as sink:
            np.savez(sink, items=items, mean=mean.numpy(), whitener=whitener.numpy())

    def _pooled(self, tokens: np.ndarray, lengths: np.ndarray) -> torch.Tensor:
        """Return the pooled states [n, D] float32 of right-padded tokens [n, L]."""
        found = encode_catalog(
            self.encoder, tokens, lengths, max(1, BATCH_SLOTS // int(lengths.max(initial=1))),
            self.precision, np.full(len(lengths), NO_PICTURE), self.encoder.pooled, progress=True,
        )  # fmt: skip
        return torch.from_numpy(found)


@torch.no_grad()
def _whitened(
    states: torch.Tensor, mean: torch.Tensor, whitener: torch.Tensor
) -> NDArray[np.float32]:  # [n, D], [D], [D, D] -> [n, D]
    """Return vectors of length 1."""
    return functional.normalize((states - mean) @ whitener.T, dim=1).numpy()
