"""What comes before joint training: a tiny language model where none is given, and the warm-up.

Both lie in a cache that all recipes share, under what they depend on.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from dataclasses import replace

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
from karma_ray.config import Config
from karma_ray.data.prepared import PreparedData
from karma_ray.data.prompts import SpecialIds
from karma_ray.model.backbone import build_tiny_with_pictures, load_body, save_body
from karma_ray.model.backbones.tokenizer import load_tokenizer
from karma_ray.runs.executor import HERE, Executor
from karma_ray.runs.run_log import RunLog
from karma_ray.runs.stage_images import imagery_key
from karma_ray.runs.stage_jobs import warmup_job
from karma_ray.runs.stages import (
    Stage,
    is_tiny,
    over_ids,
    pretrain_key,
    token_table,
    warmup_key,
    with_checkpoints,
)
from karma_ray.runs.training import run_training
from karma_ray.training.language import pretrain

LOG = logging.getLogger(__name__)


def start_stage(
    config: Config, source: PreparedData, cache: str, run: str | None = None,
    executor: Executor = HERE,
) -> Stage:  # fmt: skip
    """Pretrained (when tiny) and warmed-up weights, from the cache where they are there.

    Their log lines are copied into `run`, so that its report shows every stage.
    """
    items_hash = content_hash(join(source.items_uri, "items"))
    imagery_key(config, source.items_uri)  # raises now rather than after the pretraining
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
        final = _warmed_up(stage, warm, executor)
    _copy_lines(warm, run)
    return replace(stage, warm=final)


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
