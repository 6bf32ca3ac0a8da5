"""Diagnosis of several runs: each trained model is measured beside the weights it started from.

RUN/start.json names the start: the warmed-up weights, or the finished run given by `--init-from`,
if they still exist. Runs that are compared must have been trained on the same data and must
tokenise the items in the same way.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from karma_ray import recipes
from karma_ray.artifacts import RunFolder, absolute, exists, read_json, read_manifest
from karma_ray.baselines.popularity import warm_mask
from karma_ray.config import Config, from_dict
from karma_ray.data.prepared import PreparedData, read_data_manifest
from karma_ray.errors import InputError
from karma_ray.evaluation.diagnosis import ModelDiagnosis, ProbeSet, Wanted, diagnose
from karma_ray.evaluation.probe_sets import (
    NUM_ITEMS,
    VECTORS_PER_ITEM,
    item_sample,
    request_sample,
    vector_sample,
    word_sample,
)
from karma_ray.metrics.attention import EPSILON
from karma_ray.metrics.collapse import linear_cka
from karma_ray.model.device import this_device
from karma_ray.model.karma import KarmaModel
from karma_ray.report.diagnosis_page import Comparison, Subject, render_diagnosis
from karma_ray.retrieval.complete_run import require_run
from karma_ray.runs.continuation import noted_stage
from karma_ray.runs.stages import Stage, finished_stage
from karma_ray.training.step import JointStep

LOG = logging.getLogger(__name__)
SAMPLE_SEED = 0
"""Seed of the item and request samples; fixed, so that runs of several seeds share them."""
FEWEST_ITEMS = 8


@dataclass(frozen=True)
class OpenedRun:
    """A finished, trained run."""

    run: str
    name: str
    config: Config
    data: str

    @classmethod
    def open(cls, run: str) -> OpenedRun:
        """Open a run; raises InputError unless it is finished and has a trained text model."""
        path = absolute(run)
        if "://" not in path:
            path = str(Path(path).resolve())  # show the name of the run that `latest` points to
        folder = RunFolder(path)
        require_run(path)
        config = from_dict(read_json(folder.config))
        if config.recipe not in recipes.TRAINED:
            message = f"is the floor or ceiling {config.recipe}: there is no model to diagnose"
            raise InputError("RUN", run, message)
        if config.model.kind != "karma":
            message = f"is a {config.model.kind}, which reads ids and no texts: nothing to diagnose"
            raise InputError("RUN", run, message)
        for part in ("checkpoints/joint/final/summary.json", "bundle/config.json", "manifest.json"):
            if not exists(folder.path(part)):
                raise InputError("RUN", run, f"is not finished: it has no {part}")
        return cls(path, path.rsplit("/", 1)[-1], config, str(read_manifest(path, "run")["data"]))

    def start(self, items_uri: str) -> tuple[str, Stage | None]:
        """Return a key that is equal for equal starting weights, and their stage if it exists."""
        folder = RunFolder(self.run)
        path = folder.path("start.json")
        noted = read_json(path) if exists(path) else {}
        key = str([noted.get(name) for name in ("item_encoder", "warm", "trained")])
        unwarmed = [self.config.seed, self.run] if noted.get("warm") is None else []
        return f"{key}{unwarmed}", noted_stage(folder, self.config, items_uri)

    def facts(self) -> dict[str, Any]:
        """Return the facts that the report shows."""
        return {"run": self.run, "recipe": self.config.recipe, "seed": self.config.seed}


def diagnose_runs(
    runs: Sequence[str],
    *,
    data: str | None = None,
    out: str | None = None,
    wanted: Sequence[Wanted] | None = None,
    num_items: int = NUM_ITEMS,
) -> tuple[Comparison, str]:
    """Measure runs on the same items; returns the comparison and the path of its page.

    `data` defaults to the data that the runs were trained on, `out` to the report folder of the
    last run. Raises InputError on unfinished runs, on runs that cannot be compared, and on heads
    that a model does not have.
    """
    if num_items < FEWEST_ITEMS:
        raise InputError("--items", num_items, f"is below {FEWEST_ITEMS}")
    opened = _distinct([OpenedRun.open(run) for run in runs])
    if data is None:
        _check_same_data(opened)
    source = PreparedData.load(absolute(data) if data else opened[0].data)
    probe_set = _probe_set(opened, source, num_items)
    subjects, notes = _measured(opened, source.items_uri, probe_set, wanted)
    if probe_set.requests is None:
        notes.append("The data have no valid requests with a history: the user decoder, h and its "
                     "decode gap were not measured.")  # fmt: skip
    comparison = Comparison(subjects, _facts(source, probe_set), notes)
    folder = absolute(out) if out else RunFolder(opened[-1].run).report
    return comparison, render_diagnosis(comparison, folder)


def parse_heads(text: str) -> list[Wanted]:
    """`9:1,11:1,3` -> heads 1 of layers 9 and 11, all heads of layer 3; raises InputError."""
    found: list[Wanted] = []
    for part in text.split(","):
        layer, colon, head = part.strip().partition(":")
        if not (layer.isdecimal() and (head.isdecimal() or not colon)):
            raise InputError("--layers", part, choices=["LAYER:HEAD", "LAYER"])
        found.append((int(layer), int(head) if colon else None))
    return found


def _distinct(opened: list[OpenedRun]) -> list[OpenedRun]:
    """Keep each run once, and give each a unique name."""
    kept: dict[str, OpenedRun] = {run.run: run for run in opened}
    names: dict[str, int] = {}
    result = []
    for run in kept.values():
        count = names[run.name] = names.get(run.name, 0) + 1
        name = run.name if count == 1 else f"{run.name} ({count})"
        result.append(OpenedRun(run.run, name, run.config, run.data))
    return result


def _check_same_data(opened: list[OpenedRun]) -> None:
    def identity(run: OpenedRun) -> object:
        path = RunFolder(run.run).path("data.json")
        return (read_json(path).get("input") if exists(path) else None) or run.data

    for run in opened[1:]:
        if identity(run) != identity(opened[0]):
            message = (
                f"was trained on other data ({run.data}) than {opened[0].run} ({opened[0].data}); "
                "diagnose it by itself, or name with --data the data to measure both on"
            )
            raise InputError("RUN", run.run, message)


def _probe_set(opened: list[OpenedRun], source: PreparedData, num_items: int) -> ProbeSet:
    """Draw the probe set with the first run's tokens.

    Raises InputError when another run tokenises the items differently.
    """
    catalog = source.catalog()
    warm = warm_mask(source.windows("item_ids"), catalog)
    first = finished_stage(opened[0].run, source.items_uri).collator()
    items = item_sample(first, catalog, warm, num_items, SAMPLE_SEED)
    for run in opened[1:]:
        other = finished_stage(run.run, source.items_uri).collator()
        theirs = item_sample(other, catalog, warm, num_items, SAMPLE_SEED)
        if not torch.equal(items.tokens, theirs.tokens):
            message = (
                f"tokenises the items differently from {opened[0].run} (another tokenizer, or "
                "another collate.max_item_tokens): maps cannot be compared, diagnose it by itself"
            )
            raise InputError("RUN", run.run, message)
    vectors = vector_sample(first, catalog, VECTORS_PER_ITEM * num_items, SAMPLE_SEED)
    requests = request_sample(first, source.examples("valid"), num_items, SAMPLE_SEED)
    words = word_sample(first, source.examples("valid"), SAMPLE_SEED)
    return ProbeSet(items, vectors, requests, words, SAMPLE_SEED)


def _measured(
    opened: list[OpenedRun], items_uri: str, probe_set: ProbeSet, wanted: Sequence[Wanted] | None
) -> tuple[list[Subject], list[str]]:
    """Measure each starting model once and then the runs; also return notes on missing parts."""
    starts = {run.name: run.start(items_uri) for run in opened}
    keys = list(dict.fromkeys(key for key, stage in starts.values() if stage is not None))
    frozen: dict[str, ModelDiagnosis] = {}
    subjects, notes = [], []
    for run in opened:
        key, stage = starts[run.name]
        if stage is None:
            notes.append(f"The weights that {run.name} started from no longer exist: there is no "
                         "frozen encoder to compare it with.")  # fmt: skip
        elif key not in frozen:
            name = "frozen" if len(keys) == 1 else f"frozen {len(frozen) + 1}"
            model = stage.build_joint() if stage.trained is None else stage.build_trained()
            found = frozen[key] = _measure(name, model, run.config, probe_set, wanted)
            found.metrics["collapse/cka_frozen"] = 1.0
            begin = [other.name for other in opened if starts[other.name][0] == key]
            subjects.append(Subject(name, {"the beginning of": ", ".join(begin)}, found))
    for run in opened:
        model = finished_stage(run.run, items_uri).build_trained()
        found = _measure(run.name, model, run.config, probe_set, wanted)
        if before := frozen.get(starts[run.name][0]):
            found.metrics["collapse/cka_frozen"] = linear_cka(found.vectors, before.vectors)
        subjects.append(Subject(run.name, run.facts(), found))
    return subjects, notes


def _measure(
    name: str, model: KarmaModel, config: Config, probe_set: ProbeSet,
    wanted: Sequence[Wanted] | None,
) -> ModelDiagnosis:  # fmt: skip
    started = time.monotonic()
    LOG.info("measuring %s", name)
    model = model.to(this_device())
    found = diagnose(model, probe_set, JointStep(config.objective).probe, wanted)
    LOG.info("measured %s in %.0f s", name, time.monotonic() - started)
    return found


def _facts(source: PreparedData, probe_set: ProbeSet) -> dict[str, Any]:
    requests = probe_set.requests
    return {
        "data": read_data_manifest(source.items_uri).get("name") or source.items_uri,
        "data_uri": source.uri,
        "seed": probe_set.seed,
        "epsilon": EPSILON,
        "num_items": len(probe_set.items.rows),
        "num_held_out": probe_set.items.num_held_out,
        "item_length": probe_set.items.tokens.shape[1],
        "num_vectors": len(probe_set.vectors.rows),
        "num_requests": requests.requests.num_windows if requests else 0,
        "history": requests.num_history if requests else 0,
    }
