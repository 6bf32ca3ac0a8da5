"""Whether a checkpoint can be computed exactly as it was trained, by its config.json.

transformers loads many checkpoints with a warning or none and computes something else: a key that
its class does not know is ignored. So what a configuration asks for and the layers here do not do
is looked for by name, also under the names that other families give it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

ROTARY_TYPES = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary positions whose table depends on the configuration alone. Those of others
(dynamic, longrope) depend on the longest text of a batch."""
ROTARY_SETTINGS = {
    "rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings",
    "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor", "mscale",
    "mscale_all_dim", "truncate", "partial_rotary_factor",
}  # fmt: skip
FACTORS = (
    "embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling",
    "logit_scale", "scale_emb", "scale_depth",
)  # fmt: skip
"""Numbers that some families multiply states, scores or logits with."""


def own_code(facts: Mapping[str, Any]) -> str | None:
    """Return why a checkpoint of any family cannot be loaded by transformers alone, or None."""
    for name in facts.get("auto_map") or {}:
        if name.startswith(("AutoModel", "AutoConfig")):
            return f"brings code of its own (auto_map: {name}), and remote code is not run"
    if quantised := facts.get("quantization_config"):
        method = quantised.get("quant_method", "?") if isinstance(quantised, Mapping) else quantised
        return f"is quantised ({method}): take the checkpoint that it was made from, or a GGUF file"
    return None


def inexact(facts: Mapping[str, Any]) -> str | None:
    """Return what a plain text body of this config.json would be computed without, or None."""
    return own_code(facts) or next(_reasons(facts), None)


def _reasons(facts: Mapping[str, Any]) -> Iterator[str]:
    kinds = set(facts.get("layer_types") or ()) - {"full_attention"}
    if facts.get("use_sliding_window", facts.get("sliding_window") is not None) or kinds:
        named = "use_sliding_window=true" if facts.get("use_sliding_window") else "sliding_window"
        yield f"has a sliding window ({min(kinds, default=named)}), but attention here sees all"
    if facts.get("is_causal") is False or facts.get("use_bidirectional_attention"):
        yield "attends in both directions, but attention here is causal"
    for name, value in facts.items():
        if "softcap" in name and value:
            yield f"has soft-capped logits ({name}={value}), which are not computed here"
        if "qk_norm" in name and value:
            yield f"has norms of queries and keys that its family has not ({name}={value})"
        if name in FACTORS and value not in (None, 1):
            yield f"scales its states or logits ({name}={value}), which is not computed here"
    yield from _rotary_reasons(facts)


def _rotary_reasons(facts: Mapping[str, Any]) -> Iterator[str]:
    settings = facts.get("rope_parameters") or facts.get("rope_scaling") or {}
    for name, value in (*facts.items(), *settings.items()):
        if "interleave" in name and value:
            yield f"rotates neighbouring dimensions (interleaved RoPE, {name}={value})"
        if "no_rope" in name and value:
            yield f"has layers without rotary positions ({name}), but here every layer has them"
        if name in ("partial_rotary_factor", "rotary_pct") and value not in (None, 1):
            yield f"rotates a part of each head ({name}={value}), but here all of it is rotated"
    kind = settings.get("rope_type", settings.get("type", "default"))
    choices = ", ".join(ROTARY_TYPES)
    if kind not in ROTARY_TYPES:
        yield f"has rotary positions of type {kind!r}; computed exactly are {choices}"
    for name in sorted(set(settings) - ROTARY_SETTINGS):
        yield f"has rotary positions with {name}={settings[name]}, which is not computed here"
