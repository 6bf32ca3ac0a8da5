"""Named shapes of the two LLMs; random weights cost the same to train as learned ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import LlamaConfig, LlamaModel, Qwen3Config, Qwen3Model

from karma_ray.data.prompts import SpecialTokens
from karma_ray.model.backbones.checkpoints import ATTENTION
from karma_ray.model.backbones.plain_text import use_fast_layers

QWEN3 = {
    "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
    "vocab_size": 151_936, "rope_theta": 1e6, "tie_word_embeddings": True,
}  # fmt: skip
BODIES: dict[str, dict[str, Any]] = {
    "0.6b": {**QWEN3, "hidden_size": 1024, "intermediate_size": 3072},
    "1.7b": {**QWEN3, "hidden_size": 2048, "intermediate_size": 6144},
    "smollm2-135m": {
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "head_dim": 64, "hidden_size": 576, "intermediate_size": 1536, "vocab_size": 49_152,
        "rope_theta": 1e5, "tie_word_embeddings": True,
    },
}  # fmt: skip
SHAPES: dict[str, tuple[str, str] | None] = {
    "tiny": None,
    "smollm2-135m": ("smollm2-135m", "smollm2-135m"),
    "qwen3-0.6b": ("0.6b", "0.6b"),
    "qwen3-0.6b+1.7b": ("0.6b", "1.7b"),
    "qwen3-1.7b+0.6b": ("1.7b", "0.6b"),
}
"""Item encoder and user decoder."""


def build_body(name: str, num_layers: int = 0) -> nn.Module:
    """A body of that shape with random weights, of fewer layers if `num_layers` says so."""
    shape = BODIES[name]
    layers = num_layers or shape["num_hidden_layers"]
    settings = {**shape, "num_hidden_layers": layers, "use_cache": False}
    settings["attn_implementation"] = ATTENTION
    body: nn.Module
    if name.startswith("smollm2"):
        body = LlamaModel(LlamaConfig(**settings))
    else:
        body = Qwen3Model(Qwen3Config(**settings))
    use_fast_layers(body)
    return body


@dataclass(frozen=True)
class Words:
    """What a model asks of its tokenizer, written down."""

    ids: dict[str, int]
    prompts: dict[str, list[int]]
    size: int

    def __call__(self, text: list[str], **options: Any) -> dict[str, list[list[int]]]:
        """Token ids of the prompts."""
        return {"input_ids": [self.prompts[line] for line in text]}

    @property
    def text_marks(self) -> SpecialTokens:
        """The special tokens, in the order in which `ids` has them."""
        return SpecialTokens(*self.ids)

    def convert_tokens_to_ids(self, tokens: str) -> int:
        """Id of a special token."""
        return self.ids[tokens]

    def decode(self, token_ids: Any, **options: Any) -> str:
        """Nothing is spoken here."""
        return ""
