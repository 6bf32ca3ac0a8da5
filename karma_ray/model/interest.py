"""What serves: item encoder, user decoder and score. No head, no decoder of text.

Legend: B windows, T steps, U items, L tokens, D width.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from karma_ray.data.batch import Batch
from karma_ray.data.prompts import SpecialIds, Tokenizer
from karma_ray.model.adapters import Score
from karma_ray.model.backbone import hidden_size, load_body
from karma_ray.model.config import ModelConfig
from karma_ray.model.item_encoder import ItemEncoder
from karma_ray.model.lora import adapt, parse_rank
from karma_ray.model.user_decoder import Prefix, UserDecoder


class InterestModel(nn.Module):
    """E_phi, D_theta and their score (METHOD 1.11's stripped graph)."""

    def __init__(
        self, config: ModelConfig, item_body: nn.Module, user_body: nn.Module,
        tokenizer: Tokenizer, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.config = config
        width = hidden_size(user_body)
        prompt = tokenizer([config.user_decoder.prompt], add_special_tokens=False)["input_ids"][0]
        words = config.item_encoder.instruction
        instruction = tokenizer([words], add_special_tokens=False)["input_ids"][0] if words else []
        self.end_of_text = SpecialIds.of(tokenizer).end_of_text
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.item_encoder = ItemEncoder(
                item_body, config.item_encoder, width, instruction, seed
            )
            self.user_decoder = UserDecoder(user_body, config.user_decoder, prompt)
            self.score = Score(config.score, width)

    @classmethod
    def build(cls, config: ModelConfig, tokenizer: Tokenizer, seed: int = 0) -> InterestModel:
        """Load both bodies from their checkpoints; `config.peft` may put adapters into them."""
        rank = parse_rank(config.peft)
        item = load_body(config.item_encoder.checkpoint, "model.item_encoder.checkpoint")
        user = load_body(config.user_decoder.checkpoint, "model.user_decoder.checkpoint")
        if rank is not None:
            adapt(item, rank, seed)
            adapt(user, rank, seed + 1)
        return cls(config, item, user, tokenizer, seed)

    @property
    def width(self) -> int:
        """D."""
        return hidden_size(self.user_decoder.body)

    def encode_items(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Tokens [U, L], lengths [U] -> e [U, D]."""
        return cast(Tensor, self.item_encoder(tokens, lengths))

    def prefix(self, batch: Batch, items: Tensor) -> Prefix:
        """The user decoder's input of a batch; `items` [U, D]."""
        queries = None
        if self.config.user_decoder.query_mode == "encoder":
            queries = self._encode_queries(batch)
        return self.user_decoder.prefix(batch, items, queries)

    def interest(self, batch: Batch, items: Tensor) -> Tensor:
        """Next-interest embeddings h [B, T, D] at every step; `items` [U, D]."""
        prefix = self.prefix(batch, items)
        return self.user_decoder.interest(self.user_decoder.run(prefix), prefix.layout)

    def last_interest(self, batch: Batch, items: Tensor) -> Tensor:
        """h [B, D] at the last existing step of each window (a request's current query)."""
        last = batch.step_mask.sum(1) - 1
        rows = torch.arange(len(last), device=last.device)
        return self.interest(batch, items)[rows, last]

    def query_vectors(self, interest: Tensor) -> Tensor:
        """h -> the vectors a request searches with, float32."""
        return self.score.query_vectors(interest)

    def index_vectors(self, items: Tensor) -> Tensor:
        """e -> the vectors an index holds, float32."""
        return self.score.index_vectors(items)

    def _encode_queries(self, batch: Batch) -> Tensor:
        rows = torch.arange(len(batch.query_lengths), device=batch.query_lengths.device)
        closed = torch.nn.functional.pad(batch.query_tokens, (0, 1), value=self.end_of_text)
        closed[rows, batch.query_lengths] = self.end_of_text
        return self.encode_items(closed, batch.query_lengths + 1)
