"""Checkpoints become plain folders: GGUF files in the cache, once per content of the file, and
folders of sentence-transformers that of their Transformer.

So do checkpoints of random weights, the control that shows what pretrained knowledge is worth.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from karma_ray.artifacts import (
    SCHEMA_VERSION,
    content_hash,
    exists,
    join,
    locked,
    value_hash,
    write_json,
    write_manifest,
)
from karma_ray.config import Config
from karma_ray.model.backbones.checkpoints import draw_weights
from karma_ray.model.backbones.gguf_file import convert, is_gguf
from karma_ray.model.backbones.sentence_folder import plain_body, sentence_folder
from karma_ray.node_cache import (
    checkpoint_hash,
    complete_folder,
    known_hash,
    local_copy,
    upload,
)
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


def with_shared_checkpoints(config: Config, cache: str) -> Config:
    """Return the configuration with checkpoints that every machine of a cluster can read.

    Those of this machine are copied into `cache`, once per content, unless it is on this machine
    itself.
    """
    if "://" not in cache:
        return config
    model = config.model
    named = (model.item_encoder.checkpoint, model.user_decoder.checkpoint)
    return with_checkpoints(config, *(_shared(checkpoint, cache) for checkpoint in named))


def _shared(checkpoint: str, cache: str) -> str:
    """Return the URI of a copy of a local folder or file; other checkpoints stay as they are."""
    if "://" in checkpoint or not Path(checkpoint).exists():
        return checkpoint
    body = Path(checkpoint).resolve()
    if body.is_file():
        file = join(cache, f"checkpoint-{known_hash(str(body))}", body.name)
        if not exists(file):
            upload(body, file)
        return file
    sentences = sentence_folder(str(body))
    root = body if sentences is None else Path(sentences.root)
    folder = join(cache, f"checkpoint-{(content := known_hash(str(root)))}")
    if not exists(join(folder, "manifest.json")):
        LOG.info("copying %s to %s", checkpoint, folder)
        upload(root, folder)
        manifest = {"schema_version": SCHEMA_VERSION, "kind": "checkpoint", "parents": {}}
        write_json({**manifest, "content_hash": content}, join(folder, "manifest.json"))
    below = body.relative_to(root).as_posix()
    return folder if below == "." else join(folder, below)


def _plain(checkpoint: str, field: str, cache: str) -> str:
    """Return the folder of a GGUF file; other checkpoints stay as they are."""
    if not is_gguf(checkpoint):
        return plain_body(checkpoint)
    checkpoint = local_copy(checkpoint)
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
            with complete_folder(folder) as draft:
                make(draft)
    return folder
