"""The item index: search by the score, with ids, titles and categories of the items.

What is stored is `InterestModel.index_vectors(e)`, so the inner product with
`query_vectors(h)` is the score of training (method 1.4).

Legend: I items, B queries, D width, K results.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from karma_ray.artifacts import join, read_manifest, read_table, remove, write_manifest, write_table
from karma_ray.errors import InputError, SkewError
from karma_ray.node_cache import complete_folder, local_copy
from karma_ray.retrieval.engines import Engine, build_engine, read_engine
from karma_ray.retrieval.exact import ExactSearch
from karma_ray.retrieval.finite import check_finite
from karma_ray.retrieval.index_recall import (
    DEPTHS,
    EXACT,
    ITEM_VECTORS,
    RECALL_AT,
    ProbeQueries,
    check_recall,
    item_probes,
    measured_recalls,
    raised,
)
from karma_ray.retrieval.kinds import KINDS, Flat, IndexKind

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    Vectors = NDArray[np.float32]
    Rows = NDArray[np.int64]
    Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class ItemIndex:
    """A searchable catalogue: row r of the index is `item_ids[r]` with title `titles[r]`."""

    engine: Engine
    """What finds rows: `search(queries, k, allowed)` returns scores and rows."""
    item_ids: list[str]
    titles: list[str]
    kind: str
    parameters: dict[str, Any]
    recalls: dict[int, float]
    """Measured recall against exact search at each depth."""
    parents: dict[str, str]
    """Content hashes of the bundle and the item embeddings that the index was built from."""
    content_hash: str = ""
    """Hash of the saved files; empty until saved."""
    categories: list[str | None] | None = None
    """The category of every item, if the catalogue has categories."""
    num_shards: int = 1
    recall_measured_on: str = EXACT

    @classmethod
    def build(
        cls,
        vectors: Vectors,  # [I, D]
        item_ids: Sequence[str],
        titles: Sequence[str],
        kind: IndexKind | None = None,
        parents: Mapping[str, str] | None = None,
        *,
        categories: Sequence[str | None] | None = None,
        num_shards: int = 1,
        probes: ProbeQueries | None = None,
        min_recall: float = 0.0,
        raise_recall: bool = False,
    ) -> ItemIndex:
        """Index `vectors` (= index_vectors(e)), exactly unless told otherwise.

        The recall is measured with `probes`, or else with item vectors; `raise_recall` doubles the
        kind's knob while it is below `min_recall`. Raises InputError on an empty catalogue and on
        a recall@200 that stays below, KarmaRayError on vectors that are not finite.
        """
        if len(item_ids) == 0:
            raise InputError("catalogue", 0, "items; an index needs at least one")
        if not 1 <= num_shards <= len(item_ids):
            raise InputError("--shards", num_shards, f"must lie between 1 and {len(item_ids)}")
        assert len(vectors) == len(item_ids) == len(titles)
        kind = kind or Flat()
        vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        check_finite(item_ids, vectors)
        engine = build_engine(vectors, kind, num_shards)
        recalls, what = dict.fromkeys(DEPTHS, 1.0), EXACT
        if not isinstance(kind, Flat):
            probes = probes or item_probes(vectors)
            if raise_recall:
                engine, kind, recalls = raised(engine, kind, vectors, probes, min_recall)
            else:
                recalls = measured_recalls(engine, vectors, probes.vectors)
            what = probes.what
            check_recall(recalls[RECALL_AT], min_recall, kind, what)
        return cls(
            engine=engine,
            item_ids=list(item_ids),
            titles=list(titles),
            kind=kind.kind,
            parameters=dataclasses.asdict(kind),
            recalls=recalls,
            parents=dict(parents or {}),
            categories=None if categories is None else list(categories),
            num_shards=num_shards,
            recall_measured_on=what,
        )

    @property
    def recall(self) -> float:
        """Measured recall@200."""
        return self.recalls[RECALL_AT]

    @property
    def is_exact(self) -> bool:
        """Whether every search finds the best items."""
        return self.kind == Flat.kind

    @property
    def num_items(self) -> int:
        """Number of items in the index."""
        return len(self.item_ids)

    def on(self, device: torch.device) -> ItemIndex:
        """Return the index with its exact search on a device; approximate ones stay on the CPU."""
        return dataclasses.replace(self, engine=self.engine.on(device))

    def exact_vectors(self, item_ids: Sequence[str]) -> torch.Tensor | None:  # [I, D]
        """Return what an exact search holds of the items, if it does so in this order."""
        engine = self.engine
        if not isinstance(engine, ExactSearch) or self.item_ids != item_ids:
            return None
        return engine.tensor

    def of_category(self, category: str) -> Mask:  # [I]
        """Return which items have a category; raises InputError on one that no item has."""
        if self.categories is None:
            problem = "cannot be asked for: the index has no categories (jobs/embed.py, then "
            raise InputError("category", category, f"{problem}jobs/index.py, write them)")
        names, codes = self._category_codes
        if category not in names:
            raise InputError("category", category, "is the category of no item")
        return np.asarray(codes == names[category])

    @cached_property
    def _category_codes(self) -> tuple[dict[str, int], NDArray[np.int32]]:
        column = pa.array(self.categories or [], pa.string()).dictionary_encode()
        names = {name: code for code, name in enumerate(column.dictionary.to_pylist())}
        return names, column.indices.fill_null(-1).to_numpy(zero_copy_only=False)

    def search(
        self, queries: Vectors, k: int, allowed: Mask | None = None
    ) -> tuple[Rows, Vectors]:  # [B, D], [I] -> [B, K]
        """Return rows and scores of the `k` best items per query, best first.

        K is min(k, I). With `allowed` only these items count. Where fewer than K are found, the
        rest has row -1 and score -inf.
        """
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        scores, rows = self.engine.search(queries, min(k, self.num_items), allowed)
        return rows, scores

    def save(self, folder: str) -> ItemIndex:
        """Write the vectors or faiss' file, item_ids.parquet and manifest.json.

        The folder is replaced when all is written, so that processes that have mapped the old one
        keep it. Returns self with its hash.
        """
        columns = {"item_id": self.item_ids, "title": self.titles}
        if self.categories is not None:
            columns["category"] = self.categories  # type: ignore[assignment]
        table = pa.table({name: pa.array(column, pa.string()) for name, column in columns.items()})
        with complete_folder(folder) as draft:
            write_table(table, draft, part="item_ids")
            self.engine.write(Path(draft))
            manifest = write_manifest(
                draft,
                "index",
                parents=self.parents,
                index_kind=self.kind,
                parameters=self.parameters,
                num_shards=self.num_shards,
                num_items=self.num_items,
                width=self.engine.d,
                recall_measured_on=self.recall_measured_on,
                **{f"recall@{depth}": recall for depth, recall in self.recalls.items()},
            )
            if "://" in folder:
                remove(folder)  # a store has no folder that could be replaced at once
        return dataclasses.replace(self, content_hash=manifest["content_hash"])

    @classmethod
    def load(cls, folder: str, bundle_hash: str | None = None) -> ItemIndex:
        """Map a saved index into memory; of a remote one, the node's copy.

        Raises InputError when it is missing, damaged or needs faiss, which is not installed;
        KarmaRayError when it is not finite; SkewError when it was not made for the bundle with
        `bundle_hash`, if given.
        """
        manifest = read_manifest(folder, "index")
        parents = dict(manifest["parents"])
        if bundle_hash is not None:
            check_parent(parents, "bundle", bundle_hash, folder)
        files = local_copy(folder)
        try:
            kind = KINDS[manifest["index_kind"]](**manifest["parameters"])
            num_shards = manifest.get("num_shards", 1)
            engine = read_engine(Path(files), kind, manifest["num_items"], num_shards)
        except (KeyError, TypeError) as error:
            message = f"was written by another version of karma_ray: {error}"
            raise InputError("index", folder, message) from None
        except ValueError as error:
            raise InputError("index", folder, f"is damaged ({error})") from None
        table = read_table(join(files, "item_ids.parquet"))
        if isinstance(engine, ExactSearch):
            check_finite(table.column("item_id").to_pylist(), engine.vectors, folder)
        recalls = {depth: manifest.get(f"recall@{depth}") for depth in DEPTHS}
        has_categories = "category" in table.column_names
        return cls(
            engine=engine,
            item_ids=table.column("item_id").to_pylist(),
            titles=table.column("title").to_pylist(),
            kind=manifest["index_kind"],
            parameters=manifest["parameters"],
            recalls={depth: found for depth, found in recalls.items() if found is not None},
            parents=parents,
            content_hash=manifest["content_hash"],
            categories=table.column("category").to_pylist() if has_categories else None,
            num_shards=num_shards,
            recall_measured_on=manifest.get("recall_measured_on", ITEM_VECTORS),
        )


def check_parent(parents: Mapping[str, str], role: str, expected: str, folder: str) -> None:
    """Raise SkewError unless the content of `folder` was made from the expected `role`."""
    found = parents.get(role)
    if found != expected:
        raise SkewError(
            f"{folder} was made from {role} {found}, but the {role} here is {expected}; "
            "make it again (jobs/embed.py RUN, then jobs/index.py RUN)"
        )
