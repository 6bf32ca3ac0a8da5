"""Checkpoints become plain folders: GGUF files in the cache, once per content of the file, and
folders of sentence-transformers that of their Transformer."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

from karma_ray.artifacts import content_hash, exists, join, locked, value_hash, write_manifest
from karma_ray.config import Config
from karma_ray.model.backbones.gguf_file import convert, is_gguf
from karma_ray.model.backbones.sentence_folder import plain_body
from karma_ray.runs.stages import with_checkpoints

LOG = logging.getLogger(__name__)

VERSION = 1
"""Raised when the code converts a file otherwise, so that earlier folders are ignored."""


def with_plain_checkpoints(config: Config, cache: str) -> Config:
    """Return the configuration with folders in `cache` in place of GGUF files, and the folders
    of their Transformer in place of those of sentence-transformers.

    Raises InputError when a file cannot be converted exactly.
    """
    model = config.model
    item = _plain(model.item_encoder.checkpoint, "model.item_encoder.checkpoint", cache)
    user = _plain(model.user_decoder.checkpoint, "model.user_decoder.checkpoint", cache)
    return with_checkpoints(config, item, user)


def _plain(checkpoint: str, field: str, cache: str) -> str:
    if not is_gguf(checkpoint):
        return plain_body(checkpoint)
    content = content_hash(checkpoint) if Path(checkpoint).is_file() else ""
    folder = join(cache, f"gguf-{value_hash({'version': VERSION, 'file': content})}")
    with locked(folder):
        if not content or not exists(join(folder, "manifest.json")):
            LOG.info("converting %s", checkpoint)
            draft = f"{folder}.tmp"
            shutil.rmtree(draft, ignore_errors=True)
            try:
                origin = convert(checkpoint, draft, field)
                write_manifest(draft, "checkpoint", parents={"gguf": content}, **origin)
                shutil.rmtree(folder, ignore_errors=True)
                os.replace(draft, folder)
            finally:
                shutil.rmtree(draft, ignore_errors=True)
    return folder
