"""Frozen visual features of item images, computed in this process or by a pool on Ray Data.

Only references to row groups are sent to the encoders. An encoder reads its images itself, writes
their features to the work folder and returns counts and sums. Parts that an interrupted job has
finished are reused, and DATA/visual_features is replaced only by a complete folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import reduce
from operator import add
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from karma_ray.artifacts import (
    absolute,
    exists,
    join,
    locked,
    open_filesystem,
    read_manifest,
    read_table,
    value_hash,
    write_bytes,
)
from karma_ray.data.fragments import Fragment, list_fragments
from karma_ray.data.patches import SAMPLE_IMAGES, PatchPca, side_of
from karma_ray.data.pictures import (
    UNUSED,
    ImageEncoder,
    Part,
    encode_fragment,
    part_name,
    sample_images,
    source_rows,
)
from karma_ray.data.prepared import require_data
from karma_ray.data.progress import told
from karma_ray.data.visual import KIND, features_uri, grid_of, write_visual_manifest
from karma_ray.data.work_folder import WorkFolder
from karma_ray.errors import InputError
from karma_ray.model.backbones.vision_encoder import load_vision_encoder
from karma_ray.model.device import this_device
from karma_ray.node_cache import known_hash, local_copy

LOG = logging.getLogger(__name__)

PATCH_PCA = "patch_pca"
DEFAULT_WIDTH = 48
VERSION = 1
"""Raised when the code computes other features from the same images; old ones are then redone."""
QUARANTINE_FILE = "quarantine.jsonl"


EncodeParts = Callable[
    ["Fitted | Loaded", list[Fragment], str, np.ndarray, WorkFolder], Iterator[Part]
]
"""(encoder factory, row groups, items/, kind of each row, work folder) -> the finished parts."""


@dataclass(frozen=True)
class FeaturesConfig:
    """How the features are computed."""

    encoder: str = PATCH_PCA
    """`patch_pca`, a Hugging Face vision encoder's folder, or a hub name."""
    target: str = "grid:16"
    """Tokens of an image: `pooled:1`, `grid:16` (4 x 4) or `grid:64` (8 x 8)."""
    width: int | None = None
    """Components of patch_pca (48 when None); other encoders have a fixed width."""
    seed: int = 0
    """Draws the sample that patch_pca is fitted on."""

    def check(self) -> None:
        """Raise InputError on a wrong value."""
        grid_of(self.target)
        if self.encoder != PATCH_PCA and self.width is not None:
            raise InputError("--width", self.width, f"is for {PATCH_PCA} only")
        if self.width is not None and self.width < 1:
            raise InputError("--width", self.width, "must be at least 1")


def make_features(
    data: str, config: FeaturesConfig, out: str | None = None, encode: EncodeParts | None = None
) -> dict[str, Any]:
    """Write the visual features of `data` to `out` (default DATA/visual_features).

    Features that were already made from the same images with the same settings are kept.
    patch_pca, mean and deviation are fitted on the items of the training sequences if the data
    are prepared, otherwise on all items. Images are encoded in this process unless `encode` is
    given. Returns the manifest. Raises InputError on wrong settings, without items, and if no
    image can be read.
    """
    config.check()
    require_data(data)
    items, target = absolute(join(data, "items")), absolute(out or features_uri(data))
    trained = _trained_items(data)
    kinds = source_rows(items, trained)
    items_hash = known_hash(items)
    key = value_hash([VERSION, items_hash, asdict(config), _identity(config.encoder),
                      hashlib.sha256(kinds.tobytes()).hexdigest()])  # fmt: skip
    with locked(target):
        if exists(join(target, "manifest.json")):
            manifest = read_manifest(target)
            if manifest.get("key") == key:
                LOG.info("%s already exists", target)
                return manifest
            if manifest["kind"] != KIND:
                raise InputError("--out", target, f"holds {manifest['kind']} and is not replaced")
        work = WorkFolder(target)
        work.open(key)
        make, facts = _encoder(config, items, kinds, work.table)
        parts = _encode_all(make, items, kinds, work, encode or encode_here)
        facts |= {"fitted_on": "all items" if trained is None else "training items", "key": key}
        manifest = _finish(work.table, parts, items_hash, {**asdict(config), **facts})
        work.complete()
    return manifest


def _encoder(
    config: FeaturesConfig, items: str, kinds: np.ndarray, table: str
) -> tuple[Fitted | Loaded, dict[str, Any]]:
    """Return a factory of the encoder, called in the process that encodes, and facts about it."""
    if config.encoder != PATCH_PCA:
        checkpoint = absolute(config.encoder) if exists(config.encoder) else config.encoder
        return Loaded(checkpoint, grid_of(config.target)), {}
    LOG.info("features: fitting %s on up to %d images", PATCH_PCA, SAMPLE_IMAGES)
    sample = sample_images(items, kinds, side_of(config.target), SAMPLE_IMAGES, config.seed)
    pca = PatchPca.fit(sample, config.target, config.width or DEFAULT_WIDTH, config.seed)
    pca.save(join(table, "patch_pca.safetensors"))
    return Fitted(pca), {
        "explained_variance": round(pca.explained, 6),
        "fitted_images": len(sample),
    }


@dataclass(frozen=True)
class Fitted:
    """Returns patch_pca itself, which is small enough to be sent to workers."""

    pca: PatchPca
    uses_gpu: ClassVar[bool] = False

    def __call__(self) -> ImageEncoder:
        """The encoder."""
        return self.pca


@dataclass(frozen=True)
class Loaded:
    """Loads a Hugging Face encoder in the process that calls it."""

    checkpoint: str
    grid: int
    uses_gpu: ClassVar[bool] = True

    def __call__(self) -> ImageEncoder:
        """Return the encoder, on this process's GPU if it has one."""
        device = this_device()
        return load_vision_encoder(local_copy(self.checkpoint), self.grid, device)


def _encode_all(
    make: Fitted | Loaded, items: str, kinds: np.ndarray, work: WorkFolder, encode: EncodeParts
) -> list[Part]:
    """Return the parts of all row groups, in the order of items/."""
    fragments = [fragment for fragment in list_fragments(items)[0] if fragment.num_rows]
    found = work.finished()
    missing = [fragment for fragment in fragments if part_name(fragment) not in found]
    parts = [Part(**facts) for facts in found.values()]
    if parts:
        LOG.info("features: %d of %d parts already exist", len(parts), len(fragments))
    if missing:
        total = sum(int((rows_of(fragment, kinds) != UNUSED).sum()) for fragment in missing)
        made = encode(make, missing, items, kinds, work)
        parts += told(made, lambda part: part.num_items, total, "features")
    return sorted(parts, key=lambda part: part.order)


def encode_here(
    make: Fitted | Loaded, fragments: list[Fragment], items: str, kinds: np.ndarray,
    work: WorkFolder,
) -> Iterator[Part]:  # fmt: skip
    """Encode one row group after another in this process."""
    encoder = make()
    for fragment in fragments:
        yield encode_fragment(fragment, items, rows_of(fragment, kinds), encoder, work)


def _finish(
    table: str, parts: list[Part], items_hash: str, facts: dict[str, Any]
) -> dict[str, Any]:
    """Write the quarantined images and the manifest."""
    encoded = [part for part in parts if part.shape]
    broken = [record for part in parts for record in part.broken]
    counts = {
        "with_image": sum(part.with_image for part in parts),
        "without_image": sum(part.without_image for part in parts),
        "broken_image": len(broken),
    }
    if not encoded:
        first = f", for example {broken[0]['reason']}" if broken else ""
        raise InputError("items", counts, f"hold no readable image{first}")
    if broken:
        lines = "".join(f"{json.dumps(record)}\n" for record in broken)
        write_bytes(lines.encode(), join(table, QUARANTINE_FILE))
    facts |= {"num_items": sum(counts.values()), **counts}
    moments = reduce(add, (part.moments for part in encoded))
    return write_visual_manifest(table, items_hash, encoded[0].shape, moments, **facts)


def rows_of(fragment: Fragment, kinds: np.ndarray) -> np.ndarray:
    return kinds[fragment.order : fragment.order + fragment.num_rows]


def _trained_items(data: str) -> pa.Array | None:
    """Return the ids of the items in training sequences, or None if the data are not prepared."""
    if not exists(join(data, "prepared.json")):
        return None
    column = read_table(join(data, "sequences"), ["item_ids"]).column("item_ids")
    ids = pc.unique(pc.list_flatten(column))
    return ids if len(ids) else None


def _identity(encoder: str) -> Any:
    """Identify an encoder: by its name, or by the names and sizes of the files in its folder."""
    if encoder == PATCH_PCA or not exists(encoder):
        return encoder
    fs, root = open_filesystem(encoder)
    found = fs.find(root, detail=True)
    return [(name[len(root) :], found[name]["size"]) for name in sorted(found)]
