"""The model that serves: item encoder, user decoder and score, without any head or text decoder.

Legend: B windows, T steps, U items, L tokens, D width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from karma_ray.data.batch import Batch, host_of, upload
from karma_ray.data.catalog import Catalog
from karma_ray.data.pixels import NO_PICTURE
from karma_ray.data.prompts import SpecialIds, Tokenizer
from karma_ray.model.adapters import Score
from karma_ray.model.backbone import hidden_size, load_item_body, load_user_body
from karma_ray.model.config import GeneratorConfig, ModelConfig
from karma_ray.model.frozen_layers import num_frozen
from karma_ray.model.generator import Generator
from karma_ray.model.item_encoder import ItemEncoder, instruction_tokens
from karma_ray.model.lora import adapt, parse_rank
from karma_ray.model.recall import RecallModel
from karma_ray.model.user_decoder import Prefix, UserDecoder


class InterestModel(RecallModel):
    """E_phi, D_theta and their score (the stripped graph of method 1.11).

    Models of Table 2 also have a generator of search vectors.
    """

    generator: Generator | None

    def __init__(
        self, config: ModelConfig, item_body: nn.Module, user_body: nn.Module,
        tokenizer: Tokenizer, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.config = config
        width, lexical = hidden_size(user_body), config.item_encoder.lexical
        prompt = tokenizer([config.user_decoder.prompt], add_special_tokens=False)["input_ids"][0]
        instruction = instruction_tokens(config.item_encoder, tokenizer)
        self.end_of_text = SpecialIds.of(tokenizer).end_of_text
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.item_encoder = ItemEncoder(
                item_body, config.item_encoder, width, instruction, seed
            )
            self.user_decoder = UserDecoder(user_body, config.user_decoder, prompt, lexical)
            self.score = Score(config.score, width + lexical)
        self.generate_with(config.generator, seed)

    @classmethod
    def build(cls, config: ModelConfig, tokenizer: Tokenizer, seed: int = 0) -> InterestModel:
        """Load both bodies from their checkpoints, with adapters if `config.peft` asks for them."""
        rank = parse_rank(config.peft)
        encoder = config.item_encoder
        item = load_item_body(encoder)
        user = load_user_body(config.user_decoder)
        if rank is not None:
            adapt(item, rank, seed, num_frozen(encoder, item))
            adapt(user, rank, seed + 1)
        return cls(config, item, user, tokenizer, seed)

    @property
    def width(self) -> int:
        """D: the decoder's width plus the lexical dimensions."""
        return self.learned_width + self.config.item_encoder.lexical

    @property
    def learned_width(self) -> int:
        """The decoder's width."""
        return hidden_size(self.user_decoder.body)

    def generate_with(self, config: GeneratorConfig, seed: int) -> None:
        """Search with the output of a new generator, or with h itself for `kind=none`."""
        self.config, self.generator = replace(self.config, generator=config), None
        if config.kind != "none":
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                self.generator = Generator(config, self.width)

    def attach_catalog(self, catalog: Catalog, data_uri: str) -> None:
        """Load the pictures of a data folder's items; a text encoder needs none."""
        self.item_encoder.attach_catalog(catalog, data_uri)

    def encode_items(self, tokens: Tensor, lengths: Tensor, rows: Tensor | None = None) -> Tensor:
        """Encode tokens [U, L] of lengths [U] as e [U, D]; multimodal encoders need `rows` [U]."""
        return cast(Tensor, self.item_encoder(tokens, lengths, rows))

    def prefix(self, batch: Batch, items: Tensor) -> Prefix:
        """Return the user decoder's input for a batch; `items` [U, D]."""
        queries = self.encoded_queries(batch.query_tokens, batch.query_lengths)
        return self.user_decoder.prefix(batch, items, queries)

    def interest(self, batch: Batch, items: Tensor) -> Tensor:
        """Return the next-interest embeddings h [B, T, D] of every step; `items` [U, D]."""
        prefix = self.prefix(batch, items)
        return self.user_decoder.interest(self.user_decoder.run(prefix), prefix)

    def decodable(self, interest: Tensor) -> Tensor:
        """Return what Task 2 decodes for h [..., D]: h itself, or with `recon_src=x0` the
        generator's estimate of the clicked item's embedding."""
        if self.generator is None or self.generator.config.recon_src == "condition":
            return interest
        return self.generator.estimate(interest)

    @property
    def is_random(self) -> bool:
        """Whether search vectors are drawn at random."""
        return self.generator is not None and self.generator.is_random

    def search_vectors(self, interest: Tensor, keys: np.ndarray | None = None) -> Tensor:
        """Map h [B, D] to the vectors that a request searches with [B, K, D], float32."""
        if self.generator is not None:
            return self.query_vectors(self.generator.search_with(interest, keys))
        return super().search_vectors(interest, keys)

    def encoded_queries(self, tokens: Tensor, token_counts: Tensor) -> Tensor | None:
        """Return the embeddings [V, D] of queries by the item encoder, if the decoder reads them.

        `tokens` [V, Lq] and their counts [V].
        """
        if self.config.user_decoder.query_mode != "encoder":
            return None
        device, lengths = token_counts.device, host_of(token_counts) + 1
        rows = torch.arange(len(lengths), device=device)
        closed = torch.nn.functional.pad(tokens, (0, 1), value=self.end_of_text)
        closed[rows, token_counts] = self.end_of_text
        none = upload(torch.full_like(lengths, NO_PICTURE), device)
        return self.encode_items(closed, upload(lengths, device), none)
