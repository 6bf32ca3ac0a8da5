"""The stages before joint training, pretraining and warm-up, with a cache shared by recipes."""

from __future__ import annotations

import json
from dataclasses import replace

from karma_ray.artifacts import RunFolder, join, open_filesystem, read_lines
from karma_ray.config import Config
from karma_ray.data.prepared import PreparedData
from karma_ray.node_cache import known_hash
from karma_ray.runs.executor import HERE, Executor
from karma_ray.runs.near_duplicates import with_near_duplicates
from karma_ray.runs.plain_checkpoints import with_plain_checkpoints, with_shared_checkpoints
from karma_ray.runs.pretraining import pretrained
from karma_ray.runs.stage_images import features_hash
from karma_ray.runs.stages import Stage, is_tiny, over_ids
from karma_ray.runs.warm_up import warmed_up


def start_stage(
    config: Config, source: PreparedData, cache: str, run: str | None = None,
    executor: Executor = HERE,
) -> Stage:  # fmt: skip
    """Return the stage with pretrained (if tiny) and warmed-up weights, reusing cached ones.

    The log lines of these stages are copied into `run`, so that its report shows every stage.
    """
    items_hash = known_hash(join(source.items_uri, "items"))
    features_hash(config, source.items_uri)  # raises before, not after, the pretraining
    if over_ids(config):  # such a model needs only the tokenizer of the language model
        untrained, cold = replace(config.pretrain, steps=0), replace(config.warmup, skip=True)
        config = replace(config, pretrain=untrained, warmup=cold)
    config = with_plain_checkpoints(config, cache)
    if config.training.num_workers:
        config = with_shared_checkpoints(config, cache)
    tiny = is_tiny(config)
    if tiny:
        config, log = pretrained(config, source, items_hash, cache)
        _copy_lines(log, run)
    stage = Stage(config, source.items_uri).with_frozen(cache, executor.freeze)
    if not config.warmup.skip:
        weights, log = warmed_up(stage, items_hash, cache, executor)
        stage = replace(stage, warm=weights)
        _copy_lines(log, run)
    # Embeddings of a small model of this catalogue do not say which of its items are the same.
    return stage if tiny or over_ids(config) else with_near_duplicates(stage, items_hash, cache)


def _copy_lines(source: str, run: str | None) -> None:
    """Append the log lines of a cached stage to a run, unless they are already there."""
    if run is None:
        return
    target = RunFolder(run).metrics_lines
    lines = list(read_lines(RunFolder(source).metrics_lines))
    present = {line["stage"] for line in read_lines(target)}
    fresh = [json.dumps(line) + "\n" for line in lines if line["stage"] not in present]
    fs, path = open_filesystem(target)
    with fs.open(path, "ab") as sink:
        sink.write("".join(fresh).encode())
