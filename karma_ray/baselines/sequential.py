"""Recommenders over item ids, SASRec and HSTU, trained and served by the same code as KARMA.

An item is a learned row of a table; a query is the mean of learned rows of its words. The input has
KARMA's `interleaved` layout (method 1.3), so both models read the same at every step:

    x_q1, e_1, x_q2, e_2, ..., x_qT, e_T        h_k is read at x_qk, which does not attend to e_k

The same table is used for input and target, as in both papers. An item without a training click
or negative keeps the direction of its random initialisation.

Legend: B windows, T steps, U items, V queries, D width, I items of the catalogue.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from karma_ray.baselines.hstu import Hstu
from karma_ray.baselines.sasrec import SasRec
from karma_ray.data.batch import Batch
from karma_ray.data.catalog import Catalog
from karma_ray.data.prompts import Tokenizer
from karma_ray.errors import InputError
from karma_ray.model.adapters import Score
from karma_ray.model.config import IdModelConfig, ModelConfig, ScoreConfig
from karma_ray.model.layout import build_layout
from karma_ray.model.recall import RecallModel

NETWORKS: dict[str, type[SasRec] | type[Hstu]] = {"sasrec": SasRec, "hstu": Hstu}


@dataclasses.dataclass(frozen=True)
class IdSizes:
    """Sizes of data and batches that determine the shape of a model over ids."""

    num_items: int  # I
    vocab_size: int  # tokens that queries are made of
    max_steps: int  # the longest window, including the current query


class IdRecommender(RecallModel):
    """Item table, query words, network and score: the part that serves."""

    catalog_key: Tensor

    def __init__(self, config: ModelConfig, sizes: IdSizes, seed: int = 0) -> None:
        """Raise InputError when the width is not a multiple of the number of heads."""
        super().__init__()
        self.config, self.sizes, width = config, sizes, config.ids.width
        if width % config.ids.num_heads:
            message = f"is not a multiple of model.ids.num_heads={config.ids.num_heads}"
            raise InputError("model.ids.width", width, message)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.items = nn.Embedding(sizes.num_items, width)
            self.words = nn.Embedding(sizes.vocab_size, width)
            self.no_query = nn.Parameter(torch.empty(width))
            for value in (self.items.weight, self.words.weight, self.no_query):
                nn.init.normal_(value, std=0.02)
            self.network = NETWORKS[config.kind](config.ids, 2 * sizes.max_steps)
            self.score = Score(config.score, width)
        self.register_buffer("catalog_key", torch.zeros(1, dtype=torch.long))

    @property
    def width(self) -> int:
        """Width D."""
        return self.config.ids.width

    def know(self, item_ids: Sequence[str]) -> None:
        """Record which items the rows of the table belong to."""
        self.catalog_key.fill_(_key(item_ids))

    def attach_catalog(self, catalog: Catalog, data_uri: str) -> None:
        """Raise InputError unless the catalogue has the items of the table, in its order: a model
        over ids has no vectors for other items."""
        if int(self.catalog_key) != _key(catalog.item_ids):
            message = f"has other items than the {self.sizes.num_items} for which "
            raise InputError("--data", data_uri, f"{message}{self.config.kind} learned vectors")

    def encode_items(self, tokens: Tensor, lengths: Tensor, rows: Tensor | None = None) -> Tensor:
        """Return the rows [U] of the table as e [U, D]; zero for row -1, which is no item.

        Tokens and lengths are not used.
        """
        if rows is None:
            raise ValueError("a model over ids needs catalogue rows besides the tokens")
        return cast(Tensor, self.items(rows.clamp(min=0))) * (rows >= 0)[:, None]

    def interest(self, batch: Batch, items: Tensor) -> Tensor:
        """Return h [B, T, D] at every step; `items` [U, D]."""
        one_slot = torch.ones_like(batch.group)
        layout = build_layout(
            "interleaved", 0, one_slot, 1, batch.group, batch.item_mask, batch.step_mask
        )
        pairs = [self._queries(batch)[batch.query_index], items[batch.item_index]]
        tokens = torch.stack(pairs, 2).flatten(1, 2)  # [B, 2 T, D]
        # Padding attends to itself, since a fully masked row has no softmax.
        itself = torch.eye(tokens.shape[1], dtype=torch.bool, device=tokens.device)
        states = self.network(tokens, layout.visible | itself, layout.positions)
        return cast(Tensor, states[:, 0::2])  # the slots of x_qk

    def _queries(self, batch: Batch) -> Tensor:
        """Return x_q [V, D] of the batch's unique queries."""
        tokens, lengths = batch.query_tokens, batch.query_lengths[:, None]
        real = torch.arange(tokens.shape[1], device=tokens.device) < lengths
        mean = (self.words(tokens) * real[..., None]).sum(1) / lengths.clamp(min=1)
        return torch.where(lengths > 0, mean, self.no_query)

    def facts(self) -> dict[str, Any]:
        """Return JSON facts from which `of_facts` builds the same architecture."""
        return {
            "kind": self.config.kind,
            "ids": dataclasses.asdict(self.config.ids),
            "score": dataclasses.asdict(self.config.score),
            "sizes": dataclasses.asdict(self.sizes),
        }

    @classmethod
    def of_facts(cls, facts: Mapping[str, Any]) -> IdRecommender:
        """Build the architecture that `facts` describes, with initial weights."""
        config = ModelConfig(
            kind=facts["kind"], ids=IdModelConfig(**facts["ids"]),
            score=ScoreConfig(**facts["score"]),
        )  # fmt: skip
        return cls(config, IdSizes(**facts["sizes"]))


class IdModel(nn.Module):
    """The recommender as a model for training, without any further modules."""

    def __init__(self, interest: IdRecommender, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.interest, self.tokenizer = interest, tokenizer

    def speak(self, interest: Tensor, requests: Batch | None = None) -> list[str]:
        """Return empty texts for h [R, D], since vectors of ids cannot be decoded."""
        return [""] * len(interest)


def _key(item_ids: Sequence[str]) -> int:
    digest = hashlib.sha256("\n".join(item_ids).encode()).digest()
    return int.from_bytes(digest[:7], "big")
