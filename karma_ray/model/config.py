"""Configuration of the model's parts and the switches of the method they concern.

Each Literal lists its choices, the default first in the method's table of switches.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from karma_ray.errors import InputError
from karma_ray.model.denoiser import DenoiserConfig
from karma_ray.ranges import Count, CountOrZero, Positive, Share, ShareBelowOne, check_ranges


@dataclass(frozen=True)
class TinyBackboneConfig:
    """Shape of the backbone built here when no checkpoint is given (`checkpoint=tiny`)."""

    hidden_size: Count = 128
    """Width d."""
    num_layers: Count = 2
    """Transformer layers."""
    num_heads: Count = 4
    """Attention heads; head width is hidden_size / num_heads."""
    num_key_value_heads: Count = 2
    """Key/value heads (grouped-query attention)."""
    intermediate_size: Count = 384
    """Width of the feed-forward layer."""
    vocab_size: Count = 4096
    """Upper bound of the BPE vocabulary trained on the catalogue."""


@dataclass(frozen=True)
class ItemEncoderConfig:
    """E_phi, equation 2."""

    checkpoint: str = "tiny"
    """`tiny`, a Hugging Face folder of a family in model/backbones/, or a hub name."""
    pool: Literal["eos", "emb_token", "mean"] = "eos"
    """Last hidden state of the end token, of a learned [ITEM] vector, or the mean of all."""
    instruction: str = ""
    """Text put before every item's text."""
    lexical: CountOrZero = 0
    """Further dimensions of e that hold the item's words, counted and not learned, and of h those
    of the history; for few clicks, which teach an encoder to forget the person."""
    modality: Literal["text", "multimodal"] = "text"
    """What of an item is read: its text, or its image and text (`checkpoint`:
    of a family that reads pictures)."""
    vision: Literal["full", "frozen"] = "full"
    """Whether the vision tower of a multimodal encoder learns where the encoder does."""
    image_size: Count = 64
    """Pixels of a side of the pictures read: a multiple of the family's block (32), each of
    which becomes a token."""


@dataclass(frozen=True)
class UserDecoderConfig:
    """D_theta, equation 3."""

    checkpoint: str = "tiny"
    """`tiny`, a Hugging Face folder of a family in model/backbones/, or a hub name."""
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
    scale: Positive = 32.0
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
    recon_text: Literal["own", "shuffled"] = "own"
    """Null control: Task 2 decodes the text of another decoded position's item, drawn anew in every
    batch: the same computation without its meaning."""
    recon_token_dropout: Share = 0.0
    """Share of Task 2's input tokens masked."""
    task1_see_readout: bool = True
    """Whether Task 1's text sees the read-out position itself."""
    max_target_tokens: Count = 24
    """Tokens of the target's text that are decoded."""


@dataclass(frozen=True)
class ImageryConfig:
    """The visual term (equation 8): train-only reconstruction of the target's visual features.

    Built when `objective.lambda_img` is not 0.
    """

    img_cond: Literal["both", "task1", "task2"] = "both"
    """Image queries stand behind the history (Task 1), behind h_t alone (Task 2), or both; L_img
    is then the mean of the two."""
    img_head: Literal["fm", "ddpm_eps", "ddpm_v", "ddpm_x0", "edm", "mse"] = "fm"
    """Flow matching, DDPM that predicts noise, velocity or the clean feature, EDM, or plain
    regression (control)."""
    img_sees_text: bool = False
    """Whether Task 1's image queries see the target's text, which gives the answer away."""
    img_connector: Literal[0, 1, 2] = 0
    """Bidirectional layers between the decoder's states at the image queries and the head."""
    img_draws: Count = 4
    """Times and noises drawn for each image in a step, at the head alone (MAR, 2406.11838, has
    four); regression draws none."""
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    """The head's network."""

    def check(self) -> None:
        """Raise InputError on numbers that mean nothing, and what the head does not know."""
        check_ranges(self, "model.imagery")
        self.denoiser.check("model.imagery.denoiser", self.img_head)


@dataclass(frozen=True)
class GeneratorConfig:
    """What a request searches with, generated from h_t by a small head (METHOD 1.12, Table 2).

    `objective.gen_mode` says whether L_act stays beside the head's loss.
    """

    kind: Literal["none", "mse", "ddpm_eps", "ddpm_v", "ddpm_x0", "edm", "fm"] = "none"
    """h_t itself, its regression onto the clicked item's embedding, or a diffusion of it."""
    samples: Count = 1
    """Embeddings K drawn for a request."""
    agg: Literal["single", "mean", "union"] = "single"
    """One sample, the mean of K, or each item's best score over K (ComiRec, 2005.09347)."""
    steps: CountOrZero = 0
    """Steps of the sampler; 0: flow matching 25, DDIM 50, EDM 18."""
    draws: Count = 4
    """Times and noises drawn for each trained step, at the head alone; regression draws none."""
    recon_src: Literal["condition", "x0"] = "condition"
    """What Task 2 decodes: h_t, which the head is told, or the head's estimate in one step."""
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    """The head's network."""

    def check(self) -> None:
        """Raise InputError on numbers that mean nothing, and settings that do not go together."""
        check_ranges(self, "model.generator")
        if self.kind != "none":
            self.denoiser.check("model.generator.denoiser", self.kind)
        if self.agg == "single" and self.samples != 1:
            message = f"does not say how model.generator.samples={self.samples} become one list"
            choices = ["mean", "union"]
            raise InputError("model.generator.agg", self.agg, message, choices=choices)
        if self.recon_src == "x0" and self.kind == "ddpm_eps":
            # From near pure noise the error of a predicted noise is multiplied by 34.
            message = (
                "is no estimate in one step where noise is predicted: take kind ddpm_v or ddpm_x0"
            )
            choices = ["condition"]
            raise InputError("model.generator.recon_src", "x0", message, choices=choices)


@dataclass(frozen=True)
class IdModelConfig:
    """Size of the baselines that learn a vector per item id and per query word (docs/baselines.md).

    They are built instead of KARMA where `kind` is not `karma`.
    """

    width: Count = 64
    """Width d."""
    num_layers: Count = 2
    """Self-attention blocks."""
    num_heads: Count = 1
    """Attention heads; head width is width / num_heads."""
    dropout: ShareBelowOne = 0.2
    """Share of the activations dropped in training."""


@dataclass(frozen=True)
class ModelConfig:
    """All parts."""

    kind: Literal["karma", "sasrec", "hstu"] = "karma"
    """KARMA, or a baseline over item ids: of the other parts it uses `score` and `ids` alone."""
    ids: IdModelConfig = field(default_factory=IdModelConfig)
    """The baselines over item ids."""
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
    imagery: ImageryConfig = field(default_factory=ImageryConfig)
    """Train-only image queries and diffusion head."""
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    """A head that generates what a request searches with; it serves."""
    peft: str = "full"
    """`full`: every weight learns; `lora:R`: rank-R adapters on both backbones (2106.09685), at
    `training.new_module_lr` times the learning rate."""

    def check(self) -> None:
        """Raise InputError on settings that do not go together, but for `imagery`'s, which may be
        unused."""
        self.generator.check()
