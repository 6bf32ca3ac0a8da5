"""GGUF files of tiny models, written by the package gguf as llama.cpp's converter writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests import tiny

CLASSES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
LEAVES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


def whole(family: str, *, tied: bool = True, seed: int = 0, **settings: Any) -> nn.Module:
    """A random language model with the vocabulary of the tiny tokenizer."""
    config, model = CLASSES[family]
    shape = {
        "vocab_size": len(tiny.tokenizer().get_vocab()),  # type: ignore[attr-defined]
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 96, "tie_word_embeddings": tied,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e4}, "rms_norm_eps": 1e-5,
        **({"head_dim": 32} if family == "qwen3" else {}), **settings,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        built: nn.Module = model(config(**shape, attn_implementation="eager")).eval()
        with torch.no_grad():
            for value in built.parameters():
                value.add_(0.1 * torch.randn(value.shape))
    return built


def write(
    file: Path,
    model: Any,
    *,
    quantised: bool = False,
    extra: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray] | None = None,
    without: str = "",
    pre: str = "smollm",
    sentence_piece: bool = False,
) -> None:
    """Write a model; `extra` metadata, further `tensors`, and one that is left out, spoil it."""
    config = model.config
    family, head = config.model_type, getattr(config, "head_dim", None) or 16
    writer = gguf.GGUFWriter(str(file), family)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(head)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_vocab_size(config.vocab_size)
    if sentence_piece:
        _add_sentence_piece(writer, config.vocab_size)
    else:
        _add_tokenizer(writer, pre)
    for name, value in (extra or {}).items():
        add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}
        add.get(type(value), writer.add_float32)(name, value)
    for name, value in model.named_parameters():
        _add_weight(writer, config, name, value.detach().numpy(), quantised, without)
    for name, array in (tensors or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: Any, pre: str) -> None:
    described = json.loads(tiny.tokenizer().backend_tokenizer.to_str())
    vocabulary = described["model"]["vocab"]
    special = {token["content"] for token in described["added_tokens"]}
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    writer.add_tokenizer_model("gpt2")
    if pre:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    kinds = gguf.TokenType
    writer.add_token_types([kinds.CONTROL if t in special else kinds.NORMAL for t in tokens])
    writer.add_token_merges([" ".join(pair) for pair in described["model"]["merges"]])
    writer.add_eos_token_id(vocabulary["<|im_end|>"])
    writer.add_bos_token_id(vocabulary["<|im_start|>"])


def _add_sentence_piece(writer: Any, size: int) -> None:
    """A vocabulary as Llama 2 has it: bytes, letters, and the merges to the word `red`."""
    kinds = gguf.TokenType
    words = [*"▁redmug", "▁r", "ed", "▁red"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    types = [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, *256 * [kinds.BYTE]]
    tokens += [f"unused{number}" for number in range(size - len(tokens))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(number) for number in range(size)])
    writer.add_token_types([*types, *(size - len(types)) * [kinds.NORMAL]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _add_weight(
    writer: Any, config: Any, name: str, value: np.ndarray, quantised: bool, without: str
) -> None:
    stem, _, kind = name.rpartition(".")
    parts = stem.split(".")
    inside = parts[:2] == ["model", "layers"]
    leaf = LEAVES[".".join(parts[3:]) if inside else stem]
    named = f"blk.{parts[2]}.{leaf}.{kind}" if inside else f"{leaf}.{kind}"
    if config.model_type == "llama" and leaf in ("attn_q", "attn_k"):
        # llama.cpp rotates neighbouring dimensions of this family, so its rows are interleaved.
        heads = config.num_attention_heads if leaf == "attn_q" else config.num_key_value_heads
        halves = value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:])
        value = halves.swapaxes(1, 2).reshape(value.shape)
    if named == without:
        return
    if quantised and value.ndim == 2:
        q8 = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(named, gguf.quantize(value, q8), raw_dtype=q8)
    else:
        writer.add_tensor(named, np.ascontiguousarray(value))
