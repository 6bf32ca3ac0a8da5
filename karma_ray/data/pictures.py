"""Decoding of item images into square pixels, and encoding into the `visual_features` table.

The column `image` holds bytes, or text that names files (data/picture_files.py). An image that
cannot be read stops nothing; it is quarantined with its file, row and reason.

Legend: n images, S pixels of a side, N_v tokens of an image, d_v width of a token.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError

from karma_ray.artifacts import join, open_filesystem, table_files
from karma_ray.data.catalog import usable_items
from karma_ray.data.fragments import Fragment, list_fragments, read_fragment
from karma_ray.data.picture_files import BrokenImage, beside, fetch
from karma_ray.data.schema import ITEMS, check_columns, is_text
from karma_ray.data.visual import Moments, feature_rows
from karma_ray.data.work_folder import WorkFolder
from karma_ray.errors import InputError

READ_ROWS = 256
"""Rows read at once, which bounds the memory of images before they are scaled down."""
MAX_PIXELS = 50_000_000
"""Largest number of pixels; a larger image is a mistake or an attack on the node's memory."""
UNUSED, USABLE, FITTED = 0, 1, 2
"""Kinds of rows in items/: not an item, an item, an item that statistics are fitted on."""


class ImageEncoder(Protocol):
    """A frozen encoder: pixels [n, S, S, 3] uint8 -> features [n, N_v, d_v] float32."""

    @property
    def side(self) -> int:
        """Pixels per side, S."""

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Encode a batch of images."""


def decode(data: bytes | BrokenImage, side: int) -> np.ndarray:
    """Decode bytes of any format of Pillow into pixels [S, S, 3] uint8; raises BrokenImage.

    A BrokenImage in place of bytes is raised. The whole picture is kept and squeezed into the
    square. Transparent parts become white.
    """
    try:
        if isinstance(data, BrokenImage):
            raise data
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image: Image.Image = Image.open(io.BytesIO(data))
            if image.width * image.height > MAX_PIXELS:
                raise BrokenImage(f"{image.width} x {image.height} pixels are too many")
            image.draft("RGB", (2 * side, 2 * side))  # JPEG can be decoded at a smaller size
            image.load()
            if image.has_transparency_data:
                image = image.convert("RGBA")
                ground = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(ground, image)
            square = image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
            return np.asarray(square)
    except BrokenImage:
        raise
    except UnidentifiedImageError:  # its message contains a memory address
        raise BrokenImage("in no known format") from None
    except Exception as error:  # Pillow's decoders raise many kinds of errors
        raise BrokenImage(f"{type(error).__name__}: {error}") from None


def has_images(data_uri: str) -> bool:
    """Whether any item of a data folder has an image, readable or not."""
    folder = join(data_uri, "items")
    files, (fs, _) = table_files(folder), open_filesystem(folder)
    items = ds.dataset(files, filesystem=fs, format="parquet")
    if "image" not in items.schema.names:
        return False
    return bool(items.head(1, columns=["image"], filter=ds.field("image").is_valid()).num_rows)


def source_rows(items_uri: str, fitted_ids: pa.Array | None) -> np.ndarray:
    """Return the kind [rows] uint8 of each row of items/, by the catalogue's rules.

    With `fitted_ids` statistics are fitted on those items, otherwise on all. Raises InputError
    on wrong columns, and when no file has a column `image`.
    """
    fragments, schemas = list_fragments(items_uri)
    for path, schema in schemas:
        check_columns(schema.empty_table(), ITEMS, path)
    if all("image" not in schema.names for _, schema in schemas):
        raise InputError("items", items_uri, "have no column `image`")
    tables = [
        read_fragment(items_uri, f.path, f.row_group, ["item_id", "title"]) for f in fragments
    ]
    table = pa.concat_tables(
        check_columns(part, ITEMS, items_uri).select(["item_id", "title"]) for part in tables
    )
    kinds = usable_items(table).astype(np.uint8)
    if fitted_ids is not None:
        fitted = pc.is_in(table.column("item_id"), value_set=fitted_ids)
        kinds[kinds.astype(bool) & fitted.to_numpy(zero_copy_only=False)] = FITTED
    else:
        kinds[kinds == USABLE] = FITTED
    return kinds


Row = tuple[int, str, bytes | BrokenImage | None]
"""(row number in the fragment, item id, image or why its file cannot be read)."""


def read_images(
    fragment: Fragment, folder: str, wanted: np.ndarray | None = None
) -> Iterator[list[Row]]:
    """Yield the rows of a fragment, READ_ROWS at a time.

    Where `image` names files, those of the rows `wanted` [fragment rows] bool alone are fetched,
    and the other rows have no image.
    """
    fs, _ = open_filesystem(folder)
    start = 0
    with fs.open(fragment.path, "rb") as source:
        file = pq.ParquetFile(source)
        columns = [name for name in ("item_id", "image") if name in file.schema_arrow.names]
        for batch in file.iter_batches(READ_ROWS, row_groups=[fragment.row_group], columns=columns):
            rows = range(start, start + len(batch))
            ids = batch.column("item_id").cast(pa.string()).to_pylist()
            images: list[bytes | BrokenImage | None] = [None] * len(batch)
            if "image" in columns and is_text(batch.column("image").type):
                names = batch.column("image").cast(pa.string()).to_pylist()
                if wanted is not None:
                    names = [n if wanted[row] else None for n, row in zip(names, rows, strict=True)]
                images = fetch(names, beside(folder))
            elif "image" in columns:
                images = batch.column("image").cast(pa.binary()).to_pylist()
            yield list(zip(rows, ids, images, strict=True))
            start += len(batch)


def sample_images(
    items_uri: str, kinds: np.ndarray, side: int, count: int, seed: int, max_fragments: int = 64
) -> np.ndarray:
    """Return at most `count` readable pictures [n, S, S, 3] of FITTED items, drawn with `seed`.

    They come from at most `max_fragments` row groups, equally many from each, so that a large
    catalogue is not read completely.
    """
    generator = np.random.default_rng(seed)
    fragments, _ = list_fragments(items_uri)
    chosen = [fragments[place] for place in generator.permutation(len(fragments))[:max_fragments]]
    pictures: list[np.ndarray] = []
    for done, fragment in enumerate(chosen):
        rows = kinds[fragment.order : fragment.order + fragment.num_rows] == FITTED
        wanted = -(-(count - len(pictures)) // (len(chosen) - done))
        drawn = np.zeros(len(rows), bool)
        drawn[generator.permutation(np.flatnonzero(rows))[:wanted]] = True
        for row, _, data in chain.from_iterable(read_images(fragment, items_uri, drawn)):
            if not drawn[row] or not data:
                continue
            # A broken image is quarantined and counted when its part is encoded.
            with suppress(BrokenImage):
                pictures.append(decode(data, side))
    if not pictures:
        raise InputError("items", items_uri, "hold no readable image to fit on")
    return np.stack(pictures)


@dataclass(frozen=True)
class Part:
    """The result of encoding one row group of items/."""

    order: int
    """Number of its first row in items/, which names its files."""
    with_image: int
    without_image: int
    broken: list[dict[str, Any]]
    """Quarantined images: item_id, source_file, row, reason."""
    shape: list[int]
    """(N_v, d_v); empty when no item has an image."""
    fitted: int
    """Number of tokens of FITTED items in the sums."""
    total: list[float]
    squares: list[float]

    @property
    def num_items(self) -> int:
        """Number of items, with or without a readable picture."""
        return self.with_image + self.without_image + len(self.broken)

    @property
    def moments(self) -> Moments:
        """The sums over FITTED items."""
        return Moments(self.fitted, np.array(self.total), np.array(self.squares))


def part_name(fragment: Fragment) -> str:
    """Return the name of a fragment's part, the same in every attempt."""
    return f"part-{fragment.order:012d}"


def encode_fragment(
    fragment: Fragment, items_uri: str, kinds: np.ndarray, encoder: ImageEncoder,
    work: WorkFolder,
) -> Part:  # fmt: skip
    """Encode the images of one row group and write its part to `work`.

    `kinds` [fragment rows] come from `source_rows`. Statistics cover FITTED items.
    """
    tables: list[pa.Table] = []
    broken: list[dict[str, Any]] = []
    sums = Moments(0, np.zeros(1), np.zeros(1))
    without, shape = 0, []
    for rows in read_images(fragment, items_uri, kinds != UNUSED):
        items = [row for row in rows if kinds[row[0]] != UNUSED]
        pictured = [row for row in items if row[2]]
        without += len(items) - len(pictured)
        kept, pictures, refused = _decoded(pictured, encoder.side, fragment)
        broken += refused
        if not kept:
            continue
        values = encoder(np.stack(pictures))
        tables.append(feature_rows([item_id for _, item_id, _ in kept], values))
        shape = list(values.shape[1:])
        sums += Moments.of(values[kinds[[row for row, _, _ in kept]] == FITTED])
    part = Part(
        fragment.order, sum(map(len, tables)), without, broken, shape,
        sums.count, sums.total.tolist(), sums.squares.tolist(),
    )  # fmt: skip
    table = pa.concat_tables(tables) if tables else None
    work.write(part_name(fragment), table, asdict(part))
    return part


def _decoded(
    rows: list[Row], side: int, fragment: Fragment
) -> tuple[list[Row], list[np.ndarray], list[dict[str, Any]]]:
    """Return rows with a readable image, their pixels, and records for the quarantine."""
    kept, pictures, broken = [], [], []
    for row in rows:
        number, item_id, data = row
        try:
            pictures.append(decode(data or b"", side))
            kept.append(row)
        except BrokenImage as error:
            place = {"source_file": fragment.path, "row": fragment.first_row + number}
            broken.append({"item_id": item_id, **place, "reason": str(error)})
    return kept, pictures, broken
