"""Stage 1, the warm-up: its configuration, its cache key, its job and its stopping rule."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from karma_ray.artifacts import (
    content_hash,
    exists,
    join,
    locked,
    value_hash,
    write_table,
)
from karma_ray.config import Config, flattened, to_dict
from karma_ray.data.catalog import CHUNK, Catalog
from karma_ray.data.draws import hashed
from karma_ray.data.steps import flattened as flat_list
from karma_ray.data.steps import list_sizes
from karma_ray.data.visual import VisualFeatures
from karma_ray.model.backbones.sentence_folder import sentence_folder
from karma_ray.model.config import DecodabilityConfig, ImageryConfig, ModelConfig
from karma_ray.model.imagery import ImageTargets
from karma_ray.model.karma import KarmaModel
from karma_ray.model.lora import set_trained
from karma_ray.node_cache import checkpoint_hash
from karma_ray.objectives.losses import ObjectiveConfig
from karma_ray.runs.batches import ordered_batches
from karma_ray.runs.executor import Executor
from karma_ray.runs.stage_images import features_hash, load_visual
from karma_ray.runs.stages import STAGE_VERSION, Stage
from karma_ray.runs.training import run_training
from karma_ray.runs.worker import TrainJob
from karma_ray.training.config import EXECUTION, WARMED_UP_BY, TrainingConfig
from karma_ray.training.loop import Record
from karma_ray.training.optim import RateMultiplier, RateMultipliers
from karma_ray.training.step_state import StepState
from karma_ray.training.warmup_step import TokenBatch, WarmupStep

LOG = logging.getLogger(__name__)


def warmed_up(stage: Stage, items_hash: str, cache: str, executor: Executor) -> tuple[str, str]:
    """Return the folder of the warmed-up weights in `cache` and the folder of their log.

    The weights are trained if they do not exist yet; `stage` is that of joint training.
    """
    config, items_uri = stage.config, stage.items_uri
    folder = join(cache, f"warmup-{value_hash(warmup_key(config, items_hash, items_uri))}")
    with locked(folder):
        return _warm_up(replace(stage, config=warmup_config(config)), folder, executor), folder


def warmup_config(config: Config) -> Config:
    """Return the part of the configuration that the warm-up may read; the rest is at its default.

    The warm-up runs on exactly this configuration and is cached under it. The key therefore
    cannot miss a setting that the weights depend on, and recipes that differ elsewhere share the
    weights. Of the objective only the weight of the visual term is kept.
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
    """Return what warmed-up weights depend on: `warmup_config` without execution settings.

    Checkpoints and the visual features of the data at `items_uri` are named by their content
    hashes. In `config` the checkpoint `tiny` is already resolved.
    """
    fields = dict(flattened(to_dict(warmup_config(config))))
    kept = {n: value for n, value in fields.items() if n not in EXECUTION or n in WARMED_UP_BY}
    for name in ("model.item_encoder.checkpoint", "model.user_decoder.checkpoint"):
        kept[name] = checkpoint_hash(kept[name])
    if folder := sentence_folder(config.model.item_encoder.checkpoint):
        kept["model.item_encoder.checkpoint"] = content_hash(folder.root)
    kept["collate.visual_features"] = features_hash(config, items_uri)
    return {"version": STAGE_VERSION, "items": items_hash, **kept}


def warmup_job(stage: Stage, tokens: str, folder: str) -> TrainJob:
    """Return the job of stage 1 on the table at `tokens`; `stage` has `warmup_config`."""
    config, training = stage.config, stage.config.training
    return TrainJob(
        run=folder,
        stage="warmup",
        build=partial(build, stage),
        step=WarmupStep(config.objective.lambda_img),
        make_batches=partial(
            ordered_batches, tokens, config.seed, training.batch_size, partial(make_collate, stage)
        ),
        training=training,
        seed=config.seed,
        multiplier_of=RateMultipliers(training.new_module_lr, RateMultiplier()),
        probe=_warmup_probe,
        should_stop=Plateau(),
    )


@dataclass(frozen=True)
class TokenCollate:
    """(`item_tokens` rows, keys) -> TokenBatch of stage 1; the keys draw the image noise."""

    catalog: Catalog | None = None
    visual: VisualFeatures | None = None

    def __call__(self, rows: pa.Table, keys: np.ndarray) -> TokenBatch:
        """Collate rows; images are included if there are features."""
        lengths = list_sizes(rows.column("token_ids"))
        tokens = np.zeros((len(lengths), int(lengths.max())), np.int64)
        real = np.arange(tokens.shape[1]) < lengths[:, None]
        tokens[real] = flat_list(rows.column("token_ids")).to_numpy()
        images, found = None, None
        if self.catalog is not None:
            places = self.catalog.rows(rows.column("item_id").combine_chunks())
            found = torch.from_numpy(places)
        if self.visual is not None:
            values, mask = self.visual.gather(places)
            images = ImageTargets(
                torch.from_numpy(values), torch.from_numpy(mask), torch.from_numpy(hashed(keys))
            )
        return TokenBatch(torch.from_numpy(tokens), torch.from_numpy(lengths), images, found)


def make_collate(stage: Stage) -> TokenCollate:
    """Return the collate function of the warm-up; called on the worker."""
    catalog = stage.catalog()
    return TokenCollate(catalog, load_visual(stage.config, stage.items_uri, catalog))


def build(stage: Stage) -> KarmaModel:
    """Build the warm-up's model, in which `warmup.train` says what is trained."""
    model = stage.whole()
    stage.fit_to_items(model.interest)
    interest, train = model.interest, stage.config.warmup.train
    set_trained(interest.item_encoder.body, train == "all")
    set_trained(interest.user_decoder.body, train != "adapters_only")
    return model


@dataclass
class Plateau:
    """Stops the warm-up when the shuffled gap has not grown by 2 % in five reports.

    The gap, CE(shuffled e) - CE(e), says how much the decoder uses the item embedding
    (method 1.10).
    """

    patience: int = 5
    growth: float = 1.02
    _best: float = 0.0
    _waited: int = 0

    def __call__(self, record: Record) -> bool:
        """Whether the stage ends at this report."""
        gap = record["decode_gap"]
        if gap > self._best * self.growth:
            self._best, self._waited = gap, 0
        else:
            self._waited += 1
        return self._waited >= self.patience


def token_table(catalog: Catalog, tokens: np.ndarray, lengths: np.ndarray) -> pa.Table:
    """Return the `item_tokens` table."""
    parts = []
    for start in range(0, len(lengths), CHUNK):  # Arrow counts the numbers of a chunk in 32 bits
        some = lengths[start : start + CHUNK]
        real = np.arange(tokens.shape[1]) < some[:, None]
        ends = np.concatenate([[0], np.cumsum(some)]).astype(np.int32)
        values = tokens[start : start + CHUNK][real].astype(np.int32)
        parts.append(pa.ListArray.from_arrays(pa.array(ends), pa.array(values)))
    ids = pa.chunked_array(parts, pa.list_(pa.int32()))
    return pa.table({"item_id": catalog.table.column("item_id"), "token_ids": ids})


def _warm_up(stage: Stage, folder: str, executor: Executor) -> str:
    """Return the folder of stage 1's weights, training or resuming the stage if necessary."""
    job = warmup_job(stage, tokens := join(folder, "item_tokens"), folder)
    if exists(join(job.final, "summary.json")):
        return job.final
    LOG.info("warm-up: at most %d steps", stage.config.warmup.steps)
    # Always rewritten: an interrupted writer may have left an incomplete table.
    write_table(token_table(stage.catalog(), *stage.collator().catalog_tokens()), tokens)
    run_training(job, resume=True, distribute=executor.train)
    return job.final


def _warmup_probe(model: nn.Module, batch: TokenBatch, state: StepState) -> Record:
    assert isinstance(model, KarmaModel)
    with torch.no_grad():
        return {"decode_gap": WarmupStep().gap(model, batch)}
