"""The table `item_codes`: one row per item with its codes, made from embeddings part by part.

Legend: I items, L levels.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from karma_ray.artifacts import (
    absolute,
    exists,
    join,
    locked,
    move,
    read_manifest,
    read_table,
    remove,
    write_manifest,
)
from karma_ray.codes.codebooks import Codebooks
from karma_ray.codes.config import CodesConfig
from karma_ray.codes.quality import Tally, coded, quality
from karma_ray.data.progress import told
from karma_ray.data.vectors import mapped_vectors
from karma_ray.data.work_folder import Part, WorkFolder
from karma_ray.errors import InputError, SkewError

if TYPE_CHECKING:
    from numpy.typing import NDArray

LOG = logging.getLogger(__name__)
MANIFEST_KIND = "item_codes"
VERSION = 1
"""Raised when the code gives other codes to the same embeddings: parts are not used again."""
PART_ITEMS = 262_144
"""Items of a part."""


@dataclass(frozen=True)
class Coding:
    """What workers have to know; sent to them as it stands."""

    embeddings: str
    codebooks: str
    work: WorkFolder


AssignParts = Callable[[Coding, list[Part]], Iterable[dict[str, Any]]]
"""(what workers have to know, parts) -> the facts of each part, which is then finished."""


class PartCoder:
    """Writes parts of a table of codes; vectors are mapped into memory, so a node has them once."""

    def __init__(self, of: Coding) -> None:
        self.of, self.books = of, Codebooks.load(of.codebooks)
        self.vectors = mapped_vectors(of.embeddings)
        self.item_ids = read_table(of.embeddings, ["item_id"]).column("item_id")

    def __call__(self, part: Part) -> dict[str, Any]:
        """Write a part and return its facts."""
        codes, tally = coded(self.books, self.vectors[part.first : part.end])
        item_ids = self.item_ids.slice(part.first, part.end - part.first)
        self.of.work.write(part.name, code_rows(item_ids, codes), asdict(tally))
        return asdict(tally)


def assign_here(of: Coding, parts: list[Part]) -> Iterator[dict[str, Any]]:
    """Assign one part after another in this process."""
    yield from map(PartCoder(of), parts)


def code_catalog(
    embeddings: str, out: str, config: CodesConfig, *, codebooks: str | None = None,
    assign: AssignParts = assign_here, part_items: int = PART_ITEMS,
) -> dict[str, Any]:  # fmt: skip
    """Give codes to all items of a folder of embeddings and write `out`; returns its manifest.

    Codebooks are fitted, unless the folder `codebooks` has them; `config` is not asked then. What
    an interrupted call has finished is used again, and `out` is replaced when all is there.
    Raises InputError on missing or empty embeddings, and SkewError on codebooks of another bundle.
    """
    embeddings, out = absolute(embeddings), absolute(out)
    source = read_manifest(embeddings, "item_embeddings")
    if not source["num_items"]:
        raise InputError("item_embeddings", embeddings, "holds no items")
    given = None if codebooks is None else codebooks_for(codebooks, source)
    work = WorkFolder(out)
    fitted = join(work.root, "codebooks")
    with locked(out):
        key = (config if given is None else given.config).plain()
        of_codebooks = None if codebooks is None else hash_of_codebooks(codebooks)
        work.open([VERSION, source["content_hash"], of_codebooks, key, part_items])
        if not exists(join(fitted, "manifest.json")):
            bundle = source["parents"].get("bundle", "")
            found = given or Codebooks.fit(mapped_vectors(embeddings), config, bundle)
            LOG.info("codebooks: %d levels, fitted on %d items", len(found.levels), found.fitted_on)
            found.save(fitted)
        books, done = Codebooks.load(fitted), work.finished()
        parts = plan_of(source["num_items"], part_items)
        missing = [part for part in parts if part.name not in done]
        if done:
            LOG.info("codes: %d of %d parts already exist", len(done), len(parts))
        facts = list(done.values())
        if missing:
            made = assign(Coding(embeddings, fitted, work), missing)
            total = sum(part.end - part.first for part in missing)
            facts += told(made, lambda f: int(f["items"]), total, "codes")
        tally = Tally.sum(Tally(**part) for part in facts)
        return _finished(work, source["content_hash"], books, tally)


def codebooks_for(folder: str, embeddings: dict[str, Any]) -> Codebooks:
    """Read codebooks for embeddings with this manifest.

    Raises SkewError if another bundle made those they were fitted on.
    """
    books, bundle = Codebooks.load(folder), embeddings["parents"].get("bundle", "")
    if books.bundle != bundle:
        raise SkewError(
            f"the codebooks in {folder} were fitted on embeddings of bundle {books.bundle}, these "
            f"are of {bundle}: their codes would mean nothing; fit codebooks again"
        )
    return books


def plan_of(num_items: int, part_items: int) -> list[Part]:
    """Cut rows into parts."""
    starts = range(0, num_items, part_items)
    return [
        Part(start, min(start + part_items, num_items), f"part-{start:012d}") for start in starts
    ]


def code_rows(item_ids: pa.ChunkedArray, codes: NDArray[np.int32]) -> pa.Table:
    """Return one `item_codes` row per item."""
    offsets = np.arange(len(codes) + 1, dtype=np.int32) * codes.shape[1]
    values = pa.array(np.ascontiguousarray(codes).reshape(-1), pa.int32())
    return pa.table(
        {
            "item_id": item_ids,
            "codes": pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values),
        }
    )


@dataclass(frozen=True)
class ItemCodes:
    """Codes of items, and how many each level has."""

    item_ids: list[str]
    codes: NDArray[np.int32]  # [I, L]
    sizes: list[int]  # [L]


def load_codes(folder: str, embeddings_hash: str | None = None) -> ItemCodes:
    """Read a table of codes.

    Raises SkewError if it was not made from the embeddings with this content hash, if given, and
    InputError if it is missing.
    """
    facts = read_manifest(folder, MANIFEST_KIND)
    found = facts["parents"]["embeddings"]
    if embeddings_hash is not None and found != embeddings_hash:
        raise SkewError(
            f"{folder} holds codes of embeddings {found}, but the embeddings here are "
            f"{embeddings_hash}; make them again (jobs/codes.py RUN)"
        )
    table = read_table(folder)
    return ItemCodes(table.column("item_id").to_pylist(), codes_of(table), facts["sizes"])


def codes_of(table: pa.Table) -> NDArray[np.int32]:  # [I, L]
    """Return the codes in a table."""
    chunks = table.column("codes").chunks
    parts = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in chunks]
    return np.asarray(np.concatenate(parts), np.int32).reshape(table.num_rows, -1)


def hash_of_codebooks(folder: str) -> str:
    """Return the content hash of codebooks, also of those in a folder of codes."""
    inner = join(folder, "codebooks")
    return str(read_manifest(inner if exists(inner) else folder, "codebooks")["content_hash"])


def _finished(work: WorkFolder, source: str, books: Codebooks, tally: Tally) -> dict[str, Any]:
    """Write the manifest of a table whose parts are all there, and put it in place."""
    fitted, kept = join(work.root, "codebooks"), join(work.table, "codebooks")
    parents = {"embeddings": source, "codebooks": hash_of_codebooks(fitted)}
    codes = codes_of(read_table(work.table, ["codes"]))
    found = quality(tally, codes, books.config.sizes)
    remove(kept)
    move(fitted, kept)
    manifest = write_manifest(
        work.table, MANIFEST_KIND, parents=parents, num_items=len(codes),
        config=books.config.plain(), sizes=books.config.sizes, fitted_on=books.fitted_on,
        **found.rounded(),
    )  # fmt: skip
    work.complete()
    return manifest
