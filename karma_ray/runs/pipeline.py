"""The training pipeline, from logs to metrics.

logs -> examples -> warm-up -> joint training -> bundle -> item embeddings -> index -> metrics

Each step writes a folder and is skipped if that folder is complete: preparation in the data
folder, pretraining and warm-up in a cache shared by all recipes, the rest in the run folder. An
interrupted run continues with `resume=True`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from karma_ray import __version__, recipes
from karma_ray.artifacts import (
    RunFolder,
    absolute,
    exists,
    join,
    read_json,
    read_manifest,
    write_json,
    write_manifest,
)
from karma_ray.config import Config, from_dict, to_dict
from karma_ray.data.prepared import PreparedData, read_data_manifest
from karma_ray.errors import InputError
from karma_ray.model.backbones.checkpoints import shape_facts
from karma_ray.model.device import this_device
from karma_ray.node_cache import known_hash
from karma_ray.report.page import render_report
from karma_ray.retrieval.complete_run import check_run, require_run
from karma_ray.retrieval.encode import ItemTable, encode_catalog, save_embeddings
from karma_ray.retrieval.export import save_bundle
from karma_ray.retrieval.index_build import index_run
from karma_ray.retrieval.parts import start_over
from karma_ray.runs.assessment import assess
from karma_ray.runs.continuation import (
    Parent,
    check_resumed,
    check_sizes,
    note_start,
    noted_parent,
    noted_stage,
    warn_of_other_split,
)
from karma_ray.runs.cost import Cost
from karma_ray.runs.ctr import check_ranking, train_ctr
from karma_ray.runs.evaluation_shares import Enlist
from karma_ray.runs.executor import HERE, Executor
from karma_ray.runs.first_stages import start_stage
from karma_ray.runs.forgetting import PREFIX, forgetting
from karma_ray.runs.joint import OnValidate, joint_job
from karma_ray.runs.preparation import ensure_prepared
from karma_ray.runs.sources import cache_beside, toy_shop
from karma_ray.runs.stages import Stage, finished_stage, model_size, over_ids
from karma_ray.runs.tracking import tracked
from karma_ray.runs.training import on_its_devices, run_training

LOG = logging.getLogger(__name__)


@tracked
@on_its_devices
def train_run(
    config: Config,
    data: str | None,
    out: str,
    *,
    on_validate: OnValidate | None = None,
    resume: bool = False,
    init_from: str | None = None,
    cache: str | None = None,
    executor: Executor = HERE,
    is_tested: bool = True,
) -> dict[str, Any]:
    """Run a recipe from tables to a complete run folder; returns the content of metrics.json.

    Without `data` the toy shop is generated. A floor or ceiling is evaluated without training.
    `on_validate(step, metrics)` is called at every validation in this process (needs
    `training.num_workers=0`) and may raise to stop the run. `init_from` is a finished run whose
    model is trained further, without pretraining and warm-up. `cache` is shared by runs (default:
    `cache_beside`). `executor` does the heavy parts. Without `is_tested` the run ends with its
    index, has no metrics and returns none. Raises InputError on bad input.
    """
    run, cache = absolute(out), absolute(cache or cache_beside(out))
    folder, cost = RunFolder(run), Cost()
    if run.rsplit("/", 1)[-1] == "latest":
        raise InputError("--out", out, "is the name of the link to the newest run")
    if not resume and (exists(folder.metrics) or exists(folder.checkpoints)):
        raise InputError("--out", out, "already holds a run; --resume it or choose another folder")
    parent = Parent.open(init_from) if init_from else None
    if parent and config.recipe not in recipes.TRAINED:
        raise InputError("--init-from", parent.run, f"is not used by the recipe {config.recipe}")
    config = parent.continued(config) if parent else config
    tables = absolute(data) if data else toy_shop(cache)
    source = ensure_prepared(tables, config.prepare, executor.prepare)
    _check(config, source, executor, with_warmup=parent is None)
    cost.reached("data")
    if resume:
        check_resumed(config, source, folder)
    init = noted_parent(folder, parent)
    parents = {"data": str(source.facts.get("input", "")), **({"init": init} if init else {})}
    write_json(to_dict(config), folder.config)
    write_json(facts := _data_facts(source), folder.path("data.json"))
    stage = None
    if config.recipe in recipes.RANKERS:
        train_ctr(config, source, run, cache, executor, resume, on_validate)
    elif config.recipe in recipes.TRAINED:
        found = noted_stage(folder, config, source.items_uri) if resume else None
        stage = _first_stage(config, source, cache, run, found, parent, executor)
        note_start(folder, stage, init)
        _note_items(stage, folder, facts)
        cost.reached("first_stages")
        stage = _train(stage, source, run, on_validate, resume, executor)
        with cost.timed("embedding"):
            _serve_side(stage, folder, source, executor)
    write_manifest(
        run, "run", recipe=config.recipe, seed=config.seed, data=source.uri,
        items=source.items_uri, version=__version__, parents=parents,
    )  # fmt: skip
    return _tested(config, source, folder, stage, cache, executor, cost) if is_tested else {}


def _check(config: Config, source: PreparedData, executor: Executor, *, with_warmup: bool) -> None:
    """Raise InputError if sizes do not fit, or no executor can start the workers."""
    check_sizes(config, source, with_warmup=with_warmup)
    check_ranking(config, source)
    workers = config.training.num_workers
    if executor.train is None and workers > 1:
        message = "cannot be started by this process alone; jobs/train.py starts them on Ray"
        raise InputError("training.num_workers", workers, message, choices=[0, 1])


def _note_items(stage: Stage, folder: RunFolder, facts: Mapping[str, Any]) -> None:
    """Write to data.json how much of the items' texts is read, and warn if much is cut off.

    Near-duplicates that were found are counted there too.
    """
    if over_ids(stage.config):
        return
    lengths = stage.text_lengths()
    known = {**facts, "item_texts": asdict(lengths)}
    if stage.contents is not None:
        groups = read_manifest(stage.contents, "near_duplicates")
        known["near_duplicates"] = {name: groups[name] for name in ("grouped", "items", "cosine")}
    write_json(known, folder.path("data.json"))
    if warning := lengths.warning():
        LOG.warning(warning)


def evaluate_run(
    run: str, data: str | None = None, cache: str | None = None, out: str | None = None,
    executor: Executor = HERE,
) -> tuple[str, dict[str, Any]]:  # fmt: skip
    """Evaluate a finished run again; returns the folder of the evaluation and its metrics.

    On the data that the run was trained on, its metrics.json, floors, checks, cases and report
    are replaced. An evaluation on other `data` is written to `out` (default:
    RUN/evaluations/NAME) with a data.json and a manifest that name these data. Raises InputError
    on an unfinished run.
    """
    run, cache = absolute(run), absolute(cache or cache_beside(run))
    folder = RunFolder(run)
    require_run(run)
    config = from_dict(read_json(folder.config))
    if trained := config.recipe in recipes.TRAINED:
        check_run(run)
    trained_on = read_manifest(run, "run")["data"]
    source = PreparedData.load(absolute(data) if data else trained_on)
    stage = finished_stage(run, source.items_uri) if trained else None
    if source.uri == trained_on:
        warn_of_other_split(config, source)

    def measure(enlist: Enlist | None, out: str | None = None) -> dict[str, Any]:
        return assess(config, source, run, stage, cache, out, enlist)

    if source.uri == trained_on and out is None:
        there = read_json(folder.metrics) if exists(folder.metrics) else {}
        kept = {name: value for name, value in there.items() if name.startswith(PREFIX)}
        metrics = executor.measured(config, trained, measure) | kept
        metrics["seconds"] = there.get("seconds")
        write_json(metrics, folder.metrics)
        render_report(run)
        return run, metrics
    facts = _data_facts(source)
    named = str(facts.get("name") or source.uri.rstrip("/").rsplit("/", 1)[-1])
    beside = RunFolder(absolute(out) if out else folder.path("evaluations", named))
    if exists(beside.path("bundle")):
        problem = "holds a run; an evaluation needs a folder for itself"
        raise InputError("--out", beside.root, problem)
    write_json(to_dict(config), beside.config)
    write_json(facts, beside.path("data.json"))
    metrics = executor.measured(config, trained, partial(measure, out=beside.root))
    write_json(metrics, beside.metrics)
    parents = {"run": read_manifest(run, "run")["content_hash"],
               "data": str(source.facts.get("input", ""))}  # fmt: skip
    write_manifest(
        beside.root, "evaluation", recipe=config.recipe, seed=config.seed, data=source.uri,
        items=source.items_uri, run=run, version=__version__, parents=parents,
    )  # fmt: skip
    render_report(beside.root)
    return beside.root, metrics


def _first_stage(
    config: Config, source: PreparedData, cache: str, run: str, found: Stage | None,
    parent: Parent | None, executor: Executor,
) -> Stage:  # fmt: skip
    if found is None and parent is None:
        return start_stage(config, source, cache, run, executor)
    if found is None and parent is not None:
        LOG.info("training the model of %s further", parent.run)
        found = parent.stage(config, source.items_uri)
    assert found is not None
    return found.with_frozen(cache, executor.freeze)


def _train(
    stage: Stage, source: PreparedData, run: str, on_validate: OnValidate | None, resume: bool,
    executor: Executor,
) -> Stage:  # fmt: skip
    training = stage.config.training
    LOG.info("joint training: %d steps, %d worker(s)", training.steps, max(1, training.num_workers))
    job = joint_job(stage, source, run, on_validate)
    if stage.trained is not None:  # weights of the run given by --init-from
        job = replace(job, build=stage.build_finished)
    summary = run_training(job, resume=resume, max_failures=2, distribute=executor.train)
    return replace(stage, trained=summary["weights"], contents=None)


def _serve_side(stage: Stage, folder: RunFolder, source: PreparedData, executor: Executor) -> None:
    """Write what serving needs: the bundle, the item embeddings and the index.

    Outputs of frozen layers that were kept are used again, so embeddings of this catalogue differ
    from those of the bundle by the rounding of what was kept.
    """
    config, model = stage.config, stage.build_finished()
    facts = {"recipe": config.recipe, "seed": config.seed, **model_size(model)}
    if not over_ids(config):
        facts["checkpoints"] = _checkpoint_shapes(config)
    start_over(folder.root)
    save_bundle(model.interest, model.tokenizer, config.collate, folder.bundle, facts)
    if config.training.num_workers and executor.embed is not None:
        executor.embed(folder.bundle, stage.items_uri, folder.item_embeddings)
    else:
        collator, catalog = stage.collator(), stage.catalog()
        interest = model.interest.to(this_device())
        vectors = encode_catalog(interest, *collator.catalog_tokens())
        parents = {
            "bundle": read_manifest(folder.bundle)["content_hash"],
            "items": known_hash(join(stage.items_uri, "items")),
        }
        table = ItemTable(catalog.item_ids, catalog.titles, vectors, parents, catalog.categories)
        save_embeddings(table, folder.item_embeddings)
    index_run(folder.root, data=source.uri)


def _tested(
    config: Config, source: PreparedData, folder: RunFolder, stage: Stage | None, cache: str,
    executor: Executor, cost: Cost,
) -> dict[str, Any]:  # fmt: skip
    """Evaluate the run, where the executor does so, and finish its folder; returns its metrics."""

    def measure(enlist: Enlist | None) -> dict[str, Any]:
        found = assess(config, source, folder.root, stage, cache, enlist=enlist)
        return found | forgetting(stage, cache)

    with cost.timed("evaluation"):
        metrics = executor.measured(config, stage is not None, measure)
    metrics["seconds"] = cost.save(folder.root, stage)
    write_json(metrics, folder.metrics)
    render_report(folder.root)
    folder.link_latest()
    return metrics


def _checkpoint_shapes(config: Config) -> dict[str, dict[str, Any]]:
    """Return family, layers and width of both parts' checkpoints, as they were before any cut."""
    model = config.model
    return {
        "item_encoder": shape_facts(model.item_encoder.checkpoint),
        "user_decoder": shape_facts(model.user_decoder.checkpoint),
    }


def _data_facts(source: PreparedData) -> dict[str, Any]:
    """Return what the report says about the data: name, counts, labels, quarantine."""
    manifest = read_data_manifest(source.items_uri)
    kept = ("name", "query_source", "negative_source", "notes", "licence")
    return {k: manifest[k] for k in kept if k in manifest} | {
        k: source.facts[k]
        for k in ("counts", "quarantined", "valid_start", "test_start", "query_source",
                  "negative_source", "input")
        if k in source.facts
    } | {"uri": source.items_uri, "prepared": source.uri}  # fmt: skip
