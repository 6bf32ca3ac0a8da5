"""What the families of plain text decoders share: rotary positions, gated layers, RMS norms.

A body keeps transformers' own embeddings, feed-forward layers and table of rotary positions; its
norms and attention are those of model/layers.py, with the same parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from karma_ray.model.backbones.checkpoints import ATTENTION, load_weights
from karma_ray.model.backbones.family import Family, LayerShape
from karma_ray.model.config import TinyBackboneConfig
from karma_ray.model.layers import Attention, fast_norm

LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class PlainText:
    """One such family: its name in messages and its classes in transformers."""

    name: str
    model: type[Any]
    config: type[Any]

    def family(self) -> Family:
        """Return the family's record."""
        return Family(
            model_type=str(self.config.model_type),
            load=self.load,
            save=save,
            stock=self.stock,
            layer_shape=layer_shape,
            linear_layers=LINEAR_LAYERS,
            tiny=self.build_tiny,
        )

    def build_tiny(self, shape: TinyBackboneConfig, vocab_size: int, seed: int) -> nn.Module:
        """Build a small body with random weights and the vocabulary size of its tokenizer."""
        config = self.config(
            vocab_size=vocab_size,
            hidden_size=shape.hidden_size,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_heads,
            num_key_value_heads=shape.num_key_value_heads,
            head_dim=shape.hidden_size // shape.num_heads,
            intermediate_size=shape.intermediate_size,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            attn_implementation=ATTENTION,
            use_cache=False,
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            body = self.model(config)
        use_fast_layers(body)
        return cast(nn.Module, body)

    def load(self, checkpoint: str, field: str) -> nn.Module:
        """Load a body from a folder or hub name of this family."""
        body = load_weights(self.model, self.name, checkpoint, field, attn_implementation=ATTENTION)
        body.config.use_cache = False
        use_fast_layers(body)
        return cast(nn.Module, body)

    def stock(self, body: nn.Module, attention: str) -> nn.Module:
        """Return the same parameters in transformers' own layers."""
        settings = cast(Any, body).config.to_dict()
        with torch.device("meta"):
            model = self.model(self.config(**settings, attn_implementation=attention))
        model.load_state_dict(body.state_dict(keep_vars=True), assign=True)
        model.rotary_emb = cast(Any, body).rotary_emb  # its tables are not in the state dict
        return cast(nn.Module, model.train(body.training))


def use_fast_layers(body: nn.Module) -> None:
    """Replace layers of a body by those of model/layers.py, keeping the same parameters."""
    model = cast(Any, body)
    for layer in model.layers:
        layer.input_layernorm = fast_norm(layer.input_layernorm)
        layer.post_attention_layernorm = fast_norm(layer.post_attention_layernorm)
        layer.self_attn = Attention(layer.self_attn)
    model.norm = fast_norm(model.norm)


def save(body: nn.Module, folder: str) -> None:
    """Write config.json and model.safetensors; a body has no lm_head."""
    cast(Any, body).save_pretrained(folder, safe_serialization=True)


def layer_shape(config: Any) -> LayerShape:
    """Return the shapes of grouped-query attention and a gated feed-forward layer."""
    width, inner = config.hidden_size, config.intermediate_size
    # Not every configuration names the width of a head.
    head = getattr(config, "head_dim", None) or width // config.num_attention_heads
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    attention = ((width, queries), (width, keys), (width, keys), (queries, width))
    return LayerShape((*attention, *3 * ((width, inner),)), queries)
