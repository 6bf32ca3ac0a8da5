"""Forgetting in nats: what both trunks lose of the language they knew before training.

A trunk is the body of the item encoder or the user decoder, whole, as far as its checkpoint is
used. It reads texts that are not the run's items, before and after training, through the head of
its checkpoint (that of the user decoder may have been trained).
"""

from __future__ import annotations

import logging

import numpy as np
from torch import Tensor, nn

from karma_ray.artifacts import (
    exists,
    join,
    open_filesystem,
    read_json,
    read_table,
    value_hash,
    write_json,
)
from karma_ray.data.catalog import Catalog
from karma_ray.data.prompts import encode_texts
from karma_ray.data.schema import ITEMS, check_columns
from karma_ray.errors import InputError
from karma_ray.model.backbone import load_item_body, load_user_body
from karma_ray.model.backbones.checkpoints import load_lm_head
from karma_ray.model.config import ItemEncoderConfig, ModelConfig, UserDecoderConfig
from karma_ray.model.device import this_device
from karma_ray.model.karma import KarmaModel
from karma_ray.model.text_losses import next_token_loss
from karma_ray.node_cache import checkpoint_hash
from karma_ray.runs.stages import Stage, over_ids

LOG = logging.getLogger(__name__)
FIELD = "evaluation.general_texts"
TABLE = "other_items"
"""Table of a data folder that is read unless the configuration names a file."""
NUM_TEXTS = 128
"""Texts of the sample, the same for all runs; about 6,000 tokens."""
PREFIX = "forgetting/"


def general_texts(given: str, items_uri: str) -> list[str]:
    """Return the texts of `given`, or of the data folder's table; [] if there is none.

    Texts of the catalogue are left out. Raises InputError if `given` holds no others.
    """
    if not given and not exists(join(items_uri, TABLE)):
        return []
    known = set(Catalog.load(items_uri).texts())
    texts = [text for text in _texts(given or join(items_uri, TABLE)) if text not in known]
    if given and not texts:
        raise InputError(FIELD, given, "holds no text that is not an item's")
    return texts


def _texts(uri: str) -> list[str]:
    fs, path = open_filesystem(uri)
    if not fs.exists(path):
        raise InputError(FIELD, uri, "does not exist")
    if path.endswith(".txt"):
        with fs.open(path, "r", encoding="utf-8") as source:
            return [line.strip() for line in source if line.strip()]
    table = read_table(uri)
    if "title" in table.column_names:
        names = [name for name in table.column_names if name != "image"]
        return Catalog(check_columns(table.select(names), ITEMS, uri)).texts()
    if "text" not in table.column_names:
        raise InputError(FIELD, uri, "has neither a column text nor the columns of items")
    return [text for text in table.column("text").to_pylist() if text and text.strip()]


def forgetting(stage: Stage | None, cache: str) -> dict[str, float]:
    """Return `forgetting/encoder_before`, `encoder_after`, `decoder_before`, `decoder_after`.

    Nothing is measured without texts, for floors (without a stage) and baselines over item ids,
    and for a run that trains another run's model further, whose start is no checkpoint with a head.
    """
    if stage is None or over_ids(stage.config) or stage.tokenizer_folder is not None:
        return {}
    config = stage.config
    texts = general_texts(config.evaluation.general_texts, stage.items_uri)
    if not texts:
        return {}
    drawn = np.random.default_rng(0).permutation(len(texts))[:NUM_TEXTS]
    limit = config.collate.max_item_tokens
    sample = encode_texts(stage.tokenizer(), [texts[row] for row in drawn], limit, end=False)
    model = stage.build_trained()
    found: dict[str, float] = {}
    for name in _trunks(config.model):
        part = config.model.item_encoder if name == "encoder" else config.model.user_decoder
        try:
            head = load_lm_head(part.checkpoint)
        except InputError as error:  # such as an encoder of sentences, without a head
            LOG.warning("forgetting of the %s is not measured: %s", name, error)
            continue
        found[f"{PREFIX}{name}_before"] = _before(part, head, sample, cache)
        found[f"{PREFIX}{name}_after"] = _loss(*_end(model, name, head), sample)
    return found


def _trunks(model: ModelConfig) -> list[str]:
    """Return the trunks that read text alone."""
    return ["decoder"] if model.item_encoder.modality == "multimodal" else ["encoder", "decoder"]


def _end(model: KarmaModel, name: str, head: Tensor | None) -> tuple[nn.Module, Tensor | None]:
    if name == "encoder":
        return model.interest.item_encoder.body, head
    body = model.interest.user_decoder.body
    return body, None if head is None else model.head_of(body)


Sample = tuple[np.ndarray, np.ndarray]
"""Tokens [N, L] and lengths [N]."""


def _before(
    part: ItemEncoderConfig | UserDecoderConfig, head: Tensor | None, sample: Sample, cache: str
) -> float:
    """Return the loss of a start, which trunks and runs with the same layers share.

    Its body is loaded only if the cache lacks it.
    """
    key = [checkpoint_hash(part.checkpoint), part.layers, [values.tolist() for values in sample]]
    path = join(cache, f"forgetting-{value_hash(key)}.json")
    if not exists(path):
        if isinstance(part, ItemEncoderConfig):
            body = load_item_body(part)
        else:
            body = load_user_body(part)
        write_json({"loss": _loss(body, head, sample)}, path)
    return float(read_json(path)["loss"])


def _loss(body: nn.Module, head: Tensor | None, sample: Sample) -> float:
    device = this_device()
    there = None if head is None else head.to(device)
    return next_token_loss(body.to(device).eval(), there, *sample)
