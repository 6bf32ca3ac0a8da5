"""What the stages of a run with a visual term need: where features lie, and of what shape."""

from __future__ import annotations

import json
import shlex

from karma_ray.artifacts import absolute, exists, join, open_filesystem, read_manifest
from karma_ray.config import Config
from karma_ray.data.catalog import Catalog
from karma_ray.data.visual import KIND, VisualFeatures, features_uri
from karma_ray.errors import InputError
from karma_ray.model.backbone import token_embeddings
from karma_ray.model.imagery import Imagery, ImageShape
from karma_ray.model.interest import InterestModel


def visual_uri(config: Config, items_uri: str) -> str:
    """The run's visual features; raises InputError, naming the command, when there are none."""
    named = config.collate.visual_features
    uri = absolute(named) if named else features_uri(items_uri)
    if not exists(join(uri, "manifest.json")):
        message = f"does not exist; make it by: python jobs/features.py {shlex.quote(items_uri)}"
        raise InputError("collate.visual_features", uri, message)
    return uri


def load_visual(config: Config, items_uri: str, catalog: Catalog) -> VisualFeatures | None:
    """The features, of a run that reconstructs them."""
    if not config.objective.built.image:
        return None
    return VisualFeatures.load(visual_uri(config, items_uri), catalog)


def build_imagery(
    config: Config, items_uri: str, interest: InterestModel, trained: str | None
) -> Imagery | None:
    """Image queries and head, of a run that asks for them.

    Of finished weights (`trained`) the shape is theirs: features need not be there any more.
    """
    if not config.objective.built.image:
        return None
    if trained is not None:
        shape = _saved_shape(trained)
    else:
        facts = read_manifest(visual_uri(config, items_uri), KIND)
        shape = ImageShape(int(facts["num_tokens"]), int(facts["width"]))
    rows = token_embeddings(interest.user_decoder.body)
    return Imagery(config.model.imagery, shape, rows, config.seed)


def features_hash(config: Config, items_uri: str) -> str:
    """Content of the features of a run with a visual term; "" of another.

    Raises InputError when they are not there.
    """
    if not config.objective.built.image:
        return ""
    return str(read_manifest(visual_uri(config, items_uri), KIND)["content_hash"])


def _saved_shape(folder: str) -> ImageShape:
    """From the header of saved weights; raises InputError when they hold no image queries."""
    fs, path = open_filesystem(folder)
    with fs.open(f"{path}/model.safetensors", "rb") as source:
        header = json.loads(source.read(int.from_bytes(source.read(8), "little")))
    try:
        tokens = header["imagery.queries"]["shape"][0]
        return ImageShape(tokens, header["imagery.head.output.weight"]["shape"][0])
    except KeyError:
        raise InputError("objective.lambda_img", folder, "has no image queries in it") from None
