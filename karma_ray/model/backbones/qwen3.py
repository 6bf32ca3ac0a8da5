"""The family Qwen3 (2505.09388): text bodies with normalised queries and keys."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from transformers import Qwen3Config, Qwen3Model

from karma_ray.data.prompts import SpecialTokens
from karma_ray.model.backbones.checkpoints import ATTENTION, load_weights
from karma_ray.model.backbones.family import Family, LayerShape
from karma_ray.model.config import TinyBackboneConfig
from karma_ray.model.layers import Attention, fast_norm


def build_tiny(config: TinyBackboneConfig, vocab_size: int, seed: int) -> Qwen3Model:
    """Build a small body with random weights and the vocabulary size of its tokenizer."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        body = Qwen3Model(
            Qwen3Config(
                vocab_size=vocab_size,
                hidden_size=config.hidden_size,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                num_key_value_heads=config.num_key_value_heads,
                head_dim=config.hidden_size // config.num_heads,
                intermediate_size=config.intermediate_size,
                max_position_embeddings=4096,
                tie_word_embeddings=True,
                attn_implementation=ATTENTION,
                use_cache=False,
            )
        )
    use_fast_layers(body)
    return body


def load(checkpoint: str, field: str) -> Qwen3Model:
    """Load a body from a folder or hub name of this family."""
    body = load_weights(Qwen3Model, "Qwen3", checkpoint, field, attn_implementation=ATTENTION)
    body.config.use_cache = False
    use_fast_layers(body)
    return cast(Qwen3Model, body)


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


def stock(body: nn.Module, attention: str) -> Qwen3Model:
    """Return the same parameters in transformers' own layers."""
    settings = cast(Any, body).config.to_dict()
    with torch.device("meta"):
        model = Qwen3Model(Qwen3Config(**settings, attn_implementation=attention))
    model.load_state_dict(body.state_dict(keep_vars=True), assign=True)
    model.rotary_emb = cast(Any, body).rotary_emb  # its tables are not in the state dict
    return model.train(body.training)


def layer_shape(config: Any) -> LayerShape:
    """Return the shapes of grouped-query attention and a gated feed-forward layer."""
    width, inner = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    attention = ((width, queries), (width, keys), (width, keys), (queries, width))
    return LayerShape((*attention, *3 * ((width, inner),)), queries)


QWEN3 = Family(
    model_type="qwen3",
    load=load,
    save=save,
    stock=stock,
    layer_shape=layer_shape,
    linear_layers=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    special=SpecialTokens("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    tiny=build_tiny,
)
