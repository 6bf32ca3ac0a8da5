"""The item vectors of a finished run as features of exposures, computed once per page.

Legend: R pages, N candidates, T history, I items, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import torch

from karma_ray.artifacts import exists, join, read_manifest, write_table
from karma_ray.data.catalog import Catalog
from karma_ray.data.fragments import row_blocks
from karma_ray.data.steps import flattened, list_sizes, places
from karma_ray.errors import InputError, SkewError
from karma_ray.ranking.collate import newest_last
from karma_ray.ranking.exposures import EXPOSURES, requests_of, slices
from karma_ray.ranking.features import similarity_features
from karma_ray.retrieval.aligned import FOLDERS
from karma_ray.retrieval.encode import ItemTable, load_embeddings
from karma_ray.retrieval.parts import served
from karma_ray.retrieval.retriever import Retriever, check_run, score_vectors
from karma_ray.retrieval.similarity import unit

if TYPE_CHECKING:
    from numpy.typing import NDArray

INTEREST_PAGES = 256
"""Pages whose h_t is computed at once."""


@dataclass(frozen=True)
class FeatureBuild:
    """A task: adds the column `features` to one file of exposures."""

    exposures: str
    out: str
    run: str
    items_uri: str
    interest: bool = False

    def __call__(self, file: str) -> None:
        """`file` is a path below the folder of exposures, `split=NAME/PART.parquet`."""
        vectors = _loaded(self.run, self.items_uri, self.interest)
        folder, _, name = file.rpartition("/")
        tables = [
            with_features(rows, vectors)
            for rows in row_blocks(join(self.exposures, file), EXPOSURES.names)
        ]
        empty = EXPOSURES.append(pa.field("features", pa.list_(pa.float32()))).empty_table()
        target, name = join(self.out, folder), name.removesuffix(".parquet")
        write_table(pa.concat_tables([empty, *tables]), target, name)


@dataclass(frozen=True)
class Vectors:
    """Item vectors by catalogue row, and the model that computes h_t if it is wanted."""

    items: NDArray[np.float32]  # [I, D] of length 1
    item_ids: list[str]
    retriever: Retriever | None = None
    index: NDArray[np.float32] | None = None  # [I, D] what h_t is multiplied with

    @classmethod
    def load(cls, run: str, items_uri: str, interest: bool) -> Vectors:
        """Raises InputError when the run is not finished, or is of another catalogue."""
        check_run(run)
        table = vectors_of(run, items_uri)
        if not interest:
            return cls(unit(table.embeddings), table.item_ids)
        retriever = Retriever.load(run, items_uri)
        index = score_vectors(retriever.interest, retriever.table)
        return cls(unit(table.embeddings), table.item_ids, retriever, index)


def vectors_of(run: str, items_uri: str) -> ItemTable:
    """Return the item vectors of a run in the order of a catalogue; raises InputError on one that
    the run did not embed."""
    return in_order_of(served(run).item_embeddings, run, items_uri)


def is_aligned(place: str) -> bool:
    """Whether a value of `ranking.vectors` is RUN/aligned_embeddings."""
    return place.rstrip("/").rsplit("/", 1)[-1] in FOLDERS


def frozen_vectors(place: str, items_uri: str) -> ItemTable:
    """Return the item vectors of a run, or its aligned embeddings, as `vectors_of` does.

    Raises InputError on aligned embeddings of others than the run's own.
    """
    if not is_aligned(place):
        return vectors_of(place, items_uri)
    place = place.rstrip("/")
    run = place.rsplit("/", 1)[0]
    there = exists(join(place, "manifest.json"))
    own = read_manifest(served(run).item_embeddings)["content_hash"]
    if not there or read_manifest(place)["parents"].get("embeddings") != own:
        raise InputError(
            "--vectors", place, f"holds no embeddings that were aligned from those of {run}: make "
            f"them with `python jobs/codes.py {run} --aligned`",
        )  # fmt: skip
    return in_order_of(place, place, items_uri)


def in_order_of(embeddings: str, run: str, items_uri: str) -> ItemTable:
    """Return embeddings of a run as `vectors_of` does."""
    table = load_embeddings(embeddings)
    try:
        return table.in_order(Catalog.load(items_uri).item_ids)
    except SkewError:
        raise InputError(
            "--vectors", run, f"has vectors of another catalogue than {items_uri}: embed that one "
            "with `python jobs/embed.py`, or name a run that was trained on it",
        ) from None  # fmt: skip


@lru_cache(maxsize=1)
def _loaded(run: str, items_uri: str, interest: bool) -> Vectors:
    """Load once per process, whatever number of files it adds features to."""
    return Vectors.load(run, items_uri, interest)


def with_features(rows: pa.Table, vectors: Vectors) -> pa.Table:
    """Return exposures with the column `features`, F numbers per candidate in a row."""
    candidates = rows.column("candidate_rows")
    sizes = list_sizes(candidates)
    items = flattened(candidates).to_numpy().astype(np.int64)
    history = newest_last(rows.column("history_rows"), None)
    cosines = page_cosines(vectors.items, history, items, sizes)
    request = np.repeat(np.arange(len(sizes)), sizes)
    scores = _interest_scores(rows, vectors, items, request)
    found = similarity_features(cosines, (history >= 0)[request], scores)
    ends = np.concatenate([[0], np.cumsum(sizes)]) * found.shape[1]
    column = slices(pa.array(found.reshape(-1)), ends[:-1], ends[1:])
    return rows.append_column("features", pa.chunked_array([column]))


def page_cosines(
    vectors: NDArray[np.float32],  # [I, D] of length 1
    history: NDArray[np.int64],  # [R, T]
    items: NDArray[np.int64],  # [N]
    sizes: NDArray[np.int64],  # [R] candidates of each page
) -> NDArray[np.float32]:  # [N, T]
    """Return the cosines of candidates to their page's history; those of row -1 mean nothing."""
    request, place = np.repeat(np.arange(len(sizes)), sizes), places(sizes)
    padded = np.zeros((len(sizes), int(sizes.max(initial=1))), np.int64)
    padded[request, place] = items
    found = np.matmul(vectors[padded], vectors[np.maximum(history, 0)].transpose(0, 2, 1))
    cosines: NDArray[np.float32] = found[request, place]
    return cosines


def _interest_scores(
    rows: pa.Table, vectors: Vectors, items: NDArray[np.int64], request: NDArray[np.int64]
) -> NDArray[np.float32] | None:  # -> [N]
    """Return h_t . e of each candidate, the score that recall ranks by."""
    retriever, index = vectors.retriever, vectors.index
    if retriever is None or index is None:
        return None
    asked = requests_of(rows, pa.array(vectors.item_ids))
    scores = np.zeros(len(items), np.float32)
    for start in range(0, asked.num_rows, INTEREST_PAGES):
        part = asked.slice(start, INTEREST_PAGES)
        keys = retriever.keys(part) if retriever.interest.is_random else None
        with torch.inference_mode():
            found = retriever.interest.search_vectors(retriever.interests(part), keys)
        search = found.float().cpu().numpy()  # [r, K, D]
        mine = np.flatnonzero((request >= start) & (request < start + part.num_rows))
        of_page = search[request[mine] - start]
        scores[mine] = np.einsum("nkd,nd->nk", of_page, index[items[mine]]).max(1)
    return scores
