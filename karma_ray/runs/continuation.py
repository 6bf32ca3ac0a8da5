"""Resuming a run from its own checkpoints (`--resume`), or from a finished run (`--init-from`).

RUN/start.json says which weights the joint stage began with. A resumed run therefore begins with
the same weights, even if caches or execution settings have changed since.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

from karma_ray import recipes
from karma_ray.artifacts import (
    RunFolder,
    absolute,
    exists,
    join,
    read_json,
    read_manifest,
    write_json,
)
from karma_ray.config import Config, flattened, from_dict, to_dict
from karma_ray.data.paraphrases import Paraphrases
from karma_ray.data.pictures import has_images
from karma_ray.data.prepared import PreparedData, differences
from karma_ray.errors import InputError
from karma_ray.model.lora import parse_rank
from karma_ray.pretrained import names_llm
from karma_ray.runs.forgetting import general_texts
from karma_ray.runs.stages import Stage, finished_stage, with_checkpoints
from karma_ray.training.config import EXECUTION

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parent:
    """A finished run whose model another run trains further."""

    run: str
    config: Config
    content_hash: str

    @classmethod
    def open(cls, run: str) -> Parent:
        """Raises InputError when the run is not finished."""
        run = absolute(run)
        if "://" not in run:
            run = str(Path(run).resolve())  # `runs/latest` will soon point to another run
        folder = RunFolder(run)
        for part in ("config.json", "checkpoints/joint/final/summary.json", "bundle/manifest.json"):
            if not exists(folder.path(part)):
                raise InputError("--init-from", run, f"is not a finished run: it has no {part}")
        bundle = read_manifest(folder.bundle, "bundle")
        return cls(run, from_dict(read_json(folder.config)), str(bundle["content_hash"]))

    def continued(self, config: Config) -> Config:
        """Return `config` for training this model further; raises InputError on another model.

        The decoder can already read the item embeddings, so the encoder need not be delayed.
        """
        theirs, mine = (
            dict(flattened({"model": to_dict(c)["model"]})) for c in (self.config, config)
        )
        for name, value in mine.items():
            if theirs[name] != value:
                message = f"differs from {theirs[name]!r} of the run to continue ({self.run})"
                raise InputError(name, value, message)
        if config.training.encoder_delay:
            LOG.info("training.encoder_delay = 0: the decoder of %s is already trained", self.run)
        # Hard negatives are delayed until h reflects the query; here it already does.
        return replace(
            config,
            training=replace(config.training, encoder_delay=0.0),
            objective=replace(config.objective, hard_ramp=0.0),
        )

    def stage(self, config: Config, items_uri: str) -> Stage:
        """Return the stage with this run's weights and tokenizer, and the given configuration."""
        stage = finished_stage(self.run, items_uri)
        model = stage.config.model
        item, user = model.item_encoder.checkpoint, model.user_decoder.checkpoint
        return replace(stage, config=with_checkpoints(config, item, user))


def check_resumed(config: Config, source: PreparedData, folder: RunFolder) -> None:
    """Raise InputError if a resumed run has another configuration or other data than before."""
    if not exists(folder.config):
        return
    saved = dict(flattened(to_dict(from_dict(read_json(folder.config)))))
    wanted = dict(flattened(to_dict(config)))
    changed = [n for n in wanted if saved[n] != wanted[n] and n not in EXECUTION]
    if changed:
        raise InputError(
            "--resume", folder.root,
            f"was started with other values of {', '.join(changed)}; "
            f"repeat its flags or pass --config {folder.config}",
        )  # fmt: skip
    there = read_json(folder.path("data.json"))
    if there.get("prepared") != source.uri:
        message = f"is not what the run was started on: {there.get('prepared')}"
        raise InputError("--data", source.uri, message)
    if there.get("input") != source.facts.get("input"):
        message = "was prepared again since the run started, so its steps would read other rows"
        raise InputError("--data", source.uri, message)


def warn_of_other_split(config: Config, source: PreparedData) -> None:
    """Warn if the data of a finished run were prepared otherwise since it was trained."""
    changed = {} if source.facts.get("presplit") else differences(source.facts, config.prepare)
    for name, (there, wanted) in changed.items():
        LOG.warning(
            "%s was prepared again since the run: prepare.%s was %r and is %r, so clicks and items "
            "that are measured as unseen may have been trained on", source.uri, name, wanted, there,
        )  # fmt: skip


def check_sizes(config: Config, source: PreparedData, with_warmup: bool) -> None:
    """Raise InputError on settings that would fail later on a worker or drop clicks silently."""
    config.evaluation.corpus_size()  # raises on an invalid corpus
    if named := config.evaluation.paraphrases:
        Paraphrases.load(named).check(source.examples("test"))
    if config.recipe in recipes.LLM_FLOORS and not names_llm(config):
        message = "needs a pretrained language model: name one with --set model.checkpoint=..."
        raise InputError("--recipe", config.recipe, message)
    if config.recipe not in recipes.TRAINED:
        return
    training, warmup = config.training, config.warmup
    sizes = {"training.batch_size": training.batch_size}
    if with_warmup and not warmup.skip:
        sizes["warmup.batch_size"] = warmup.batch_size
    for name, size in sizes.items():
        if size < training.num_workers:
            message = f"gives some of training.num_workers={training.num_workers} nothing to do"
            raise InputError(name, size, message)
    if not 0 <= training.min_workers <= training.num_workers:
        message = f"is not between 0 and training.num_workers={training.num_workers}"
        raise InputError("training.min_workers", training.min_workers, message)
    if config.model.decodability.recon_text == "shuffled" and (
        training.micro_batch_size or training.num_workers > 1
    ):
        message = (
            "exchanges the texts of one whole batch: it needs training.micro_batch_size=0 and "
            "training.num_workers=0 or 1"
        )
        raise InputError("model.decodability.recon_text", "shuffled", message)
    config.model.check()
    config.objective.check()
    if config.objective.built.image:
        config.model.imagery.check()
    parse_rank(config.model.peft)
    if texts := config.evaluation.general_texts:
        general_texts(texts, source.items_uri)  # raises before training
    lexical, items = config.model.item_encoder.lexical, source.facts["counts"]["items"]
    if lexical >= items:  # the lexical block checks its other needs once the texts are tokens
        message = f"must be below the number of items, {items}"
        raise InputError("model.item_encoder.lexical", lexical, message)
    if config.model.item_encoder.modality == "multimodal" and not has_images(source.items_uri):
        message = f"needs images, but the items of {source.items_uri!r} have none"
        raise InputError("model.item_encoder.modality", "multimodal", message, choices=["text"])
    prepared = (source.facts.get("prepare") or {}).get("max_history", 0)
    if config.collate.max_history < prepared:
        raise InputError(
            "collate.max_history",
            config.collate.max_history,
            f"is shorter than the prepared windows (prepare.max_history={prepared}); set both",
        )


def note_start(folder: RunFolder, stage: Stage, parent: str | None) -> None:
    """Write RUN/start.json; `parent` is the content hash of the run given by `--init-from`."""
    model = stage.config.model
    write_json(
        {
            "item_encoder": model.item_encoder.checkpoint,
            "user_decoder": model.user_decoder.checkpoint,
            "warm": stage.warm,
            "contents": stage.contents,
            "trained": stage.trained,
            "tokenizer": stage.tokenizer_folder,
            "parent": parent,
        },
        folder.path("start.json"),
    )


def noted_parent(folder: RunFolder, parent: Parent | None) -> str | None:
    """Return the content hash of the run that this one was initialised from, if any.

    Raises InputError when `parent` is another run.
    """
    given = parent.content_hash if parent else None
    if not exists(folder.path("start.json")):
        return given
    noted: str | None = read_json(folder.path("start.json"))["parent"]
    if parent and noted != given:
        raise InputError("--init-from", parent.run, f"is not what {folder.root} was started from")
    return noted


def noted_stage(folder: RunFolder, config: Config, items_uri: str) -> Stage | None:
    """Return the stage that RUN/start.json describes, or None if its weights no longer exist."""
    if not exists(folder.path("start.json")):
        return None
    noted = read_json(folder.path("start.json"))
    needed = [join(noted[name], "model.safetensors") for name in ("warm", "trained") if noted[name]]
    contents = noted.get("contents")
    needed += [join(contents, "manifest.json")] if contents else []
    backbones = (noted["item_encoder"], noted["user_decoder"])
    needed += [name for name in backbones if name.startswith("/") or "://" in name]  # no hub name
    if not all(exists(path) for path in needed):
        return None
    resolved = with_checkpoints(config, noted["item_encoder"], noted["user_decoder"])
    return Stage(
        resolved, items_uri, warm=noted["warm"], trained=noted["trained"],
        tokenizer_folder=noted["tokenizer"], contents=contents,
    )  # fmt: skip
