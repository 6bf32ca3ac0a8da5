"""Recommenders over item ids: SASRec and HSTU, in the harness that KARMA trains and serves in.

An item is a learned row of a table, a query the mean of its words' learned rows. They are laid out
as KARMA's `interleaved` input is (METHOD 1.3), so both models see exactly the same, at every step:

    x_q1, e_1, x_q2, e_2, ..., x_qT, e_T        h_k is read at x_qk, which has not seen e_k

The same table is input and target, as both papers have it. An item that no training click or
negative ever touched keeps the direction it was drawn with.

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
    """What of data and batches decides the shape of a model over ids."""

    num_items: int  # I
    vocab_size: int  # tokens that queries are made of
    max_steps: int  # the longest window, its current query included


class IdRecommender(RecallModel):
    """Item table, query words, network and score: what serves."""

    catalog_key: Tensor

    def __init__(self, config: ModelConfig, sizes: IdSizes, seed: int = 0) -> None:
        """Raises InputError when the width is no multiple of the number of heads."""
        super().__init__()
        self.config, self.sizes, width = config, sizes, config.ids.width
        if width % config.ids.num_heads:
            message = f"is no multiple of model.ids.num_heads={config.ids.num_heads}"
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
        """D."""
        return self.config.ids.width

    def know(self, item_ids: Sequence[str]) -> None:
        """Note whose vectors the rows of the table are."""
        self.catalog_key.fill_(_key(item_ids))

    def attach_catalog(self, catalog: Catalog, data_uri: str) -> None:
        """Raises InputError unless the catalogue's rows are those of the table: a model over ids
        knows nothing of other items."""
        if int(self.catalog_key) != _key(catalog.item_ids):
            message = f"holds other items than the {self.sizes.num_items} that {self.config.kind} "
            raise InputError("--data", data_uri, message + "learned vectors of")

    def encode_items(self, tokens: Tensor, lengths: Tensor, rows: Tensor | None = None) -> Tensor:
        """The rows [U] of the table -> e [U, D]; zero at row -1, where there is no item.

        Tokens and lengths are not looked at.
        """
        if rows is None:
            raise ValueError("a model over ids needs catalogue rows beside the tokens")
        return cast(Tensor, self.items(rows.clamp(min=0))) * (rows >= 0)[:, None]

    def interest(self, batch: Batch, items: Tensor) -> Tensor:
        """h [B, T, D] at every step; `items` [U, D]."""
        one_slot = torch.ones_like(batch.group)
        layout = build_layout(
            "interleaved", 0, one_slot, 1, batch.group, batch.item_mask, batch.step_mask
        )
        pairs = [self._queries(batch)[batch.query_index], items[batch.item_index]]
        tokens = torch.stack(pairs, 2).flatten(1, 2)  # [B, 2 T, D]
        # Padding sees itself: a row that sees nothing has no softmax.
        itself = torch.eye(tokens.shape[1], dtype=torch.bool, device=tokens.device)
        states = self.network(tokens, layout.visible | itself, layout.positions)
        return cast(Tensor, states[:, 0::2])  # where x_qk stands

    def _queries(self, batch: Batch) -> Tensor:
        """x_q [V, D] of the batch's unique queries."""
        tokens, lengths = batch.query_tokens, batch.query_lengths[:, None]
        real = torch.arange(tokens.shape[1], device=tokens.device) < lengths
        mean = (self.words(tokens) * real[..., None]).sum(1) / lengths.clamp(min=1)
        return torch.where(lengths > 0, mean, self.no_query)

    def facts(self) -> dict[str, Any]:
        """What `of_facts` builds the same architecture from; JSON-able."""
        return {
            "kind": self.config.kind,
            "ids": dataclasses.asdict(self.config.ids),
            "score": dataclasses.asdict(self.config.score),
            "sizes": dataclasses.asdict(self.sizes),
        }

    @classmethod
    def of_facts(cls, facts: Mapping[str, Any]) -> IdRecommender:
        """The architecture that `facts` described, with weights as initialised."""
        config = ModelConfig(
            kind=facts["kind"], ids=IdModelConfig(**facts["ids"]),
            score=ScoreConfig(**facts["score"]),
        )  # fmt: skip
        return cls(config, IdSizes(**facts["sizes"]))


class IdModel(nn.Module):
    """What trains: the recommender, and nothing that is train-only."""

    def __init__(self, interest: IdRecommender, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.interest, self.tokenizer = interest, tokenizer

    def speak(self, interest: Tensor, requests: Batch | None = None) -> list[str]:
        """Nothing, for each h [R, D]: vectors of ids cannot be read as words."""
        return [""] * len(interest)


def _key(item_ids: Sequence[str]) -> int:
    digest = hashlib.sha256("\n".join(item_ids).encode()).digest()
    return int.from_bytes(digest[:7], "big")
