"""The item encoder as a folder of the library sentence-transformers.

The library runs modules in a row: Transformer (tokenizer and body), Pooling, Dense and Normalize.
The tokenizer puts the instruction before every text and the end of text behind it. One Dense
subtracts the mean and the next is W_e, which includes the whitening. As a single affine map they
would cost digits: pooled states of a language model are nearly equal, so W_e e_raw and W_e mean
are far larger than their difference (with 135 M weights the error was 1e-5 instead of 3e-7).
Normalize makes e of length 1, so RMSNorm, which only scales, needs no module. What these modules
do not compute is refused.
"""

from __future__ import annotations

import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, cast

import torch
from safetensors.torch import save_file
from torch import Tensor

from karma_ray.artifacts import RunFolder, exists, open_filesystem, read_json, write_json
from karma_ray.errors import InputError
from karma_ray.model.backbone import add_token, hidden_size, quantised_from, save_body
from karma_ray.model.backbones.tokenizer import save_framed, token_ids
from karma_ray.model.config import ItemEncoderConfig
from karma_ray.model.interest import InterestModel
from karma_ray.model.item_encoder import ItemEncoder
from karma_ray.retrieval.complete_run import require_part
from karma_ray.retrieval.export import Bundle, load_bundle, written_folder

POOLING, CENTRE, OUTPUT, NORMALIZE = "1_Pooling", "2_Dense", "3_Dense", "4_Normalize"
CLASSES = {
    "": "Transformer", POOLING: "Pooling", CENTRE: "Dense", OUTPUT: "Dense", NORMALIZE: "Normalize",
}  # fmt: skip
POOLS = {"eos": "lasttoken", "emb_token": "lasttoken", "mean": "mean_tokens"}
"""The library's pooling mode for every `model.item_encoder.pool`."""
PROBES = ["", "a plain text", "  Größe 42,\n白い靴 | 100% cotton "]
"""Texts whose tokens must be the same after the tokenizer was written and loaded."""
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


class Frame(NamedTuple):
    """The tokens put before every text and the one behind it, and the most of them together."""

    before: list[int]
    after: int
    max_tokens: int


def export_encoder(run: str, out: str) -> dict[str, Any]:
    """Write the item encoder of a finished run to `out`; returns its facts.

    Raises InputError when `out` is not empty, when the run has no bundle, or when the encoder
    computes what the library does not.
    """
    _check_empty(out)
    require_part(run, RunFolder(run).bundle, "jobs/train.py --out RUN")
    bundle = load_bundle(RunFolder(run).bundle)
    if not isinstance(bundle.interest, InterestModel):
        raise InputError("RUN", run, "is a baseline over item ids, which encodes no text")
    encoder = bundle.interest.item_encoder
    _check_expressible(encoder.config)
    frame = _frame(encoder, bundle.interest.end_of_text, bundle.collate_config.max_item_tokens)
    _check_tokens(encoder, bundle, frame)
    facts = {
        "width": encoder.output.out_features,
        "max_tokens": frame.max_tokens,
        "pool": encoder.config.pool,
        "instruction": encoder.config.instruction,
        "recipe": bundle.manifest.get("recipe", "unknown"),
        "bundle": bundle.content_hash,
        "base_model": _base_model(run),
        "quantised": (quantised_from(encoder.body) or {}).get("quantisation", ""),
    }
    with written_folder(out) as folder:
        _write_transformer(folder, encoder, bundle, frame)
        _write_pooling(folder, encoder)
        _write_dense(folder / CENTRE, torch.eye(len(encoder.mean)), -encoder.mean)
        _write_dense(folder / OUTPUT, encoder.output.weight)
        (folder / "README.md").write_text(model_card(facts), encoding="utf-8")
        _write_modules(folder)
    return facts


def _check_empty(out: str) -> None:
    fs, path = open_filesystem(out)
    if fs.exists(path) and (not fs.isdir(path) or fs.ls(path)):
        raise InputError("OUT", out, "is not an empty folder; name a new one")


def _frame(encoder: ItemEncoder, end_of_text: int, max_item_tokens: int) -> Frame:
    """Return the tokens around a text; with `pool=emb_token` the body gets one more, [ITEM]."""
    before, after = encoder.instruction.tolist(), end_of_text
    if encoder.config.pool == "emb_token":  # no text leads to its row
        after = add_token(encoder.body, encoder.item_token)
    return Frame(before, after, len(before) + max_item_tokens)


def _check_expressible(config: ItemEncoderConfig) -> None:
    """Raise InputError when the library's modules do not compute the item encoder."""
    if config.modality != "text":
        raise InputError(
            "model.item_encoder.modality", config.modality,
            "cannot be exported: sentence-transformers has no module that inserts pictures as this "
            "encoder does", choices=["text"],
        )  # fmt: skip
    if config.lexical:
        raise InputError(
            "model.item_encoder.lexical", config.lexical,
            "cannot be exported: sentence-transformers runs its modules one after the other, and "
            "counted words are appended from beside them", choices=[0],
        )  # fmt: skip


def _write_transformer(folder: Path, encoder: ItemEncoder, bundle: Bundle, frame: Frame) -> None:
    save_body(encoder.body, str(folder))
    save_framed(bundle.tokenizer, str(folder), *frame)
    facts = {"max_seq_length": frame.max_tokens, "do_lower_case": False}
    write_json(facts, str(folder / "sentence_bert_config.json"))


def _check_tokens(encoder: ItemEncoder, bundle: Bundle, frame: Frame) -> None:
    """Raise InputError if other programs would load a tokenizer that reads texts otherwise.

    For some architectures transformers loads the family's own tokenizer whatever a folder says.
    """
    room = frame.max_tokens - len(frame.before) - 1
    texts = bundle.tokenizer(PROBES, add_special_tokens=False)["input_ids"]
    expected = [[*frame.before, *ids[:room], frame.after] for ids in texts]
    with TemporaryDirectory() as folder:
        cast(Any, encoder.body).config.save_pretrained(folder)
        save_framed(bundle.tokenizer, folder, *frame)
        found = token_ids(folder, PROBES)
    if found != expected:
        kind = cast(Any, encoder.body).config.model_type
        raise InputError(
            "model.item_encoder.checkpoint", kind,
            "cannot be exported: transformers loads another tokenizer for this architecture than "
            "the one that the model was trained with",
        )  # fmt: skip


def _write_pooling(folder: Path, encoder: ItemEncoder) -> None:
    (folder / POOLING).mkdir()
    modes = {f"pooling_mode_{mode}": False for mode in ("cls_token", *sorted(set(POOLS.values())))}
    facts = {
        "word_embedding_dimension": hidden_size(encoder.body),
        **modes, f"pooling_mode_{POOLS[encoder.config.pool]}": True,
        "include_prompt": True,
    }  # fmt: skip
    write_json(facts, str(folder / POOLING / "config.json"))


def _write_dense(folder: Path, weight: Tensor, bias: Tensor | None = None) -> None:
    """Write x -> weight x + bias; weight [out, in], bias [out]."""
    folder.mkdir()
    tensors = {"linear.weight": weight.detach().contiguous()}
    if bias is not None:
        tensors["linear.bias"] = bias.detach().contiguous()
    save_file(tensors, str(folder / "model.safetensors"))
    facts = {
        "in_features": weight.shape[1],
        "out_features": weight.shape[0],
        "bias": bias is not None,
        "activation_function": "torch.nn.modules.linear.Identity",
    }
    write_json(facts, str(folder / "config.json"))


def _write_modules(folder: Path) -> None:
    """Write the list of modules, which marks the folder complete."""
    facts: dict[str, Any] = {
        "prompts": {},
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    }
    write_json(facts, str(folder / "config_sentence_transformers.json"))
    modules = [
        {"idx": n, "name": str(n), "path": path, "type": f"sentence_transformers.models.{name}"}
        for n, (path, name) in enumerate(CLASSES.items())
    ]
    write_json(modules, str(folder / "modules.json"))


def _base_model(run: str) -> str:
    """Return the hub name that the item encoder started from; empty for folders and files."""
    path = RunFolder(run).config
    if not exists(path):
        return ""
    parts = read_json(path).get("model", {})
    name = str(parts.get("item_encoder", {}).get("checkpoint", ""))
    is_hub_name = HUB_NAME.fullmatch(name) and not name.endswith(".gguf")
    return name if is_hub_name and not Path(name).exists() else ""


def model_card(facts: dict[str, Any]) -> str:
    """Return the model card of an exported encoder."""
    base = f"base_model: {facts['base_model']}\n" if facts["base_model"] else ""
    origin = f"It started from `{facts['base_model']}`. " if facts["base_model"] else ""
    if facts["quantised"]:
        origin += f"The weights it started from were quantised as {facts['quantised']}. "
    instruction = ""
    if facts["instruction"]:
        instruction = f"\nThe tokenizer puts the instruction `{facts['instruction']}` before it."
    return f"""---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags:
- sentence-transformers
- feature-extraction
- karma_ray
{base}---

# Item encoder

Item encoder of a recall model that karma_ray trained on clicks, recipe `{facts["recipe"]}`.
{origin}It maps an item's text to a vector of {facts["width"]} dimensions and length 1.

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("PATH OR HUB NAME OF THIS FOLDER")
vectors = model.encode(["title | brand | category | text", "another title"])
similarities = model.similarity(vectors, vectors)
```

## What it reads

An item's title, brand, category and text, joined by ` | `; empty parts are left out.
The first {facts["max_tokens"]} tokens are read, with the end of text.{instruction}
No prompt needs to be given, and none may be added.

## What it computes

Pooling `{facts["pool"]}` of the last hidden states, less their mean; whitening and output
projection as one dense layer; length 1. The vectors are those of the run's index, scaled to
length 1.

## Use and limits

- Meant for: similarity of items of the catalogue it was trained on, and features for other models.
- Not part of it: the user decoder, which turns a query and a history into what the index is
  searched with.
- Licence: that of the weights it started from; fill it in before publishing.

Content hash of the bundle: `{facts["bundle"]}`.
"""
