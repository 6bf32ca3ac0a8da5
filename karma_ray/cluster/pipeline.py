"""The main job: raw logs -> examples -> warm-up -> joint training -> bundle -> index -> metrics.

Every arrow writes a folder and is skipped when its folder is there: preparation in the data
folder, pretraining and warm-up in a cache shared by all recipes, the rest in the run folder. A
run that was cut off continues with `resume=True`.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from dataclasses import asdict, replace
from typing import Any

from karma_ray import __version__, recipes
from karma_ray.artifacts import (
    RunFolder,
    absolute,
    content_hash,
    exists,
    join,
    locked,
    open_filesystem,
    read_json,
    read_lines,
    read_manifest,
    value_hash,
    write_json,
    write_manifest,
    write_table,
)
from karma_ray.cluster.assessment import assess
from karma_ray.cluster.continuation import (
    Parent,
    check_resumed,
    check_sizes,
    note_start,
    noted_parent,
    noted_stage,
)
from karma_ray.cluster.embedding import embed_items
from karma_ray.cluster.run_log import RunLog
from karma_ray.cluster.sharding import ensure_prepared
from karma_ray.cluster.sources import CACHE, toy_shop
from karma_ray.cluster.stage_images import imagery_key
from karma_ray.cluster.stage_jobs import OnValidate, joint_job, warmup_job
from karma_ray.cluster.stages import (
    Stage,
    finished_stage,
    is_tiny,
    over_ids,
    pretrain_key,
    token_table,
    warmup_key,
    with_checkpoints,
)
from karma_ray.cluster.training import run_training
from karma_ray.config import Config, from_dict, to_dict
from karma_ray.data.prepared import PreparedData, read_data_manifest
from karma_ray.data.prompts import SpecialIds
from karma_ray.errors import InputError
from karma_ray.model.backbone import load_body, load_tokenizer
from karma_ray.model.vision import build_seeing_body, save_seeing_body
from karma_ray.report.page import render_report
from karma_ray.retrieval.encode import ItemTable, encode_catalog, save_embeddings
from karma_ray.retrieval.export import save_bundle
from karma_ray.retrieval.retriever import check_run, index_run
from karma_ray.training.language import pretrain

LOG = logging.getLogger(__name__)


def train_run(
    config: Config,
    data: str | None,
    out: str,
    *,
    on_validate: OnValidate | None = None,
    resume: bool = False,
    init_from: str | None = None,
    cache: str = CACHE,
) -> dict[str, Any]:
    """Run a recipe from tables to a complete run folder; returns the content of metrics.json.

    Without `data` the toy shop is generated. A floor or ceiling is evaluated, nothing is
    trained. `on_validate(step, metrics)` is called at every validation inside this process
    (needs `training.num_workers=0`) and may raise to stop. `init_from` is a finished run whose
    model is trained further, without pretraining and warm-up. Raises InputError on bad input.
    """
    run, cache = absolute(out), absolute(cache)
    folder, started = RunFolder(run), time.time()
    if run.rsplit("/", 1)[-1] == "latest":
        raise InputError("--out", out, "is the name of the link to the newest run")
    if not resume and (exists(folder.metrics) or exists(folder.checkpoints)):
        raise InputError("--out", out, "already holds a run; --resume it or choose another folder")
    parent = Parent.open(init_from) if init_from else None
    if parent and config.recipe not in recipes.TRAINED:
        raise InputError("--init-from", parent.run, f"has no use in the recipe {config.recipe}")
    config = parent.continued(config) if parent else config
    source = ensure_prepared(absolute(data) if data else toy_shop(cache), config.prepare)
    check_sizes(config, source, with_warmup=parent is None)
    parents = {"data": str(source.facts.get("input", ""))}
    if resume:
        check_resumed(config, source, folder)
    if init := noted_parent(folder, parent):
        parents["init"] = init
    write_json(to_dict(config), folder.config)
    facts = _data_facts(source)
    write_json(facts, folder.path("data.json"))
    stage = None
    if config.recipe in recipes.TRAINED:
        found = noted_stage(folder, config, source.items_uri) if resume else None
        stage = found or _first_stage(config, source, cache, run, parent)
        note_start(folder, stage, init)
        if not over_ids(config):
            lengths = stage.text_lengths()
            write_json(facts | {"item_texts": asdict(lengths)}, folder.path("data.json"))
            if warning := lengths.warning():
                LOG.warning(warning)
        stage = _train(stage, source, run, on_validate, resume)
        _serve_side(stage, folder)
    write_manifest(
        run, "run", recipe=config.recipe, seed=config.seed, data=source.uri,
        items=source.items_uri,
        version=__version__, parents=parents,
    )  # fmt: skip
    metrics = assess(config, source, run, stage, cache)
    metrics["seconds"] = round(time.time() - started, 1)
    write_json(metrics, folder.metrics)
    render_report(run)
    folder.link_latest()
    return metrics


def evaluate_run(run: str, data: str | None = None, cache: str = CACHE) -> dict[str, Any]:
    """Measure a finished run again: metrics.json, floors, checks, cases and report are replaced.

    `data` defaults to the data the run was trained on. Raises InputError on an unfinished run.
    """
    run, cache = absolute(run), absolute(cache)
    folder = RunFolder(run)
    config = from_dict(read_json(folder.config))
    trained = config.recipe in recipes.TRAINED
    if trained:
        check_run(run)
    source = PreparedData.load(absolute(data) if data else read_manifest(run, "run")["data"])
    stage = finished_stage(run, source.items_uri) if trained else None
    seconds = read_json(folder.metrics).get("seconds") if exists(folder.metrics) else None
    metrics = assess(config, source, run, stage, cache) | {"seconds": seconds}
    write_json(metrics, folder.metrics)
    render_report(run)
    return metrics


def _first_stage(
    config: Config, source: PreparedData, cache: str, run: str, parent: Parent | None
) -> Stage:
    if parent is None:
        return start_stage(config, source, cache, run)
    LOG.info("going on with the model of %s", parent.run)
    return parent.stage(config, source.items_uri)


def start_stage(config: Config, source: PreparedData, cache: str, run: str | None = None) -> Stage:
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
        config = with_checkpoints(config, _with_eyes(config, folder), folder)
    stage = Stage(config, source.items_uri)
    if config.warmup.skip:
        return stage
    warm = join(cache, f"warmup-{value_hash(warmup_key(config, items_hash, source.items_uri))}")
    with locked(warm):
        final = _warmed_up(stage, warm)
    _copy_lines(warm, run)
    return replace(stage, warm=final)


def _warmed_up(stage: Stage, folder: str) -> str:
    """Where the weights of stage 1 lie; a finished one is taken, an unfinished one continued."""
    job = warmup_job(stage, tokens := join(folder, "item_tokens"), folder)
    if exists(join(job.final, "summary.json")):
        return job.final
    LOG.info("warm-up: at most %d steps", stage.config.warmup.steps)
    # Written anew even where it is there: an interrupted writer may have left half of it.
    write_table(token_table(stage.catalog(), *stage.collator().catalog_tokens()), tokens)
    run_training(job, resume=True)
    return job.final


def _train(
    stage: Stage, source: PreparedData, run: str, on_validate: OnValidate | None, resume: bool
) -> Stage:
    training = stage.config.training
    LOG.info("joint training: %d steps, %d worker(s)", training.steps, max(1, training.num_workers))
    job = joint_job(stage, source, run, on_validate)
    if stage.trained is not None:  # by the run that this one goes on from
        job = replace(job, build=stage.build_finished)
    summary = run_training(job, resume=resume, max_failures=2)
    return replace(stage, trained=summary["weights"])


def _serve_side(stage: Stage, folder: RunFolder) -> None:
    """Bundle, item embeddings and index: everything that serves."""
    config, model = stage.config, stage.build_finished()
    facts = {"recipe": config.recipe, "seed": config.seed}
    save_bundle(model.interest, model.tokenizer, config.collate, folder.bundle, facts)
    if config.training.num_workers:
        embed_items(folder.bundle, stage.items_uri, folder.item_embeddings)
    else:
        collator, catalog = stage.collator(), stage.catalog()
        vectors = encode_catalog(model.interest, *collator.catalog_tokens())
        parents = {
            "bundle": read_manifest(folder.bundle)["content_hash"],
            "items": content_hash(join(stage.items_uri, "items")),
        }
        table = ItemTable(catalog.item_ids, catalog.titles, vectors, parents)
        save_embeddings(table, folder.item_embeddings)
    index_run(folder.root)


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


def _with_eyes(config: Config, folder: str) -> str:
    """The tiny item encoder: the language model itself, or a Qwen3-VL around its weights."""
    if config.model.item_encoder.modality != "multimodal":
        return folder
    seeing = f"{folder}-vl"
    with locked(seeing):
        if not exists(join(seeing, "config.json")):
            draft = f"{seeing}.tmp"
            shutil.rmtree(draft, ignore_errors=True)
            special = SpecialIds.of(load_tokenizer(folder))
            body = load_body(folder)
            body = build_seeing_body(body, special.text_start, special.text_end, config.seed)
            save_seeing_body(body, draft)
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


def _data_facts(source: PreparedData) -> dict[str, Any]:
    """What the report says of the data: name, counts, labels, quarantine."""
    manifest = read_data_manifest(source.items_uri)
    kept = ("name", "query_source", "negative_source", "notes", "licence")
    return {k: manifest[k] for k in kept if k in manifest} | {
        k: source.facts[k]
        for k in ("counts", "quarantined", "valid_start", "test_start", "query_source",
                  "negative_source", "input")
        if k in source.facts
    } | {"uri": source.items_uri, "prepared": source.uri}  # fmt: skip
