"""The one door to transformers: Qwen3 bodies, language-model heads and tokenizers.

A backbone is a Hugging Face Qwen3 *body* (`Qwen3Model`: embeddings and layers, no head). Any
checkpoint folder or hub name loads; `tiny` ones are built here and saved in the same layout,
so everything after pretraining sees only "a Hugging Face folder".
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3Model,
)
from transformers.utils import logging as transformers_logging

from karma_ray.data.prompts import END_OF_TEXT, SPECIAL_TOKENS, Tokenizer
from karma_ray.errors import InputError
from karma_ray.model import packing
from karma_ray.model.config import TinyBackboneConfig
from karma_ray.model.layers import make_lean

transformers_logging.disable_progress_bar()
LOG = logging.getLogger(__name__)

ATTENTION = "karma_ray"
AttentionInterface.register(ATTENTION, packing.attend)


def build_tiny(config: TinyBackboneConfig, vocab_size: int, seed: int) -> Qwen3Model:
    """A small Qwen3 with random weights; the vocabulary is the tokenizer's."""
    for name in ("hidden_size", "num_layers", "num_heads", "num_key_value_heads"):
        if getattr(config, name) < 1:
            raise InputError(f"model.tiny.{name}", getattr(config, name), "must be at least 1")
    if config.hidden_size % config.num_heads or config.num_heads % config.num_key_value_heads:
        raise InputError(
            "model.tiny.num_heads", config.num_heads,
            "must divide hidden_size and be a multiple of num_key_value_heads",
        )  # fmt: skip
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
    make_lean(body)
    return body


def load_body(checkpoint: str, field: str = "checkpoint") -> Qwen3Model:
    """Load a Qwen3 body from a folder or hub name; raises InputError when it is not a Qwen3."""
    check_architecture(checkpoint, field)
    try:
        body, info = Qwen3Model.from_pretrained(
            checkpoint, attn_implementation=ATTENTION, dtype=torch.float32,
            output_loading_info=True,
        )  # fmt: skip
    except (OSError, ValueError) as error:
        raise InputError(field, checkpoint, f"cannot be loaded ({error})") from None
    if info["missing_keys"]:  # transformers would leave random numbers there
        example = sorted(info["missing_keys"])[0]
        raise InputError(field, checkpoint, f"lacks weights of a Qwen3 body, such as {example}")
    body.config.use_cache = False
    make_lean(body)
    return cast(Qwen3Model, body)


def stock_body(body: nn.Module, attention: str = "eager") -> Qwen3Model:
    """The same parameters behind transformers' own layers: for references, and attention maps."""
    settings = cast(Any, body).config.to_dict()
    with torch.device("meta"):
        stock = Qwen3Model(Qwen3Config(**settings, attn_implementation=attention))
    stock.load_state_dict(body.state_dict(keep_vars=True), assign=True)
    stock.rotary_emb = cast(Any, body).rotary_emb  # its tables are no part of the state
    return stock.train(body.training)


def load_lm_head(checkpoint: str, *, empty: bool = False) -> Tensor | None:
    """Output embeddings [V, D] of a checkpoint whose head is not tied to its input, else None.

    `empty` gives zeros of that shape, to be filled from a run's own weights: a bundle's body
    has no head.
    """
    config = AutoConfig.from_pretrained(checkpoint)
    if config.tie_word_embeddings:
        return None
    if empty:
        return torch.zeros(config.vocab_size, config.hidden_size)
    try:
        whole, info = AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise InputError("checkpoint", checkpoint, f"cannot be loaded ({error})") from None
    if "lm_head.weight" in info["missing_keys"]:  # transformers would make up a random one
        raise InputError("checkpoint", checkpoint, "has no language-model head, tied or its own")
    return cast(Tensor, whole.get_output_embeddings().weight.detach().clone())


def save_body(body: Qwen3Model, folder: str) -> None:
    """Write config.json and model.safetensors; a body has no lm_head to leave out."""
    body.save_pretrained(folder, safe_serialization=True)


def load_tokenizer(checkpoint: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a checkpoint folder; raises InputError when special tokens are missing."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    except (OSError, ValueError) as error:
        raise InputError("tokenizer", checkpoint, f"cannot be loaded ({error})") from None
    known = tokenizer.get_vocab()
    for token in SPECIAL_TOKENS:
        if token not in known:
            raise InputError("tokenizer", checkpoint, f"lacks the special token {token}")
    return cast(PreTrainedTokenizerFast, tokenizer)


def save_tokenizer(tokenizer: Tokenizer, folder: str) -> None:
    """Write the tokenizer's own files."""
    cast(PreTrainedTokenizerFast, tokenizer).save_pretrained(folder)


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocab_size` tokens with Qwen's special tokens."""
    if vocab_size < 300:
        raise InputError("model.tiny.vocab_size", vocab_size, "must be at least 300 (256 bytes)")
    tokenizer = FastTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def run_body(
    body: nn.Module,
    embeddings: Tensor,
    visible: Tensor | None = None,
    positions: Tensor | None = None,
    real: Tensor | None = None,
    deep: Sequence[Tensor] = (),
) -> Tensor:
    """Last hidden states [B, S, D] of soft tokens [B, S, D].

    `visible` [B, S, S] says which position (row) sees which (column); without it the body is
    causal. `positions` [B, S] defaults to each slot's number. Slots that are not `real` [B, S]
    need not be computed: no real one may see them (in a causal pass they stand behind), and
    their states are finite but unspecified. Bodies that see (model/sight.py) take positions
    [B, S, 3], and `deep`, tensors [B, S, D] that their first layers' outputs are added to.
    """
    num_rows, num_slots = embeddings.shape[:2]
    if positions is None:
        positions = torch.arange(num_slots, device=embeddings.device).expand(num_rows, -1)
    if real is None or not packing.worth_packing(real):
        everything = torch.ones(num_rows, num_slots, dtype=torch.bool, device=embeddings.device)
        plan = packing.Packing(everything, visible, packed=False)
        return _states(body, embeddings, positions, plan, deep)
    plan = packing.Packing(real, visible)
    tokens, places = plan.collect(embeddings), plan.collect(positions)
    deep = [plan.collect(layer)[None] for layer in deep]
    return plan.spread(_states(body, tokens[None], places[None], plan, deep)[0])


def _states(
    body: nn.Module, embeddings: Tensor, positions: Tensor, plan: Any, deep: Sequence[Tensor]
) -> Tensor:
    if positions.dim() == 3:
        positions = positions.movedim(-1, 0)  # transformers puts the three axes in front
    options = {"deep": deep} if deep else {}
    output = body(
        inputs_embeds=embeddings, position_ids=positions, use_cache=False, packing=plan, **options
    )
    return cast(Tensor, output.last_hidden_state)


def truncated(body: Qwen3Model, num_layers: int) -> Qwen3Model:
    """A copy of the first `num_layers` layers (a light decoder)."""
    if not 1 <= num_layers <= len(body.layers):
        raise InputError(
            "model.decodability.recon_decoder", f"light:{num_layers}",
            "needs a number of layers", choices=range(1, len(body.layers) + 1),
        )  # fmt: skip
    light = copy.deepcopy(body)
    light.layers = light.layers[:num_layers]
    light.config.num_hidden_layers = num_layers
    light.config.layer_types = light.config.layer_types[:num_layers]
    return light


def hidden_size(body: nn.Module) -> int:
    """Width of a body."""
    return int(cast(Any, body).config.hidden_size)


def token_embeddings(body: nn.Module) -> Tensor:
    """Input-embedding rows [V, D]."""
    return cast(Tensor, cast(Any, body).embed_tokens.weight)


def check_architecture(checkpoint: str, field: str, wanted: str = "qwen3") -> None:
    """Raise InputError unless `checkpoint` is a folder or hub name of a Qwen3 (or Qwen3-VL)."""
    if checkpoint == "tiny":
        raise InputError(field, checkpoint, "must be resolved to a pretrained folder first")
    looks_local = checkpoint.startswith((".", "/", "~")) or Path(checkpoint).exists()
    if looks_local and not (Path(checkpoint) / "config.json").exists():
        raise InputError(field, checkpoint, "is not a checkpoint folder (no config.json)")
    try:
        found = AutoConfig.from_pretrained(checkpoint).model_type
    except (OSError, ValueError) as error:
        raise InputError(field, checkpoint, f"cannot be loaded ({error})") from None
    if found != wanted:
        raise InputError(field, found, f"is the architecture of {checkpoint}", choices=[wanted])
