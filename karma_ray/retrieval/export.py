"""The bundle: the files needed for serving (method 1.11).

A bundle stores `model.interest`: two Hugging Face bodies, the adapters around them, the tokenizer
and the configuration. Modules that exist only in training are outside `model.interest`, so none
can be included by mistake. Low-rank adapters are merged into the weights of the bodies, so a body
is an ordinary folder; scores then agree up to rounding (bitwise if there are no such adapters).
A baseline over item ids is stored as its weights, without bodies.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn

from karma_ray import __version__
from karma_ray.artifacts import (
    join,
    open_filesystem,
    read_json,
    read_manifest,
    write_json,
    write_manifest,
)
from karma_ray.baselines.sequential import IdRecommender
from karma_ray.data.collate import CollateConfig
from karma_ray.data.prompts import Tokenizer
from karma_ray.errors import InputError, KarmaRayError
from karma_ray.model.backbone import load_body, quantised_from, save_body, skeleton
from karma_ray.model.backbones.tokenizer import load_tokenizer, save_tokenizer
from karma_ray.model.config import (
    GeneratorConfig,
    ItemEncoderConfig,
    ModelConfig,
    ScoreConfig,
    TinyBackboneConfig,
    UserDecoderConfig,
)
from karma_ray.model.denoiser import DenoiserConfig
from karma_ray.model.interest import InterestModel
from karma_ray.model.item_encoder import ItemEncoder
from karma_ray.model.lora import merged
from karma_ray.model.recall import RecallModel
from karma_ray.model.user_decoder import Prefix, UserDecoder
from karma_ray.node_cache import local_copy, upload
from karma_ray.retrieval.finite import check_weights

ITEM_ENCODER, USER_DECODER, TOKENIZER = "item_encoder", "user_decoder", "tokenizer"
ADAPTERS, WEIGHTS = "adapters.safetensors", "model.safetensors"
_BODIES = (f"{ITEM_ENCODER}.body.", f"{USER_DECODER}.body.")


@dataclass(frozen=True)
class Bundle:
    """A loaded bundle; the model is in evaluation mode."""

    interest: RecallModel
    tokenizer: Tokenizer
    collate_config: CollateConfig
    content_hash: str
    manifest: Mapping[str, Any]


def save_bundle(
    interest: InterestModel | IdRecommender,
    tokenizer: Tokenizer,
    collate_config: CollateConfig,
    uri: str,
    facts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write a bundle, replacing the content of `uri`; returns its manifest.

    `facts` (JSON-able: recipe, data, seed, ...) go into the manifest beside the content hash, and
    so does what was quantised of the checkpoints.
    """
    fs, path = open_filesystem(uri)
    if fs.exists(path):
        fs.rm(path, recursive=True)
    with written_folder(uri) as folder:
        if isinstance(interest, IdRecommender):
            save_model(interest, str(folder / WEIGHTS))
            parts = interest.facts()
        else:
            parts = _save_parts(interest, folder)
        save_tokenizer(tokenizer, str(folder / TOKENIZER))
        write_json(_config(parts, collate_config), str(folder / "config.json"))
    known = {**dict(facts or {}), **_quantised(interest)}
    return write_manifest(uri, "bundle", width=interest.width, **known)


def load_bundle(uri: str, *, encodes_items: bool = True, reads_requests: bool = True) -> Bundle:
    """Load a bundle.

    A process that answers requests from stored item embeddings encodes no items: unless the model
    reads queries through its item encoder, that is most of the weights, and they are not read. One
    that encodes items reads no requests, and does without the user decoder.
    Raises InputError when it is missing or not a bundle, and KarmaRayError when its files do not
    fit together or a weight is not finite.
    """
    manifest = read_manifest(uri, "bundle")
    folder = Path(local_copy(uri))
    config = read_json(str(folder / "config.json"))
    tokenizer = load_tokenizer(str(folder / TOKENIZER))
    interest: RecallModel
    if "sizes" in config["model"]:
        interest = IdRecommender.of_facts(config["model"])
        load_model(interest, str(folder / WEIGHTS))
    else:
        try:
            model = _model_config(config["model"])
        except TypeError as error:
            message = f"was written by another version of karma_ray: {error}"
            raise InputError("bundle", uri, message) from None
        needed = encodes_items or model.user_decoder.query_mode == "encoder"
        interest = _load_parts(model, folder, tokenizer, uri, needed, reads_requests)
    check_weights(interest, uri)
    return Bundle(
        interest=interest.eval(),
        tokenizer=tokenizer,
        collate_config=CollateConfig(**config["collate"]),
        content_hash=manifest["content_hash"],
        manifest=manifest,
    )


def item_encoder_config(uri: str) -> ItemEncoderConfig | None:
    """Return the configuration of a bundle's item encoder; None for a model over item ids."""
    model = read_json(join(uri, "config.json"))["model"]
    return None if "sizes" in model else ItemEncoderConfig(**model["item_encoder"])


def _quantised(interest: InterestModel | IdRecommender) -> dict[str, Any]:
    """Return `{"quantised": {part: origin}}` of bodies that came from quantised files."""
    if isinstance(interest, IdRecommender):
        return {}
    parts = {ITEM_ENCODER: interest.item_encoder.body, USER_DECODER: interest.user_decoder.body}
    found = {name: quantised_from(body) for name, body in parts.items()}
    found = {name: origin for name, origin in found.items() if origin}
    return {"quantised": found} if found else {}


def _save_parts(interest: InterestModel, folder: Path) -> dict[str, Any]:
    """Save bodies and adapters; returns their configuration."""
    save_body(merged(interest.item_encoder.body), str(folder / ITEM_ENCODER))
    save_body(merged(interest.user_decoder.body), str(folder / USER_DECODER))
    save_file(_adapters(interest), str(folder / ADAPTERS))
    return _parts(interest.config)


def _load_parts(
    model: ModelConfig, folder: Path, tokenizer: Tokenizer, uri: str, with_items: bool,
    with_users: bool,
) -> InterestModel:  # fmt: skip
    with_vision = model.item_encoder.modality == "multimodal"
    with_items = with_items or with_vision
    items, users = str(folder / ITEM_ENCODER), str(folder / USER_DECODER)
    item_body = (
        load_body(items, "bundle", with_vision=with_vision) if with_items else skeleton(items)
    )
    user_body = load_body(users) if with_users else skeleton(users)
    interest = InterestModel(model, item_body, user_body, tokenizer)
    if not with_users:
        interest.user_decoder = cast(UserDecoder, NoUserDecoder(user_body))
    adapters = load_file(str(folder / ADAPTERS))
    if not with_users:
        adapters = {n: v for n, v in adapters.items() if not n.startswith(f"{USER_DECODER}.")}
    missing, unexpected = interest.load_state_dict(adapters, strict=False)
    missing = [name for name in missing if not name.startswith(_BODIES)]
    if missing or unexpected:
        raise KarmaRayError(
            f"{uri}: {ADAPTERS} lacks {missing} and holds {unexpected} that the model does not have"
        )
    if not with_items:
        interest.item_encoder = cast(ItemEncoder, NoItemEncoder())
    return interest


class NoItemEncoder(nn.Module):
    """Stands for the item encoder of a model that was loaded without it."""

    def forward(self, *_: Tensor) -> Tensor:
        """Raise KarmaRayError."""
        raise KarmaRayError("this model was loaded without its item encoder, to answer requests")


class NoUserDecoder(nn.Module):
    """Stands for the user decoder of a model that was loaded without it, and knows its width."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = SimpleNamespace(config=body.config)

    def prefix(self, *_: Any) -> Prefix:
        """Raise KarmaRayError."""
        raise KarmaRayError("this model was loaded without its user decoder, to encode items")


def _adapters(interest: InterestModel) -> dict[str, Tensor]:
    """Return all tensors of the model outside the two bodies."""
    return {
        name: value.detach().cpu().contiguous()
        for name, value in interest.state_dict().items()
        if not name.startswith(_BODIES)
    }


def _parts(model: ModelConfig) -> dict[str, Any]:
    return {
        name: dataclasses.asdict(part)
        for name, part in (
            ("item_encoder", dataclasses.replace(model.item_encoder, checkpoint=ITEM_ENCODER)),
            ("user_decoder", dataclasses.replace(model.user_decoder, checkpoint=USER_DECODER)),
            ("score", model.score),
            ("tiny", model.tiny),
            ("generator", model.generator),
        )
        if name != "generator" or model.generator.kind != "none"
    }


def _config(parts: Mapping[str, Any], collate: CollateConfig) -> dict[str, Any]:
    packages = {name: version(name) for name in ("torch", "transformers", "tokenizers")}
    return {
        "model": parts,
        # Requests need no visual features, and their path is private to the training.
        "collate": dataclasses.asdict(dataclasses.replace(collate, visual_features="")),
        "versions": {"karma_ray": __version__, **packages},
    }


def _model_config(parts: Mapping[str, Any]) -> ModelConfig:
    return ModelConfig(
        tiny=TinyBackboneConfig(**parts["tiny"]),
        item_encoder=ItemEncoderConfig(**parts["item_encoder"]),
        user_decoder=UserDecoderConfig(**parts["user_decoder"]),
        score=ScoreConfig(**parts["score"]),
        generator=_generator(**parts.get("generator", {"denoiser": {}})),
    )


def _generator(denoiser: Mapping[str, Any], **fields: Any) -> GeneratorConfig:
    return GeneratorConfig(denoiser=DenoiserConfig(**denoiser), **fields)


@contextmanager
def written_folder(uri: str) -> Iterator[Path]:
    """Yield a local folder to write into, which is uploaded if `uri` is not local.

    transformers and safetensors write local files only.
    """
    if "://" not in uri:
        Path(uri).mkdir(parents=True, exist_ok=True)
        yield Path(uri)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
        upload(Path(folder), uri)
