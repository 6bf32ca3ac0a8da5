"""The kinds of index: what each builds, and its knobs.

`flat` is exact and needs PyTorch alone; the others are faiss' indexes by its own factory. Those
that round the vectors find several times k candidates, whose scores faiss computes again from
float vectors that it keeps with them, so every kind answers with the inner product itself.

Legend: I items, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from karma_ray.errors import InputError
from karma_ray.retrieval.exact import ExactSearch

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Vectors = NDArray[np.float32]

AUTO = "auto"
EXACT_NUMBERS = 2**24
"""Numbers (I x D) that are searched exactly whatever the model is: 64 MiB, some milliseconds."""
POINTS_PER_CELL = 39
"""The fewest points of a centroid that faiss' k-means accepts without a warning."""
PQ_CENTROIDS = 256


@dataclass(frozen=True)
class Flat:
    """Exact: all inner products."""

    kind: ClassVar[str] = "flat"
    knob: ClassVar[str] = ""

    def build(self, vectors: Vectors) -> ExactSearch:  # [I, D]
        """Build an exact index of `vectors`."""
        return ExactSearch(vectors)


@dataclass(frozen=True)
class _Approximate:
    kind: ClassVar[str]
    knob: ClassVar[str]
    """The field that raises the recall."""

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value < (0 if name == "num_lists" else 1):
                raise InputError(f"--set {name}", value, "must be at least 1")

    def build(self, vectors: Vectors) -> Any:  # [I, D]
        """Build a faiss index of `vectors`; k-means uses faiss' fixed seed."""
        faiss = faiss_for(self.kind)
        count, width = vectors.shape
        index = faiss.index_factory(width, self.factory(count, width), faiss.METRIC_INNER_PRODUCT)
        self.prepare(index)
        index.train(vectors)
        index.add(vectors)
        return index

    def factory(self, count: int, width: int) -> str:
        """Return the text for faiss' index factory."""
        raise NotImplementedError

    def prepare(self, index: Any) -> None:
        """Set what a new index needs before it is trained."""

    def search_parameters(self, selector: Any, effort: float) -> Any:
        """Return faiss' parameters of one search.

        `selector` holds the rows that count, or is None; `effort` multiplies the work.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class InvertedLists(_Approximate):
    """Reads the vectors of the `num_probes` cells next to the query."""

    kind: ClassVar[str] = "ivf"
    knob: ClassVar[str] = "num_probes"

    num_lists: int = 0
    """Cells; 0: 4 sqrt(I), at most one per 39 items (the fewest that k-means accepts)."""
    num_probes: int = 32
    """Cells read per query."""

    def factory(self, count: int, width: int) -> str:
        """Return the text for faiss' index factory."""
        return f"IVF{self._cells(count)},Flat"

    def _cells(self, count: int) -> int:
        wanted = self.num_lists or int(4 * count**0.5)
        return max(1, min(wanted, count // POINTS_PER_CELL))

    def search_parameters(self, selector: Any, effort: float) -> Any:
        """Return faiss' parameters of one search."""
        probes = int(min(self.num_probes * effort, 2**30))
        return faiss_for(self.kind).SearchParametersIVF(sel=selector, nprobe=probes)


@dataclass(frozen=True)
class Graph(_Approximate):
    """Walks a graph of neighbours (HNSW), with `breadth` candidates at a time."""

    kind: ClassVar[str] = "hnsw"
    knob: ClassVar[str] = "breadth"

    neighbours: int = 32
    """Neighbours of an item on every layer of the graph; twice as many on the lowest."""
    build_breadth: int = 100
    """Candidates that are kept while an item's neighbours are looked for."""
    breadth: int = 256
    """Candidates that a search keeps (at least k)."""

    def factory(self, count: int, width: int) -> str:
        """Return the text for faiss' index factory."""
        return f"HNSW{self.neighbours},Flat"

    def prepare(self, index: Any) -> None:
        """Set the care with which the graph is built."""
        index.hnsw.efConstruction = self.build_breadth

    def search_parameters(self, selector: Any, effort: float) -> Any:
        """Return faiss' parameters of one search."""
        breadth = int(min(self.breadth * effort, 2**30))
        return faiss_for(self.kind).SearchParametersHNSW(sel=selector, efSearch=breadth)


@dataclass(frozen=True)
class ProductQuantised(InvertedLists):
    """`ivf` over codes of `width_per_code` numbers a byte; `overfetch` x k are scored again."""

    kind: ClassVar[str] = "ivfpq"

    width_per_code: int = 4
    """Numbers that one byte stands for, if they divide the width."""
    overfetch: int = 8
    """Candidates, as a multiple of k, whose scores are computed again from float vectors."""

    def factory(self, count: int, width: int) -> str:
        """Return the text for faiss' index factory; raises InputError on too few items."""
        least = POINTS_PER_CELL * PQ_CENTROIDS
        if count < least:
            raise InputError(
                "--kind", self.kind, f"needs at least {least} items (of each shard), not {count}",
                choices=[Flat.kind, ScalarQuantised.kind],
            )  # fmt: skip
        numbers = max(n for n in range(1, self.width_per_code + 1) if width % n == 0)
        # `np`: without the training for polysemous codes, which lists of cells do not use.
        return f"IVF{self._cells(count)},PQ{width // numbers}x8np,RFlat"

    def search_parameters(self, selector: Any, effort: float) -> Any:
        """Return faiss' parameters of one search."""
        return faiss_for(self.kind).IndexRefineSearchParameters(
            k_factor=float(self.overfetch),
            base_index_params=super().search_parameters(selector, effort),
        )


@dataclass(frozen=True)
class ScalarQuantised(_Approximate):
    """All inner products with numbers of one byte; the best `overfetch` x k are scored again."""

    kind: ClassVar[str] = "sq8"
    knob: ClassVar[str] = "overfetch"

    overfetch: int = 2
    """Candidates, as a multiple of k, whose scores are computed again from float vectors."""

    def factory(self, count: int, width: int) -> str:
        """Return the text for faiss' index factory."""
        return "SQ8,RFlat"

    def search_parameters(self, selector: Any, effort: float) -> Any:
        """Return faiss' parameters of one search."""
        faiss = faiss_for(self.kind)
        return faiss.IndexRefineSearchParameters(
            k_factor=float(self.overfetch),
            base_index_params=faiss.SearchParameters(sel=selector),
        )


IndexKind = Flat | InvertedLists | Graph | ProductQuantised | ScalarQuantised
KINDS: dict[str, type[IndexKind]] = {
    kind.kind: kind for kind in (Flat, InvertedLists, Graph, ProductQuantised, ScalarQuantised)
}


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


def index_kind(name: str, assignments: Sequence[str] = ()) -> IndexKind | None:
    """Return the kind `name` with `NAME=VALUE` knobs; None for `auto`.

    Raises InputError with the choices.
    """
    if name == AUTO and not assignments:
        return None
    if name == AUTO:
        raise InputError("--set", assignments[0], "is a knob of one kind; name it with --kind")
    if name not in KINDS:
        raise InputError("--kind", name, choices=[AUTO, *KINDS])
    kind, values = KINDS[name], {}
    names = [field.name for field in dataclasses.fields(kind)]
    for assignment in assignments:
        knob, _, value = assignment.partition("=")
        if knob not in names:
            raise InputError("--set", assignment, f"is no knob of {name}", choices=names)
        if not value.strip().isdigit():
            raise InputError("--set", assignment, "must be a whole number")
        values[knob] = int(value)
    return kind(**values)


def chosen_kind(count: int, width: int, num_weights: int) -> IndexKind:
    """Return the kind for `count` items if the user names none.

    A request costs the model at least one pass over its `num_weights`, and an exact search reads
    count x width numbers: while these are fewer, or fewer than EXACT_NUMBERS, an approximate
    search would save less than half of the request. Without faiss all search is exact.
    """
    if count * width <= max(EXACT_NUMBERS, num_weights):
        return Flat()
    try:
        faiss_for(InvertedLists.kind)
    except InputError:
        return Flat()
    return InvertedLists()


def describe_kinds() -> str:
    """Return a line for each kind and its knobs with their defaults, for --help."""
    lines = []
    for name, kind in KINDS.items():
        lines.append(f"  {name:6} {(kind.__doc__ or '').strip()}")
        knobs = ", ".join(f"{knob}={value}" for knob, value in dataclasses.asdict(kind()).items())
        if knobs:
            lines.append(f"  {'':6} --set: {knobs}")
    return "\n".join(lines)
