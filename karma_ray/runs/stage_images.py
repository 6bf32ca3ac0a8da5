"""Visual features for the stages of a run with a visual term: their location and their shape."""

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
    """Return the folder of the run's visual features.

    Raises InputError, which names the command that makes them, when there are none.
    """
    named = config.collate.visual_features
    uri = absolute(named) if named else features_uri(items_uri)
    if not exists(join(uri, "manifest.json")):
        message = f"does not exist; make it with: python jobs/features.py {shlex.quote(items_uri)}"
        raise InputError("collate.visual_features", uri, message)
    return uri


def load_visual(config: Config, items_uri: str, catalog: Catalog) -> VisualFeatures | None:
    """Load the features, if the run reconstructs them."""
    if not config.objective.built.image:
        return None
    return VisualFeatures.load(visual_uri(config, items_uri), catalog)


def build_imagery(
    config: Config, items_uri: str, interest: InterestModel, trained: str | None
) -> Imagery | None:
    """Build the image queries and the image head, if the run has a visual term.

    With finished weights (`trained`) the shape is read from them, since the features may no
    longer exist.
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
    """Return the content hash of the features of a run with a visual term, otherwise "".

    Raises InputError when the features do not exist.
    """
    if not config.objective.built.image:
        return ""
    return str(read_manifest(visual_uri(config, items_uri), KIND)["content_hash"])


def _saved_shape(folder: str) -> ImageShape:
    """Read the shape from the header of saved weights; raises InputError without image queries."""
    fs, path = open_filesystem(folder)
    with fs.open(f"{path}/model.safetensors", "rb") as source:
        header = json.loads(source.read(int.from_bytes(source.read(8), "little")))
    try:
        tokens = header["imagery.queries"]["shape"][0]
        return ImageShape(tokens, header["imagery.head.output.weight"]["shape"][0])
    except KeyError:
        raise InputError("objective.lambda_img", folder, "has no image queries") from None
