"""The item index: search by the score, with ids and titles of the items.

What is stored is `InterestModel.index_vectors(e)`, so the inner product with
`query_vectors(h)` is the score of training (method 1.4). Exact search needs nothing but a
matrix product; approximate kinds need faiss.

Legend: I items, B queries, D width, K results.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from karma_ray.artifacts import (
    join,
    open_filesystem,
    read_manifest,
    read_table,
    write_manifest,
    write_table,
)
from karma_ray.errors import InputError, SkewError
from karma_ray.retrieval.exact import ExactSearch
from karma_ray.retrieval.finite import check_finite

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from numpy.typing import NDArray

    Vectors = NDArray[np.float32]
    Rows = NDArray[np.int64]

RECALL_AT = 200
"""Depth at which the recall of an index is measured against exact search."""
NUM_PROBE_QUERIES = 256
"""Number of item vectors that are used as queries to measure the recall of an index."""
SMALL_SEARCH = 2_000_000
"""Number of inner products below which one thread is faster than starting several."""


@dataclass(frozen=True)
class Flat:
    """Exact search by inner product."""

    kind = "flat"

    def build(self, vectors: Vectors) -> ExactSearch:  # [I, D]
        """Build an exact index of `vectors`."""
        return ExactSearch(vectors)


@dataclass(frozen=True)
class InvertedLists:
    """Approximate search that reads only the `num_probes` nearest of `num_lists` cells."""

    kind = "ivf"

    num_lists: int = 0
    """Cells; 0: 4 sqrt(I), at most one per 39 items (the fewest that k-means accepts)."""
    num_probes: int = 16
    """Cells read per query."""

    def build(self, vectors: Vectors) -> Any:  # [I, D]
        """Build an inverted-list faiss index of `vectors`; k-means uses faiss's fixed seed."""
        faiss = faiss_for(self.kind)
        count, width = vectors.shape
        wanted = self.num_lists or int(4 * count**0.5)
        num_lists = max(1, min(wanted, count // 39))
        index = faiss.IndexIVFFlat(
            faiss.IndexFlatIP(width), width, num_lists, faiss.METRIC_INNER_PRODUCT
        )
        index.train(vectors)
        index.add(vectors)
        index.nprobe = min(self.num_probes, num_lists)
        return index


IndexKind = Flat | InvertedLists
KINDS: dict[str, type[Flat] | type[InvertedLists]] = {"flat": Flat, "ivf": InvertedLists}


def faiss_for(kind: str) -> Any:
    """Import faiss, which only approximate kinds need; raises InputError without it."""
    try:
        import faiss
    except ImportError as error:
        raise InputError(
            "--kind", kind,
            f"needs the package faiss-cpu, which cannot be imported here ({error}); install it, "
            "or search exactly", choices=[Flat.kind],
        ) from None  # fmt: skip
    return faiss


def index_kind(name: str) -> IndexKind:
    """Return the kind `name` with default parameters; raises InputError with the choices."""
    if name not in KINDS:
        raise InputError("--kind", name, choices=KINDS)
    return KINDS[name]()


@dataclass(frozen=True)
class ItemIndex:
    """A searchable catalogue: row r of the index is `item_ids[r]` with title `titles[r]`."""

    engine: Any
    """ExactSearch or a faiss index: `search(queries, k)` returns scores and rows."""
    item_ids: list[str]
    titles: list[str]
    kind: str
    parameters: dict[str, Any]
    recall: float
    """Measured recall@200 against exact search, with item vectors as queries; 1.0 if exact."""
    parents: dict[str, str]
    """Content hashes of the bundle and the item embeddings that the index was built from."""
    content_hash: str = ""
    """Hash of the saved files; empty until saved."""

    @classmethod
    def build(
        cls,
        vectors: Vectors,  # [I, D]
        item_ids: Sequence[str],
        titles: Sequence[str],
        kind: IndexKind | None = None,
        parents: Mapping[str, str] | None = None,
    ) -> ItemIndex:
        """Index `vectors` (= index_vectors(e)).

        Raises InputError on an empty catalogue, KarmaRayError on vectors that are not finite.
        """
        if len(item_ids) == 0:
            raise InputError("catalogue", 0, "items; an index needs at least one")
        assert len(vectors) == len(item_ids) == len(titles)
        kind = kind or Flat()
        vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        check_finite(item_ids, vectors)
        index = kind.build(vectors)
        return cls(
            engine=index,
            item_ids=list(item_ids),
            titles=list(titles),
            kind=kind.kind,
            parameters=dataclasses.asdict(kind),
            recall=_measured_recall(index, vectors),
            parents=dict(parents or {}),
        )

    @property
    def _is_exact(self) -> bool:
        return isinstance(self.engine, ExactSearch)

    @property
    def num_items(self) -> int:
        """Number of items in the index."""
        return len(self.item_ids)

    def on(self, device: torch.device) -> ItemIndex:
        """Return the index with its exact search on a device; approximate ones stay on the CPU."""
        if not self._is_exact or self.engine.device == device:
            return self
        return dataclasses.replace(self, engine=ExactSearch(self.engine.vectors, device))

    def search(self, queries: Vectors, k: int) -> tuple[Rows, Vectors]:  # [B, D] -> [B, K]
        """Return rows and scores of the `k` best items per query, best first.

        K is min(k, I). If an approximate index finds fewer, the rest has row -1 and score -inf.
        """
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        k = min(k, self.num_items)
        work = len(queries) * self.num_items
        with nullcontext() if self.kind == Flat.kind else _threads(self.kind, work):
            scores, rows = self.engine.search(queries, k)
        return rows, np.where(rows < 0, -np.inf, scores).astype(np.float32)

    def save(self, folder: str) -> ItemIndex:
        """Write index.faiss, item_ids.parquet and manifest.json; returns self with its hash."""
        fs, path = open_filesystem(folder)
        fs.makedirs(path, exist_ok=True)
        with fs.open(f"{path}/index.faiss", "wb") as sink:
            sink.write(
                self.engine.to_bytes()
                if self._is_exact
                else faiss_for(self.kind).serialize_index(self.engine).tobytes()
            )
        table = pa.table(
            {
                "item_id": pa.array(self.item_ids, pa.string()),
                "title": pa.array(self.titles, pa.string()),
            }
        )
        write_table(table, folder, part="item_ids")
        manifest = write_manifest(
            folder,
            "index",
            parents=self.parents,
            index_kind=self.kind,
            parameters=self.parameters,
            num_items=self.num_items,
            width=self.engine.d,
            **{f"recall@{RECALL_AT}": self.recall},
        )
        return dataclasses.replace(self, content_hash=manifest["content_hash"])

    @classmethod
    def load(cls, folder: str, bundle_hash: str | None = None) -> ItemIndex:
        """Read a saved index.

        Raises InputError when it is missing, damaged or needs faiss, which is not installed;
        KarmaRayError when it is not finite; SkewError when it was not made for the bundle with
        `bundle_hash`, if given.
        """
        manifest = read_manifest(folder, "index")
        parents = dict(manifest["parents"])
        if bundle_hash is not None:
            check_parent(parents, "bundle", bundle_hash, folder)
        fs, path = open_filesystem(folder)
        with fs.open(f"{path}/index.faiss", "rb") as source:
            engine = _read_engine(manifest["index_kind"], source.read(), folder)
        table = read_table(join(folder, "item_ids.parquet"), columns=["item_id", "title"])
        if isinstance(engine, ExactSearch):
            check_finite(table.column("item_id").to_pylist(), engine.vectors, folder)
        return cls(
            engine=engine,
            item_ids=table.column("item_id").to_pylist(),
            titles=table.column("title").to_pylist(),
            kind=manifest["index_kind"],
            parameters=manifest["parameters"],
            recall=manifest[f"recall@{RECALL_AT}"],
            parents=parents,
            content_hash=manifest["content_hash"],
        )


def check_parent(parents: Mapping[str, str], role: str, expected: str, folder: str) -> None:
    """Raise SkewError unless the content of `folder` was made from the expected `role`."""
    found = parents.get(role)
    if found != expected:
        raise SkewError(
            f"{folder} was made from {role} {found}, but the {role} here is {expected}; "
            "make it again (jobs/embed.py RUN, then jobs/index.py RUN)"
        )


def _read_engine(kind: str, data: bytes, folder: str) -> Any:
    try:
        if kind == Flat.kind:
            return ExactSearch.from_bytes(data)
        return faiss_for(kind).deserialize_index(np.frombuffer(data, dtype=np.uint8))
    except (ValueError, RuntimeError) as error:
        raise InputError("index", folder, f"has a damaged index.faiss ({error})") from None


def _measured_recall(index: Any, vectors: Vectors) -> float:  # [I, D]
    """Return the share of the exact top 200 that `index` finds, for evenly spaced items."""
    if isinstance(index, ExactSearch):
        return 1.0
    rows = np.linspace(0, len(vectors) - 1, min(NUM_PROBE_QUERIES, len(vectors))).astype(int)
    k = min(RECALL_AT, len(vectors))
    exact = Flat().build(vectors).search(vectors[rows], k)[1]
    found = index.search(vectors[rows], k)[1]
    shares = [len(np.intersect1d(a, b)) / k for a, b in zip(exact, found, strict=True)]
    return float(np.mean(shares))


@contextmanager
def _threads(kind: str, work: int) -> Iterator[None]:
    faiss = faiss_for(kind)
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1 if work < SMALL_SEARCH else before)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def merged(
    rows: NDArray[np.int64], scores: NDArray[np.float32], k: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Merge several lists per request: rows and scores [B, L] -> the k best [B, k], best first.

    An item in more than one list counts once, with its best score. Row -1 means none.
    """
    found = np.full((len(rows), k), -1, np.int64), np.zeros((len(rows), k), np.float32)
    for request, (places, values) in enumerate(zip(rows, scores, strict=True)):
        order = np.argsort(-values, kind="stable")
        order = order[places[order] >= 0]
        first = np.sort(np.unique(places[order], return_index=True)[1])[:k]
        found[0][request, : len(first)] = places[order[first]]
        found[1][request, : len(first)] = values[order[first]]
    return found
