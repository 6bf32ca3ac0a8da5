"""Configuration of the model's parts and the switches of the method they concern.

Each Literal lists its choices, the default first in the method's table of switches.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class TinyBackboneConfig:
    """Shape of the Qwen3 built here when no checkpoint is given (`checkpoint=tiny`)."""

    hidden_size: int = 128
    """Width d."""
    num_layers: int = 2
    """Transformer layers."""
    num_heads: int = 4
    """Attention heads; head width is hidden_size / num_heads."""
    num_key_value_heads: int = 2
    """Key/value heads (grouped-query attention)."""
    intermediate_size: int = 384
    """Width of the feed-forward layer."""
    vocab_size: int = 4096
    """Upper bound of the BPE vocabulary trained on the catalogue."""


@dataclass(frozen=True)
class ItemEncoderConfig:
    """E_phi, equation 2."""

    checkpoint: str = "tiny"
    """`tiny`, a Hugging Face Qwen3 folder, or a hub name."""
    pool: Literal["eos", "emb_token", "mean"] = "eos"
    """Last hidden state of the end token, of a learned [ITEM] vector, or the mean of all."""
    instruction: str = ""
    """Text put before every item's text."""


@dataclass(frozen=True)
class UserDecoderConfig:
    """D_theta, equation 3."""

    checkpoint: str = "tiny"
    """`tiny`, a Hugging Face Qwen3 folder, or a hub name."""
    layout: Literal["interleaved", "items_only", "query_last"] = "interleaved"
    """Where queries enter and where h_t is read."""
    query_mode: Literal["embed_pool", "tokens", "encoder", "none"] = "embed_pool"
    """How a query becomes soft tokens; `tokens` needs layout query_last."""
    prompt: str = "user history:"
    """Task prompt in front of the history."""


@dataclass(frozen=True)
class ScoreConfig:
    """score(h, e), the same function in training, evaluation, index and serving."""

    kind: Literal["rms_dot", "dot", "cos_learned"] = "rms_dot"
    """`rms_dot`: scale * cosine; `dot`: plain dot product; `cos_learned`: learned logit scale."""
    scale: float = 32.0
    """Constant scale of `rms_dot` (the value of sqrt(d) at d = 1024)."""


@dataclass(frozen=True)
class DecodabilityConfig:
    """Task 1 (equation 6) and Task 2 (equation 7): train-only text decoding."""

    share_projector: bool = True
    """One projector P for history items, warm-up items and Task 2's h_t."""
    recon_cond: Literal["eq7", "fig1"] = "eq7"
    """Task 2 sees h_t only, or also the query between `<s>` and the text."""
    recon_decoder: str = "shared"
    """`shared`, `separate`, `frozen`, or `light:K` for a decoder of K layers."""
    recon_detach_h: bool = False
    """Null control: cut Task 2's gradient into h_t."""
    recon_token_dropout: float = 0.0
    """Share of Task 2's input tokens masked."""
    task1_see_readout: bool = True
    """Whether Task 1's text sees the read-out position itself."""
    max_target_tokens: int = 24
    """Tokens of the target's text that are decoded."""


@dataclass(frozen=True)
class ModelConfig:
    """All parts."""

    tiny: TinyBackboneConfig = field(default_factory=TinyBackboneConfig)
    """Shape behind `checkpoint=tiny`."""
    item_encoder: ItemEncoderConfig = field(default_factory=ItemEncoderConfig)
    """One embedding token per item."""
    user_decoder: UserDecoderConfig = field(default_factory=UserDecoderConfig)
    """Next-interest embedding."""
    score: ScoreConfig = field(default_factory=ScoreConfig)
    """Dot product and its normalisation."""
    decodability: DecodabilityConfig = field(default_factory=DecodabilityConfig)
    """Train-only decoders."""
    peft: str = "full"
    """`full`: every weight learns; `lora:R`: rank-R adapters on both backbones (2106.09685), at
    `training.new_module_lr` times the learning rate."""
