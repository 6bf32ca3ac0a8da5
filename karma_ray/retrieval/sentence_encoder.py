"""The item encoder as a folder of the library sentence-transformers.

The library runs four modules in a row: Transformer (tokenizer and body), Pooling, Dense and
Normalize. The tokenizer puts the instruction before every text and the end of text behind it, and
Dense is W_e (e_raw - mean) as one affine map. Normalize makes e of length 1, so RMSNorm, which
only scales, needs no module. What these modules do not compute is refused.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from karma_ray.artifacts import RunFolder, exists, open_filesystem, read_json, write_json
from karma_ray.errors import InputError, KarmaRayError
from karma_ray.model.backbone import add_token, hidden_size, quantised_from, save_body
from karma_ray.model.backbones.tokenizer import save_framed, token_ids
from karma_ray.model.interest import InterestModel
from karma_ray.model.item_encoder import ItemEncoder
from karma_ray.retrieval.export import Bundle, load_bundle, written_folder

POOLING, DENSE, NORMALIZE = "1_Pooling", "2_Dense", "3_Normalize"
CLASSES = {"": "Transformer", POOLING: "Pooling", DENSE: "Dense", NORMALIZE: "Normalize"}
POOLS = {"eos": "lasttoken", "emb_token": "lasttoken", "mean": "mean_tokens"}
"""The library's pooling mode for every `model.item_encoder.pool`."""
PROBES = ["", "a plain text", "  Größe 42,\n白い靴 | 100% cotton "]
"""Texts that the tokenizer must give the same tokens after it was written."""
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def export_encoder(run: str, out: str) -> dict[str, Any]:
    """Write the item encoder of a finished run to `out`; returns its facts.

    Raises InputError when `out` is not empty, or when the encoder computes what the library does
    not.
    """
    _check_empty(out)
    bundle = load_bundle(RunFolder(run).bundle)
    encoder = _expressible(bundle, run)
    facts = {
        "width": encoder.output.out_features,
        "max_tokens": bundle.collate_config.max_item_tokens + len(encoder.instruction),
        "pool": encoder.config.pool,
        "instruction": encoder.config.instruction,
        "recipe": bundle.manifest.get("recipe", "unknown"),
        "bundle": bundle.content_hash,
        "base_model": _base_model(run),
        "quantised": (quantised_from(encoder.body) or {}).get("quantisation", ""),
    }
    with written_folder(out) as folder:
        _write_transformer(folder, encoder, bundle, facts["max_tokens"])
        _write_pooling(folder, encoder)
        _write_dense(folder, encoder)
        (folder / NORMALIZE).mkdir()
        (folder / "README.md").write_text(model_card(facts), encoding="utf-8")
        _write_modules(folder)
    return facts


def _check_empty(out: str) -> None:
    fs, path = open_filesystem(out)
    if fs.exists(path) and (not fs.isdir(path) or fs.ls(path)):
        raise InputError("OUT", out, "is not an empty folder; name a new one")


def _expressible(bundle: Bundle, run: str) -> ItemEncoder:
    """Return the item encoder; raises InputError when the library cannot compute it."""
    if not isinstance(bundle.interest, InterestModel):
        raise InputError("RUN", run, "is a baseline over item ids, which encodes no text")
    encoder = bundle.interest.item_encoder
    config = encoder.config
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
    return encoder


def _write_transformer(folder: Path, encoder: ItemEncoder, bundle: Bundle, max_tokens: int) -> None:
    """Write body and tokenizer; raises KarmaRayError if these would read other tokens."""
    assert isinstance(bundle.interest, InterestModel)
    before, end = encoder.instruction.tolist(), bundle.interest.end_of_text
    if encoder.config.pool == "emb_token":  # a row of its own, which no text leads to
        end = add_token(encoder.body, encoder.item_token)
    save_body(encoder.body, str(folder))
    save_framed(bundle.tokenizer, str(folder), before, end, max_tokens)
    room = max_tokens - len(before) - 1
    texts = bundle.tokenizer(PROBES, add_special_tokens=False)["input_ids"]
    expected = [[*before, *ids[:room], end] for ids in texts]
    for text, ids, found in zip(PROBES, expected, token_ids(str(folder), PROBES), strict=True):
        if found != ids:
            raise KarmaRayError(
                f"the exported tokenizer reads {text!r} as the tokens {found}, not as {ids}"
            )
    write_json(
        {"max_seq_length": max_tokens, "do_lower_case": False},
        str(folder / "sentence_bert_config.json"),
    )


def _write_pooling(folder: Path, encoder: ItemEncoder) -> None:
    (folder / POOLING).mkdir()
    modes = {f"pooling_mode_{mode}": False for mode in ("cls_token", *sorted(set(POOLS.values())))}
    facts = {
        "word_embedding_dimension": hidden_size(encoder.body),
        **modes, f"pooling_mode_{POOLS[encoder.config.pool]}": True,
        "include_prompt": True,
    }  # fmt: skip
    write_json(facts, str(folder / POOLING / "config.json"))


def _write_dense(folder: Path, encoder: ItemEncoder) -> None:
    (folder / DENSE).mkdir()
    weight = encoder.output.weight.detach().double()
    bias = -(weight @ encoder.mean.double())
    tensors = {"linear.weight": weight.float().contiguous(), "linear.bias": bias.float()}
    save_file(tensors, str(folder / DENSE / "model.safetensors"))
    facts = {
        "in_features": weight.shape[1],
        "out_features": weight.shape[0],
        "bias": True,
        "activation_function": "torch.nn.modules.linear.Identity",
    }
    write_json(facts, str(folder / DENSE / "config.json"))


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

Item encoder of a recall model that karma_ray trained on clicks, recipe `{facts["recipe"]}`. {origin}
It maps the text of a catalogue's item to a vector of {facts["width"]} dimensions and length 1.

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

Pooling `{facts["pool"]}` of the last hidden states; mean, whitening and output projection in one
dense layer; length 1. The vectors are those of the run's index, scaled to length 1.

## Use and limits

- Meant for: similarity of items of the catalogue it was trained on, and features for other models.
- Not part of it: the user decoder, which turns a query and a history into what the index is
  searched with.
- Licence: that of the weights it started from; fill it in before publishing.

Content hash of the bundle: `{facts["bundle"]}`.
"""
