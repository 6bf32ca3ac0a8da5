"""The outputs of the item encoder's frozen layers, computed once before any training.

The file lies in the cache that all runs share, under the content of all that it depends on. Each
machine fetches it once from a remote cache, to map it into memory; where the cache is the disk of
another machine, a worker makes its own.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from tqdm import tqdm

from karma_ray.artifacts import (
    exists,
    join,
    read_json,
    value_hash,
    write_json,
)
from karma_ray.config import Config
from karma_ray.data.catalog import Catalog
from karma_ray.data.prompts import SpecialIds, Tokenizer
from karma_ray.data.tokens import catalog_tokens, tokenizer_hash
from karma_ray.model.backbone import hidden_size, load_item_body
from karma_ray.model.backbones.tokenizer import load_tokenizer
from karma_ray.model.config import ItemEncoderConfig
from karma_ray.model.device import this_device
from karma_ray.model.frozen_states import KINDS, PORTION, FrozenStates, write_states
from karma_ray.model.item_encoder import ItemEncoder, instruction_tokens
from karma_ray.node_cache import checkpoint_hash, fetch, known_hash, upload
from karma_ray.node_disk import hold, node_folder
from karma_ray.retrieval.encode import autocast

LOG = logging.getLogger(__name__)
VERSION = 1
"""Raised when the code computes other states from the same input: older files are not found."""
BATCH_SLOTS = 16_384
"""Slots of a padded batch that is encoded at once."""


@dataclass(frozen=True)
class FrozenOutputs:
    """What the file of a run depends on, and where it is; sent to the workers as it stands."""

    encoder: ItemEncoderConfig
    tokenizer_folder: str
    items_uri: str
    max_item_tokens: int
    precision: str
    path: str = ""

    @classmethod
    def of(
        cls, config: Config, items_uri: str, tokenizer_folder: str, cache: str
    ) -> FrozenOutputs | None:
        """Name the file of a run in `cache`; None if the run trains all layers of the encoder."""
        encoder = config.model.item_encoder
        if config.model.kind != "karma" or not encoder.train_layers:
            return None
        bare = replace(encoder, lexical=0, block="words")  # blocks are computed beside the layers
        outputs = cls(
            bare, tokenizer_folder, items_uri, config.collate.max_item_tokens,
            config.training.precision,
        )  # fmt: skip
        return replace(outputs, path=join(cache, f"states-{value_hash(outputs.key())}.npy"))

    @property
    def here(self) -> Path:
        """The file that this machine maps into memory."""
        name = self.path.rpartition("/")[2]
        return node_folder() / name if "://" in self.path else Path(self.path)

    def key(self) -> dict[str, object]:
        """Return everything that the states depend on; checkpoint and tables by their content."""
        return {
            "version": VERSION,
            "items": known_hash(join(self.items_uri, "items")),
            "weights": checkpoint_hash(self.encoder.checkpoint),
            "layers": self.encoder.layers,
            "train_layers": self.encoder.train_layers,
            "tokenizer": tokenizer_hash(tokenizer := self.tokenizer()),
            "end_of_text": SpecialIds.of(tokenizer).end_of_text,
            "instruction": self.encoder.instruction,
            "max_item_tokens": self.max_item_tokens,
            "precision": self.precision,
        }

    def tokenizer(self) -> Tokenizer:
        """Load the tokenizer of the run."""
        return cast(Tokenizer, load_tokenizer(self.tokenizer_folder))

    def texts(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the catalogue's tokens [I, L] and lengths [I], shared by a node's processes."""
        return catalog_tokens(Catalog.load(self.items_uri), self.tokenizer(), self.max_item_tokens)

    def portions(self, device: torch.device | str | None = None) -> FrozenPortions:
        """Load the frozen layers; the default device is this process's GPU, if it has one."""
        body = load_item_body(self.encoder)
        words = instruction_tokens(self.encoder, self.tokenizer())
        with torch.random.fork_rng():  # a run draws the same numbers whether the file exists
            encoder = ItemEncoder(body, self.encoder, hidden_size(body), words, 0)
        return FrozenPortions(encoder.to(this_device(device)).eval(), *self.texts(), self.precision)

    def make(self, encode: EncodeRemotely | None = None) -> None:
        """Make the file unless it exists; `encode` computes its portions in other processes."""
        if exists(self.path):
            return
        here = self.portions(None if encode is None else "cpu")
        if not here.encoder.num_frozen:
            return
        counts = here.lengths + len(here.encoder.instruction)
        width = hidden_size(here.encoder.body)
        size = counts.sum() * width * KINDS[self.precision].itemsize / 1e9
        LOG.info("frozen layers: computing the states of %d items, %.1f GB", len(counts), size)

        def portions(missing: list[int]) -> Iterator[tuple[int, np.ndarray]]:
            found = here.encoded(missing) if encode is None else encode(self, width, missing)
            total = -(-len(counts) // PORTION)
            yield from tqdm(
                found, total=total, initial=total - len(missing), unit="portion", disable=None
            )

        started = time.perf_counter()
        hold(self.here)
        write_states(str(self.here), counts, width, self.precision, portions)
        if "://" in self.path:
            upload(self.here, self.path)
        write_json({"seconds": round(time.perf_counter() - started, 1)}, self._facts)

    @property
    def _facts(self) -> str:
        return f"{self.path.removesuffix('.npy')}.json"

    def seconds(self) -> float | None:
        """Return how long the last of the processes took that made the file; None if unknown."""
        return float(read_json(self._facts)["seconds"]) if exists(self._facts) else None

    def attach(self, encoder: ItemEncoder) -> None:
        """Let an encoder of the same weights read the file, which is made if it is not here."""
        if encoder.num_frozen:
            self.make()
            if "://" in self.path:
                fetch(self.path, self.here)
            counts = self.texts()[1] + len(encoder.instruction)
            encoder.states = FrozenStates.open(str(self.here), counts)


EncodeRemotely = Callable[[FrozenOutputs, int, list[int]], Iterator[tuple[int, np.ndarray]]]
"""(outputs, width, numbers of portions) -> (number, states) of each, in any order."""


@dataclass(frozen=True)
class FrozenPortions:
    """Computes portions of a file."""

    encoder: ItemEncoder
    tokens: np.ndarray  # [I, L]
    lengths: np.ndarray  # [I]
    precision: str

    def encoded(self, numbers: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        """Yield each portion's number and states [n, D], as the file holds them."""
        for number in numbers:
            yield number, self.portion(number)

    @torch.inference_mode()
    def portion(self, number: int) -> np.ndarray:
        """Return the states [n, D] of one portion.

        Batches hold items of about equal length, so little of the work is padding.
        """
        rows = slice(number * PORTION, (number + 1) * PORTION)
        tokens, lengths, half = self.tokens[rows], self.lengths[rows], self.precision == "bfloat16"
        device = next(self.encoder.parameters()).device
        counts = lengths + len(self.encoder.instruction)
        starts = np.append(0, counts.cumsum())
        made = np.empty((starts[-1], hidden_size(self.encoder.body)), KINDS[self.precision])
        order = np.argsort(counts, kind="stable")
        size = max(1, BATCH_SLOTS // int(counts.max()))
        for begin in range(0, len(order), size):
            some = order[begin : begin + size]
            texts = torch.from_numpy(tokens[some, : lengths[some].max()].astype(np.int64))
            with autocast(device, self.precision):
                found = self.encoder.lower_states(
                    texts.to(device), torch.from_numpy(lengths[some]).to(device)
                )
            stored = found.to(torch.bfloat16).view(torch.int16) if half else found.float()
            parts = np.split(stored.cpu().numpy(), counts[some].cumsum()[:-1])
            for place, part in zip(some, parts, strict=True):
                made[starts[place] : starts[place + 1]] = part
        return made
