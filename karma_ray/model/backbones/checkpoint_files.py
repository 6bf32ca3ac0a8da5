"""Checks of a checkpoint's files before transformers reads them.

The usual faults are a clone without its large files, an interrupted download, and weights whose
shapes differ from config.json. Each ends in an error that names folder, file and reason.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from karma_ray.errors import InputError

POINTER = b"version https://git-lfs"
"""First bytes of a Git LFS pointer, which stands for a file until `git lfs pull` fetches it."""
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
"""Vocabulary files; any tokenizer has at least one of them."""


def loaded(kind: Any, checkpoint: str, field: str, **options: Any) -> tuple[Any, dict[str, Any]]:
    """Load a transformers model of class `kind` in float32, with the loading info on its weights.

    Raises InputError when it cannot be loaded, or when the shape of a weight differs from
    config.json.
    """
    check_weight_files(checkpoint, field)
    try:
        model, info = kind.from_pretrained(
            checkpoint, dtype=torch.float32, output_loading_info=True,
            ignore_mismatched_sizes=True, **options,
        )  # fmt: skip
    except (OSError, ValueError, KeyError) as error:
        raise InputError(field, checkpoint, f"cannot be loaded ({error})") from None
    if wrong := list(info["mismatched_keys"]):
        # Versions of transformers list the names alone, or each with both shapes.
        name = min(entry if isinstance(entry, str) else entry[0] for entry in wrong)
        raise InputError(
            field, checkpoint,
            f"does not fit together: weight {name} has shape {_stored(checkpoint, name)}, but "
            f"config.json gives it {list(model.state_dict()[name].shape)}",
        )  # fmt: skip
    return model, info


def check_weight_files(checkpoint: str, field: str) -> None:
    """Raise InputError unless every weight file of a local folder is complete; hub names pass."""
    for file in _files(checkpoint, "*.safetensors", "*.bin"):
        check_no_pointer(file, checkpoint, field)
        if file.suffix == ".safetensors":
            try:
                with safe_open(file, "pt"):
                    pass
            except (SafetensorError, OSError) as error:
                reason = f"has a damaged or incomplete {file.name} ({error}); fetch it again"
                raise InputError(field, checkpoint, reason) from None


def check_tokenizer_files(checkpoint: str, field: str) -> None:
    """Raise InputError unless a local folder has a complete tokenizer; hub names pass."""
    if not Path(checkpoint).is_dir():
        return
    if not list(_files(checkpoint, *VOCABULARIES, "*.tiktoken")):
        reason = f"holds no tokenizer (none of {', '.join(VOCABULARIES)})"
        raise InputError(field, checkpoint, f"{reason}; copy the checkpoint's own files there")
    for file in _files(checkpoint, *VOCABULARIES, "tokenizer_config.json"):
        check_no_pointer(file, checkpoint, field)
        if file.suffix == ".json":
            try:
                json.loads(file.read_bytes())
            except ValueError as error:
                reason = f"has a damaged or incomplete {file.name} ({error}); fetch it again"
                raise InputError(field, checkpoint, reason) from None


def check_no_pointer(file: Path, checkpoint: str, field: str) -> None:
    """Raise InputError if a file is a Git LFS pointer."""
    with file.open("rb") as source:
        if source.read(len(POINTER)) == POINTER:
            reason = f"has a Git LFS pointer in place of {file.name}; run `git lfs pull` there"
            raise InputError(field, checkpoint, reason)


def _files(checkpoint: str, *patterns: str) -> Iterator[Path]:
    for pattern in patterns:
        yield from (file for file in sorted(Path(checkpoint).glob(pattern)) if file.is_file())


def _stored(checkpoint: str, weight: str) -> str:
    """Return the stored shape and file of a weight; its name may lack the model's prefix there."""
    for file in _files(checkpoint, "*.safetensors"):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118
                if f".{weight}".endswith(f".{name}") or f".{name}".endswith(f".{weight}"):
                    return f"{weights.get_slice(name).get_shape()} in {file.name}"
    return "another"
