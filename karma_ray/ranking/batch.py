"""The batch of a CTR model: pages, and the items that each of them showed.

Legend: R pages (requests), N shown items (candidates) of all pages, T history, Q query terms,
F features of a candidate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class CtrBatch:
    """Pages with their candidates, grouped by page, so that the user is encoded once per page."""

    history: Tensor
    """[R, T] int64: catalogue rows of the clicks strictly before the page, newest last; -1 before
    the first one."""
    query: Tensor
    """[R, Q] int64: hashed words of the query from 1 on; 0 after the last one."""
    request: Tensor
    """[N] int64: the page of each candidate, ascending."""
    candidate: Tensor
    """[N] int64: catalogue rows of the candidates; -1 for an unknown item."""
    features: Tensor
    """[N, F] float32: what is computed of a candidate beforehand (ranking/features.py)."""
    clicked: Tensor
    """[N] float32: 1 for a click, 0 otherwise."""
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    """Further inputs that a family of models reads, by name; [R, ...] or [N, ...]."""

    @property
    def num_requests(self) -> int:
        """R."""
        return int(self.history.shape[0])

    @property
    def num_candidates(self) -> int:
        """N."""
        return int(self.candidate.shape[0])

    def named(self, names: Sequence[str]) -> tuple[Tensor, ...]:
        """Return inputs of a model by their names, fields of the batch or of `extra`."""
        return tuple(
            self.extra[name] if name in self.extra else getattr(self, name) for name in names
        )

    def to(self, device: torch.device) -> CtrBatch:
        """Move all tensors."""
        moved = {name: getattr(self, name).to(device) for name in FIELDS}
        return replace(self, **moved, extra={n: v.to(device) for n, v in self.extra.items()})


FIELDS = ("history", "query", "request", "candidate", "features", "clicked")
"""The tensors that every batch has."""
