"""What comes before joint training: a tiny language model where none is given, and the warm-up.

Both lie in a cache that all recipes share, under what they depend on.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from karma_ray.artifacts import (
    RunFolder,
    content_hash,
    exists,
    join,
    locked,
    open_filesystem,
    read_lines,
    value_hash,
    write_table,
)
from karma_ray.config import Config, flattened, to_dict
from karma_ray.data.catalog import Catalog
from karma_ray.data.prepared import PreparedData
from karma_ray.data.prompts import SpecialIds
from karma_ray.model.backbone import build_tiny_with_pictures, load_body, save_body
from karma_ray.model.backbones.tokenizer import load_tokenizer
from karma_ray.model.config import DecodabilityConfig, ImageryConfig, ModelConfig
from karma_ray.objectives.losses import ObjectiveConfig
from karma_ray.runs.executor import HERE, Executor
from karma_ray.runs.run_log import RunLog
from karma_ray.runs.stage_images import features_hash
from karma_ray.runs.stage_jobs import warmup_job
from karma_ray.runs.stages import (
    Stage,
    is_tiny,
    over_ids,
    with_checkpoints,
)
from karma_ray.runs.training import run_training
from karma_ray.training.config import EXECUTION, WARMED_UP_BY, TrainingConfig
from karma_ray.training.language import pretrain

LOG = logging.getLogger(__name__)

STAGE_VERSION = 2
"""Raised when code changes what a cached stage holds: old caches are then not found."""


def start_stage(
    config: Config, source: PreparedData, cache: str, run: str | None = None,
    executor: Executor = HERE,
) -> Stage:  # fmt: skip
    """Pretrained (when tiny) and warmed-up weights, from the cache where they are there.

    Their log lines are copied into `run`, so that its report shows every stage.
    """
    items_hash = content_hash(join(source.items_uri, "items"))
    features_hash(config, source.items_uri)  # raises now rather than after the pretraining
    if over_ids(config):  # of a language model it needs the tokenizer only
        untrained, cold = replace(config.pretrain, steps=0), replace(config.warmup, skip=True)
        config = replace(config, pretrain=untrained, warmup=cold)
    if is_tiny(config):
        folder = join(cache, f"language-model-{value_hash(pretrain_key(config, items_hash))}")
        with locked(folder):
            _pretrained(config, source, folder)
        _copy_lines(f"{folder}-log", run)
        config = with_checkpoints(config, _with_pictures(config, folder), folder)
    stage = Stage(config, source.items_uri)
    if config.warmup.skip:
        return stage
    warm = join(cache, f"warmup-{value_hash(warmup_key(config, items_hash, source.items_uri))}")
    with locked(warm):
        final = _warmed_up(Stage(warmup_config(config), source.items_uri), warm, executor)
    _copy_lines(warm, run)
    return replace(stage, warm=final)


def warmup_config(config: Config) -> Config:
    """What the warm-up is told of a configuration: all else is at its default.

    It runs on this very configuration and is cached under it, so nothing that it depends on can
    be forgotten in the key, and recipes that differ in the rest share it. Of the objective it knows
    the weight of the visual term alone.
    """
    warmup, model, with_images = config.warmup, config.model, config.objective.built.image
    training = TrainingConfig()
    return Config(
        seed=config.seed,
        collate=config.collate if with_images else replace(config.collate, visual_features=""),
        model=ModelConfig(
            item_encoder=model.item_encoder, user_decoder=model.user_decoder, score=model.score,
            decodability=DecodabilityConfig(
                max_target_tokens=model.decodability.max_target_tokens
            ),
            imagery=model.imagery if with_images else ImageryConfig(),
            peft=model.peft, kind=model.kind,
        ),
        warmup=warmup,
        objective=ObjectiveConfig(lambda_img=config.objective.lambda_img if with_images else 0.0),
        training=replace(
            config.training, steps=warmup.steps, batch_size=warmup.batch_size,
            learning_rate=warmup.learning_rate, encoder_grad=training.encoder_grad,
            encoder_delay=training.encoder_delay, encoder_lr=training.encoder_lr,
            bank_refresh_steps=training.bank_refresh_steps, validate_every=0, checkpoint_every=0,
        ),
    )  # fmt: skip


def warmup_key(config: Config, items_hash: str, items_uri: str = "") -> dict[str, object]:
    """What warmed-up weights depend on: `warmup_config` but for where and how it is executed.

    Checkpoints and the visual features of the data at `items_uri` are named by their content;
    `config` has `tiny` resolved.
    """
    fields = dict(flattened(to_dict(warmup_config(config))))
    kept = {n: value for n, value in fields.items() if n not in EXECUTION or n in WARMED_UP_BY}
    for name in ("model.item_encoder.checkpoint", "model.user_decoder.checkpoint"):
        kept[name] = content_hash(kept[name]) if Path(kept[name]).is_dir() else kept[name]
    kept["collate.visual_features"] = features_hash(config, items_uri)
    return {"version": STAGE_VERSION, "items": items_hash, **kept}


def token_table(catalog: Catalog, tokens: np.ndarray, lengths: np.ndarray) -> pa.Table:
    """The `item_tokens` table."""
    lists = [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]
    ids = pa.array(lists, pa.list_(pa.int32()))
    return pa.table({"item_id": pa.array(catalog.item_ids), "token_ids": ids})


def pretrain_key(config: Config, items_hash: str) -> dict[str, object]:
    """What a pretrained tiny language model depends on."""
    return {
        "version": STAGE_VERSION,
        "items": items_hash,
        "tiny": dataclasses.asdict(config.model.tiny),
        "pretrain": dataclasses.asdict(config.pretrain),
        "max_item_tokens": config.collate.max_item_tokens,
        "seed": config.seed,
    }


def _warmed_up(stage: Stage, folder: str, executor: Executor) -> str:
    """Where the weights of stage 1 lie; a finished one is taken, an unfinished one continued."""
    job = warmup_job(stage, tokens := join(folder, "item_tokens"), folder)
    if exists(join(job.final, "summary.json")):
        return job.final
    LOG.info("warm-up: at most %d steps", stage.config.warmup.steps)
    # Written anew even where it is there: an interrupted writer may have left half of it.
    write_table(token_table(stage.catalog(), *stage.collator().catalog_tokens()), tokens)
    run_training(job, resume=True, distribute=executor.train)
    return job.final


def _pretrained(config: Config, source: PreparedData, folder: str) -> None:
    """Pretrain the tiny language model unless it is there."""
    if exists(join(folder, "manifest.json")):
        return
    LOG.info("pretraining a tiny language model: %d steps", config.pretrain.steps)
    shutil.rmtree(f"{folder}-log", ignore_errors=True)
    log = RunLog(f"{folder}-log", "pretrain")
    pretrain(
        source.catalog().texts(), folder, tiny=config.model.tiny, config=config.pretrain,
        max_tokens=config.collate.max_item_tokens, seed=config.seed, report=log.add, progress=True,
    )  # fmt: skip
    log.close()


def _with_pictures(config: Config, folder: str) -> str:
    """The tiny item encoder: the language model itself, or one that reads pictures around it."""
    if config.model.item_encoder.modality != "multimodal":
        return folder
    seeing = f"{folder}-vl"
    with locked(seeing):
        if not exists(join(seeing, "config.json")):
            draft = f"{seeing}.tmp"
            shutil.rmtree(draft, ignore_errors=True)
            special = SpecialIds.of(load_tokenizer(folder))
            body = build_tiny_with_pictures(
                load_body(folder), special.text_start, special.text_end, config.seed
            )
            save_body(body, draft)
            os.replace(draft, seeing)
    return seeing


def _copy_lines(source: str, run: str | None) -> None:
    """Put a cached stage's log lines into a run, once."""
    if run is None:
        return
    target = RunFolder(run).metrics_lines
    lines = list(read_lines(RunFolder(source).metrics_lines))
    present = {line["stage"] for line in read_lines(target)}
    fresh = [json.dumps(line) + "\n" for line in lines if line["stage"] not in present]
    fs, path = open_filesystem(target)
    with fs.open(path, "ab") as sink:
        sink.write("".join(fresh).encode())
