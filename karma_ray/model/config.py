"""Configuration of the model's parts.

Each Literal lists its choices with the default first, as in the method's table of switches.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from karma_ray.errors import InputError
from karma_ray.model.denoiser import DenoiserConfig
from karma_ray.ranges import Count, CountOrZero, Positive, Share, ShareBelowOne, check_ranges


def check_layers(field: str, wanted: int, there: int) -> None:
    """Raise InputError when a number of layers is more than a checkpoint has."""
    if wanted > there:
        message = f"is more than the {there} layers of the checkpoint"
        raise InputError(field, wanted, message, choices=range(there + 1))


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
    """Upper bound of the BPE vocabulary, which is trained on the catalogue."""


@dataclass(frozen=True)
class ItemEncoderConfig:
    """The item encoder E_phi, equation 2."""

    checkpoint: str = "tiny"
    """`tiny`, or an LLM of a family in model/backbones/: a Hugging Face folder, a hub name, a GGUF
    file or a folder of sentence-transformers. `model.checkpoint` sets it for both parts."""
    pool: Literal["eos", "emb_token", "mean"] = "eos"
    """Item state: the end token's last hidden state, a learned [ITEM] vector's, or the mean."""
    layers: CountOrZero = 0
    """Use only the first layers of the checkpoint, which is cheaper; 0: all of them."""
    whiten: bool = True
    """Fit the mean and W_e to the catalogue before training, so that e uses all its dimensions."""
    train_layers: CountOrZero = 0
    """Train only this many of the top layers and what is above them. The token embeddings and the
    layers below stay as they are, and their outputs are computed once for all items; 0: train all
    weights."""
    instruction: str = ""
    """Text put before every item's text."""
    lexical: CountOrZero = 0
    """Dimensions of the lexical block: counted words of the item, appended to e without learning,
    and the mean over the history appended to h. It helps when clicks are few and the encoder
    would learn to ignore the user's taste."""
    block: Literal["words", "states", "both"] = "words"
    """What the lexical block holds: counted words; the whitened mean of the states after the frozen
    layers (what the LLM says of an item before any click; needs `train_layers`); half of each."""
    modality: Literal["text", "multimodal"] = "text"
    """What the encoder reads of an item: its text, or its image and text (`checkpoint` must be
    of a family that reads pictures)."""
    vision: Literal["full", "frozen"] = "full"
    """Whether the vision tower of a multimodal encoder is trained together with the encoder."""
    image_size: Count = 64
    """Side of the pictures in pixels, a multiple of the family's block (32); each block becomes
    one token."""


@dataclass(frozen=True)
class UserDecoderConfig:
    """The user decoder D_theta, equation 3."""

    checkpoint: str = "tiny"
    """`tiny`, or an LLM of a family in model/backbones/: a Hugging Face folder, a hub name or a
    GGUF file. `model.checkpoint` sets it for both parts."""
    layers: CountOrZero = 0
    """Use only the first layers of the checkpoint, which is cheaper; 0: all of them."""
    layout: Literal["interleaved", "items_only", "query_last"] = "interleaved"
    """Where queries enter the sequence and where h_t is read."""
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
    """Task 2 conditions on h_t only, or also on the query, placed between `<s>` and the text."""
    recon_decoder: str = "shared"
    """Decoder of Task 2: `shared`, `separate`, `frozen`, or `light:K` with K layers."""
    recon_detach_h: bool = False
    """Null control: stop Task 2's gradient before h_t."""
    recon_text: Literal["own", "shuffled"] = "own"
    """Null control: Task 2 decodes the text of another item of the batch, drawn for every batch.
    The computation stays the same, but the text tells nothing about h_t."""
    recon_token_dropout: Share = 0.0
    """Share of Task 2's input tokens that are masked."""
    task1_see_readout: bool = True
    """Whether Task 1's text attends to the read-out position itself."""
    max_target_tokens: Count = 24
    """Number of tokens of the target's text that are decoded."""


@dataclass(frozen=True)
class ImageryConfig:
    """The visual term (equation 8): train-only reconstruction of the target's visual features.

    The term is built only if `objective.lambda_img` is not 0.
    """

    img_cond: Literal["both", "task1", "task2"] = "both"
    """Image queries follow the history (Task 1), h_t alone (Task 2), or both; L_img is then the
    mean of the two."""
    img_head: Literal["fm", "ddpm_eps", "ddpm_v", "ddpm_x0", "edm", "mse"] = "fm"
    """Flow matching, DDPM that predicts noise, velocity or the clean feature, EDM, or plain
    regression as a control."""
    img_sees_text: bool = False
    """Whether Task 1's image queries attend to the target's text, which reveals the answer."""
    img_connector: Literal[0, 1, 2] = 0
    """Number of bidirectional layers between the states at the image queries and the head."""
    img_draws: Count = 4
    """Times and noises drawn per image and step, for the head alone (MAR, 2406.11838, uses four);
    regression draws none."""
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    """The network of the head."""

    def check(self) -> None:
        """Raise InputError on numbers out of range and on settings that the head does not have."""
        check_ranges(self, "model.imagery")
        self.denoiser.check("model.imagery.denoiser", self.img_head)


@dataclass(frozen=True)
class GeneratorConfig:
    """Generation of the search vector from h_t by a small head (method 1.12, Table 2).

    `objective.gen_mode` says whether L_act is kept beside the head's loss.
    """

    kind: Literal["none", "mse", "ddpm_eps", "ddpm_v", "ddpm_x0", "edm", "fm"] = "none"
    """Search with h_t itself, with a regression onto the clicked item's e, or by diffusion."""
    samples: Count = 1
    """Number K of embeddings drawn per request."""
    agg: Literal["single", "mean", "union"] = "single"
    """One sample, the mean of K, or each item's best score over K (ComiRec, 2005.09347)."""
    steps: CountOrZero = 0
    """Steps of the sampler; 0: 25 for flow matching, 50 for DDIM, 18 for EDM."""
    draws: Count = 4
    """Times and noises drawn per trained step, for the head alone; regression draws none."""
    recon_src: Literal["condition", "x0"] = "condition"
    """What Task 2 decodes: h_t, the head's condition, or the head's one-step estimate."""
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    """The network of the head."""

    def check(self) -> None:
        """Raise InputError on numbers out of range and on settings that contradict each other."""
        check_ranges(self, "model.generator")
        if self.kind != "none":
            self.denoiser.check("model.generator.denoiser", self.kind)
        if self.agg == "single" and self.samples != 1:
            message = f"does not say how model.generator.samples={self.samples} become one list"
            choices = ["mean", "union"]
            raise InputError("model.generator.agg", self.agg, message, choices=choices)
        if self.recon_src == "x0" and self.kind == "ddpm_eps":
            # With nearly pure noise an error in the predicted noise is multiplied by 34.
            message = (
                "needs a one-step estimate, which predicted noise does not give: use kind "
                "ddpm_v or ddpm_x0"
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
    """All parts of the model."""

    weights: Literal["pretrained", "random"] = "pretrained"
    """Control: `random` draws the weights of the checkpoints anew, from `seed`, and keeps their
    shapes and tokenizer, so that nothing is known that the data do not teach."""
    kind: Literal["karma", "sasrec", "hstu"] = "karma"
    """KARMA, or a baseline over item ids, which uses only the parts `score` and `ids`."""
    ids: IdModelConfig = field(default_factory=IdModelConfig)
    """The baselines over item ids."""
    tiny: TinyBackboneConfig = field(default_factory=TinyBackboneConfig)
    """Shape of the backbones with `checkpoint=tiny`."""
    item_encoder: ItemEncoderConfig = field(default_factory=ItemEncoderConfig)
    """Encodes an item as one embedding."""
    user_decoder: UserDecoderConfig = field(default_factory=UserDecoderConfig)
    """Computes the next-interest embedding."""
    score: ScoreConfig = field(default_factory=ScoreConfig)
    """Dot product and its normalisation."""
    decodability: DecodabilityConfig = field(default_factory=DecodabilityConfig)
    """Decoders that exist only in training."""
    imagery: ImageryConfig = field(default_factory=ImageryConfig)
    """Image queries and diffusion head, which exist only in training."""
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    """A head that generates the search vector; it is also used in serving."""
    peft: str = "full"
    """`full`: all weights are trained; `lora:R`: rank-R adapters on both backbones (2106.09685),
    with `training.new_module_lr` times the learning rate."""

    def check(self) -> None:
        """Raise InputError on contradicting settings; `imagery`, if used, is checked separately."""
        self.generator.check()
        # Checkpoints are asked when they are loaded; a tiny one would be pretrained first.
        item, user, tiny = self.item_encoder, self.user_decoder, self.tiny
        for name, part, wanted, kept in (
            ("item_encoder.layers", item, item.layers, 0),
            ("item_encoder.train_layers", item, item.train_layers, item.layers),
            ("user_decoder.layers", user, user.layers, 0),
        ):
            if kept or part.checkpoint == "tiny":
                check_layers(f"model.{name}", wanted, kept or tiny.num_layers)
        if item.modality == "multimodal":
            for name in ("layers", "train_layers"):
                if getattr(item, name):
                    message = "is not for an encoder that reads pictures"
                    value = getattr(item, name)
                    raise InputError(f"model.item_encoder.{name}", value, message, [0])
        if item.block != "words" and not (item.lexical and item.train_layers):
            message = "needs model.item_encoder.lexical and model.item_encoder.train_layers"
            raise InputError("model.item_encoder.block", item.block, message, choices=["words"])
        if self.weights == "random" and item.checkpoint == "tiny":
            message = "is for checkpoints; without one set pretrain.steps=0"
            raise InputError("model.weights", "random", message, ["pretrained"])
        if self.weights == "random" and item.modality == "multimodal":
            message = "is not for an encoder that reads pictures"
            raise InputError("model.weights", "random", message, ["pretrained"])
        if item.train_layers and item.pool == "emb_token":
            message = "learns a vector below the layers that train_layers freezes"
            choices = ["eos", "mean"]
            raise InputError("model.item_encoder.pool", "emb_token", message, choices=choices)
