"""GGUF files: a checkpoint in one, often quantised, file, turned into a plain folder once.

transformers reads the weights and the vocabulary (`gguf_file`), but passes over what it does not
know: metadata, tensors, and how a vocabulary splits text. So everything in the file is accounted
for here, or the file is refused. The folder holds the weights as float32, which is what they stand
for; its config.json says what they were (`converted_from`), and a model trained from it still does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, normalizers, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from karma_ray.errors import InputError
from karma_ray.model.backbones.checkpoint_files import check_no_pointer
from karma_ray.model.backbones.registry import FAMILIES
from karma_ray.model.backbones.tokenizer import load_tokenizer, save_tokenizer

READ = {
    "context_length", "block_count", "feed_forward_length", "embedding_length", "vocab_size",
    "rope.dimension_count", "rope.freq_base", "attention.head_count", "attention.head_count_kv",
    "attention.layer_norm_rms_epsilon", "attention.key_length", "attention.value_length",
    "attention.causal", "pooling_type", "tensor_data_layout",
}  # fmt: skip
"""Metadata of a model that are read, or that do not change its states."""
NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    **{f"attn_{part}": f"self_attn.{part}_proj" for part in "qkv"},
    **{f"attn_{part}_norm": f"self_attn.{part}_norm" for part in "qk"},
    "attn_output": "self_attn.o_proj",
    **{f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")},
}  # fmt: skip
"""Modules by their names in the file, without number of the layer and kind of weight."""

_DIGITS, _WORDS, _QWEN, _LLAMA_3 = "single digits", "words", "Qwen", "Llama 3"
SPLITS = {
    "gpt-2": _WORDS, "smollm": _DIGITS, "starcoder": _DIGITS, "refact": _DIGITS,
    "qwen2": _QWEN, "deepseek-r1-qwen": _QWEN, "llama-bpe": _LLAMA_3, "llama3": _LLAMA_3,
    "llama-v3": _LLAMA_3,
}  # fmt: skip
"""How the byte-level vocabularies split text, by `tokenizer.ggml.pre`."""
_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def is_gguf(checkpoint: str) -> bool:
    """Whether a checkpoint is named as a GGUF file."""
    return checkpoint.lower().endswith(".gguf")


def convert(file: str, folder: str, field: str) -> dict[str, Any]:
    """Write the model and tokenizer of a GGUF file as a folder; returns what is known of it.

    Raises InputError when the package gguf is missing, the file is damaged, or something in it
    would not be computed as it was trained.
    """
    reader = _reader(file, field)
    facts = {name: _value(entry) for name, entry in reader.fields.items()}
    architecture = str(facts.get("general.architecture"))
    known = [name for name, family in FAMILIES.items() if family.pictures is None]
    if architecture not in known:
        raise InputError(field, architecture, f"is the architecture of {file}", choices=known)
    _check_metadata(facts, architecture, file, field)
    origin = {
        "file": Path(file).name,
        "quantisation": _quantisation(facts, reader.tensors),
        "tensors": dict(Counter(tensor.tensor_type.name for tensor in reader.tensors)),
    }
    names = [tensor.name for tensor in reader.tensors]
    _save_model(file, folder, field, names, facts, origin)
    _save_tokenizer(file, folder, field, facts)
    return origin


def _reader(file: str, field: str) -> Any:
    path = Path(file)
    if not path.is_file():
        raise InputError(field, file, "is no file on this machine")
    try:
        from gguf import GGUFReader
    except ImportError:
        message = "needs the package gguf, which is not installed: pip install gguf"
        raise InputError(field, file, message) from None
    check_no_pointer(path, file, field)
    try:
        return GGUFReader(file)
    except (ValueError, IndexError, KeyError, OSError) as error:
        message = f"is a damaged or incomplete GGUF file ({error}); fetch it again"
        raise InputError(field, file, message) from None


def _value(entry: Any) -> Any:
    """Return one value of the metadata; of a list its length."""
    from gguf import GGUFValueType

    if entry.types[0] == GGUFValueType.ARRAY:
        return len(entry.data)
    last = entry.parts[-1]
    return bytes(last).decode() if entry.types[0] == GGUFValueType.STRING else last[0].item()


def _check_metadata(facts: Mapping[str, Any], prefix: str, file: str, field: str) -> None:
    own = {n.removeprefix(f"{prefix}."): v for n, v in facts.items() if n.startswith(f"{prefix}.")}
    for name, value in own.items():
        if name not in READ and value not in (0, "", "none", False):
            message = f"has {prefix}.{name}={value}, which is not computed here"
            raise InputError(field, file, f"{message}; take the model's original checkpoint")
    if own.get("attention.causal") is False:
        raise InputError(field, file, "attends in both directions, but attention here is causal")
    heads = own.get("embedding_length", 0) // max(own.get("attention.head_count", 1), 1)
    width = own.get("attention.key_length", own.get("rope.dimension_count", heads))
    for name in ("attention.value_length", "rope.dimension_count"):
        if own.get(name, width) != width:
            message = f"has heads of {width} dimensions, but {prefix}.{name}={own[name]}"
            raise InputError(field, file, message)


def _quantisation(facts: Mapping[str, Any], tensors: Any) -> str:
    """Return the name of the file's kind, or of the type that most of its weights have."""
    from gguf import LlamaFileType

    try:
        kind = LlamaFileType(facts["general.file_type"]).name
    except (KeyError, ValueError):
        weights: Counter[str] = Counter()
        for tensor in tensors:
            weights[tensor.tensor_type.name] += int(tensor.n_elements)
        return weights.most_common(1)[0][0]
    return kind.removeprefix("MOSTLY_").removeprefix("ALL_")


def _save_model(
    file: str, folder: str, field: str, names: list[str], facts: Mapping[str, Any],
    origin: Mapping[str, Any],
) -> None:  # fmt: skip
    where = {"pretrained_model_name_or_path": str(Path(file).parent), "gguf_file": Path(file).name}
    config = AutoConfig.from_pretrained(**where)
    if width := facts.get(f"{config.model_type}.attention.key_length"):
        config.head_dim = width  # not read for every family
    with torch.device("meta"):
        clean = AutoModelForCausalLM.from_config(config)
    wanted = {name for name, _ in clean.named_parameters()}  # a tied head is the embeddings
    found = {_module(name) for name in names}
    if extra := found - wanted:
        message = f"has the weights {min(extra)}, which are not computed here"
        raise InputError(field, file, f"{message}; take the model's original checkpoint")
    if missing := wanted - found:
        raise InputError(field, file, f"lacks the weights {min(missing)}")
    try:
        read = AutoModelForCausalLM.from_pretrained(config=config, dtype=torch.float32, **where)
    except (ValueError, RuntimeError, OSError, KeyError, NotImplementedError) as error:
        raise InputError(field, file, f"cannot be read ({error})") from None
    # A model that was read from such a file refuses to be saved, so its weights change house.
    clean.load_state_dict(read.state_dict(), assign=True)
    clean.tie_weights()
    clean.config.converted_from = dict(origin)
    clean.config.dtype = torch.float32
    clean.save_pretrained(folder, safe_serialization=True)


def _module(name: str) -> str:
    """Return a parameter's name in transformers; one that is not known stays as it is."""
    parts = name.split(".")
    layer, rest = (f"model.layers.{parts[1]}.", parts[2:]) if parts[0] == "blk" else ("", parts)
    own = NAMES.get(rest[0])
    return name if own is None else f"{layer}{own}.{'.'.join(rest[1:])}"


def _save_tokenizer(file: str, folder: str, field: str, facts: Mapping[str, Any]) -> None:
    kind, split = facts.get("tokenizer.ggml.model"), facts.get("tokenizer.ggml.pre")
    if kind not in ("gpt2", "llama"):
        choices = ["gpt2 (byte-level)", "llama (SentencePiece)"]
        raise InputError(field, kind, f"is the kind of tokenizer of {file}", choices=choices)
    if kind == "gpt2" and split not in SPLITS:
        message = f"is how the tokenizer of {file} splits texts (tokenizer.ggml.pre)"
        raise InputError(field, split, message, choices=list(SPLITS))
    if kind == "llama" and facts.get("tokenizer.ggml.add_space_prefix") is False:
        message = "has a SentencePiece vocabulary without a space in front of texts"
        raise InputError(field, file, f"{message}, which is not read exactly")
    path = Path(file)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    except (ValueError, OSError, KeyError) as error:
        raise InputError(field, file, f"has a tokenizer that cannot be read ({error})") from None
    if kind == "gpt2":
        split_as(tokenizer.backend_tokenizer, SPLITS[str(split)])
    tokenizer.save_pretrained(folder)
    save_tokenizer(load_tokenizer(folder, field), folder)  # with its roles


def split_as(tokenizer: Any, split: str) -> None:
    """Let a byte-level tokenizer split text as its vocabulary was learned."""
    spelled = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    first: Any = {
        _WORDS: pre_tokenizers.ByteLevel(add_prefix_space=False),
        _DIGITS: pre_tokenizers.Digits(individual_digits=True),
        _QWEN: pre_tokenizers.Split(Regex(_REGEX.format(digits="")), behavior="isolated"),
        _LLAMA_3: pre_tokenizers.Split(Regex(_REGEX.format(digits="{1,3}")), behavior="isolated"),
    }[split]
    if split == _DIGITS:
        spelled = pre_tokenizers.ByteLevel(add_prefix_space=False)
    steps = [first] if split == _WORDS else [first, spelled]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if split == _QWEN:
        tokenizer.normalizer = normalizers.NFC()
    if split == _LLAMA_3:
        tokenizer.model.ignore_merges = True
