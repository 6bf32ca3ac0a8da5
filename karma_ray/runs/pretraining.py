"""Pretraining before stage 1: a tiny language model of the catalogue, if no LLM is given."""

from __future__ import annotations

import dataclasses
import logging

from karma_ray.artifacts import exists, join, locked, remove, value_hash
from karma_ray.config import Config
from karma_ray.data.prepared import PreparedData
from karma_ray.data.prompts import SpecialIds
from karma_ray.model.backbone import build_tiny_with_pictures, load_body, save_body
from karma_ray.model.backbones.tokenizer import load_tokenizer
from karma_ray.node_cache import complete_folder
from karma_ray.runs.run_log import RunLog
from karma_ray.runs.stages import STAGE_VERSION, with_checkpoints
from karma_ray.training.language import pretrain

LOG = logging.getLogger(__name__)


def pretrained(
    config: Config, source: PreparedData, items_hash: str, cache: str
) -> tuple[Config, str]:
    """Pretrain the tiny checkpoints unless `cache` has them.

    Returns the configuration that names them, and the folder of their log.
    """
    folder = join(cache, f"language-model-{value_hash(pretrain_key(config, items_hash))}")
    with locked(folder):
        _pretrain(config, source, folder)
    return with_checkpoints(config, _with_pictures(config, folder), folder), f"{folder}-log"


def pretrain_key(config: Config, items_hash: str) -> dict[str, object]:
    """Return everything that a pretrained tiny language model depends on."""
    return {
        "version": STAGE_VERSION,
        "items": items_hash,
        "tiny": dataclasses.asdict(config.model.tiny),
        "pretrain": dataclasses.asdict(config.pretrain),
        "max_item_tokens": config.collate.max_item_tokens,
        "seed": config.seed,
    }


def _pretrain(config: Config, source: PreparedData, folder: str) -> None:
    """Pretrain the tiny language model unless it already exists."""
    if exists(join(folder, "manifest.json")):
        return
    LOG.info("pretraining a tiny language model: %d steps", config.pretrain.steps)
    remove(f"{folder}-log")
    log = RunLog(f"{folder}-log", "pretrain")
    with complete_folder(folder) as draft:
        pretrain(
            source.catalog(), draft, tiny=config.model.tiny, config=config.pretrain,
            max_tokens=config.collate.max_item_tokens, seed=config.seed, report=log.add,
            progress=True,
        )  # fmt: skip
    log.close()


def _with_pictures(config: Config, folder: str) -> str:
    """Return the tiny item encoder: the language model, or a multimodal model built around it."""
    if config.model.item_encoder.modality != "multimodal":
        return folder
    multimodal = f"{folder}-vl"
    with locked(multimodal):
        if not exists(join(multimodal, "config.json")):
            special = SpecialIds.of(load_tokenizer(folder))
            body = build_tiny_with_pictures(
                load_body(folder), special.text_start, special.text_end, config.seed
            )
            with complete_folder(multimodal) as draft:
                save_body(body, draft)
    return multimodal
