"""Checkpoints become plain folders: GGUF files in the cache, once per content of the file, and
folders of sentence-transformers that of their Transformer.

So do checkpoints of random weights, the control that shows what pretrained knowledge is worth.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from karma_ray.artifacts import (
    content_hash,
    exists,
    join,
    locked,
    value_hash,
    write_manifest,
)
from karma_ray.config import Config
from karma_ray.model.backbones.checkpoints import draw_weights
from karma_ray.model.backbones.gguf_file import convert, is_gguf
from karma_ray.model.backbones.sentence_folder import plain_body
from karma_ray.node_cache import checkpoint_hash
from karma_ray.runs.stages import with_checkpoints

LOG = logging.getLogger(__name__)

VERSION = 1
"""Raised when the code converts a file otherwise, so that earlier folders are ignored."""


def with_plain_checkpoints(config: Config, cache: str) -> Config:
    """Return the configuration with folders in `cache` in place of GGUF files and of random
    weights, and the folders of their Transformer in place of those of sentence-transformers.

    Raises InputError when a file cannot be converted exactly.
    """
    model, seed = config.model, config.seed if config.model.weights == "random" else None
    folders = []
    for field, checkpoint in (
        ("model.item_encoder.checkpoint", model.item_encoder.checkpoint),
        ("model.user_decoder.checkpoint", model.user_decoder.checkpoint),
    ):
        folder = _plain(checkpoint, field, cache)
        folders.append(folder if seed is None else _random(folder, field, seed, cache))
    return with_checkpoints(config, *folders)


def _plain(checkpoint: str, field: str, cache: str) -> str:
    """Return the folder of a GGUF file; other checkpoints stay as they are."""
    if not is_gguf(checkpoint):
        return plain_body(checkpoint)
    content = content_hash(checkpoint) if Path(checkpoint).is_file() else ""

    def make(draft: str) -> None:
        LOG.info("converting %s", checkpoint)
        origin = convert(checkpoint, draft, field)
        write_manifest(draft, "checkpoint", parents={"gguf": content}, **origin)

    folder = join(cache, f"gguf-{value_hash({'version': VERSION, 'file': content})}")
    # A file that is not there is left to `convert`, which says so.
    return _made(folder, make, anew=not content)


def _random(checkpoint: str, field: str, seed: int, cache: str) -> str:
    """Return the folder of a checkpoint's shapes and tokenizer with random weights."""
    origin = checkpoint_hash(checkpoint)

    def make(draft: str) -> None:
        LOG.info("drawing the weights of %s anew", checkpoint)
        draw_weights(checkpoint, draft, field, seed)
        write_manifest(draft, "checkpoint", parents={"shapes": origin}, seed=seed)

    key = {"version": VERSION, "shapes": origin, "seed": seed}
    return _made(join(cache, f"random-{value_hash(key)}"), make)


def _made(folder: str, make: Callable[[str], None], *, anew: bool = False) -> str:
    """Return a folder which one process makes, unless a complete one is there."""
    with locked(folder):
        if anew or not exists(join(folder, "manifest.json")):
            draft = f"{folder}.tmp"
            shutil.rmtree(draft, ignore_errors=True)
            try:
                make(draft)
                shutil.rmtree(folder, ignore_errors=True)
                os.replace(draft, folder)
            finally:
                shutil.rmtree(draft, ignore_errors=True)
    return folder
