"""Masks and corrections of negatives, decided from frozen content only (method 1.5).

They never use current embeddings: once these become parallel, a mask on their cosine would remove
all negatives and the loss would fall to 0. Legend: N examples, P pool items, C items of a window,
I items of the catalogue, E pairs.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor
from torch.nn import functional

MAX_SCORES = 16 * 1024 * 1024
"""Cosines kept in memory at once."""
ALL_PAIRS = 500_000
"""Items up to which all pairs are compared; of more, those that share a cell."""
CELL_ITEMS = 2_000
"""Items for every cell, whose centre is one of them."""
OVERLAP = 2
"""Cells of each item, those of the nearest centres: what lies close together has one in common."""


def in_batch_mask(pool: Tensor, clicked: Tensor, clicked_mask: Tensor, window: Tensor) -> Tensor:
    """Return the mask [N, P] of in-batch negatives.

    pool [P] are content ids; clicked [B, C] (with clicked_mask) are the content ids that each
    window's user clicked; window [N] is the window of each example. A pool item is no negative if
    its content equals that of *any* click of this user in the window, which includes the positive
    and all clicks of the same page.
    """
    # Looked up instead of compared pairwise: [B, C, P] would be larger than the scores.
    if len(pool) == 0:
        return torch.ones(len(window), 0, dtype=torch.bool, device=pool.device)
    contents = pool.sort().values
    place = torch.searchsorted(contents, pool)  # equal contents have the place of the first
    found = torch.searchsorted(contents, clicked).clamp(max=len(contents) - 1)
    hit = clicked_mask & (contents[found] == clicked)
    taken = torch.zeros(len(clicked), len(contents) + 1, dtype=torch.bool, device=pool.device)
    taken.scatter_(1, torch.where(hit, found, len(contents)), True)
    return ~taken[:, place][window]


def hard_negative_mask(
    hard: Tensor, hard_mask: Tensor, clicked: Tensor, clicked_mask: Tensor
) -> Tensor:
    """Return the mask [B, T, H] without exposed items whose content is clicked in the window."""
    same = (hard[..., None] == clicked[:, None, None, :]) & clicked_mask[:, None, None, :]
    return hard_mask & ~same.any(-1)


def inclusion_log_chance(share: Tensor, draws: int) -> Tensor:
    """Return log pi [P], the probability that an item is in a pool of `draws` clicks.

    pi = 1 - (1 - p)^draws, where share [P] are the p: the share of all training clicks on the
    item's content, since the pool has one item per content. With s - log pi in place of s, the
    pool's part of a softmax denominator, the sum of exp(s) / pi, has the expectation of that over
    the whole catalogue (Horvitz and Thompson, 1952; sampling-bias correction of Yi et al.,
    RecSys 2019). Without it items are pushed away in proportion to their popularity. The positive
    and the exposed negatives are not drawn by the batch and stay unchanged (2507.09331). Clicks
    of one window are treated as independent.
    """
    return torch.log(-torch.expm1(draws * torch.log1p(-share)))


def first_occurrences(ids: Tensor) -> Tensor:
    """Return the positions [P'] of the first occurrence of each distinct id in ids [P].

    After gathering over workers an item may be in the pool twice. Only one is kept, so that one
    worker and many have the same negatives.
    """
    order = ids.argsort(stable=True)
    ordered = ids[order]
    fresh = ordered.new_ones(len(ids)).bool()
    fresh[1:] = ordered[1:] != ordered[:-1]
    return order[fresh].sort().values


def grouped_contents(
    contents: NDArray[np.int64],  # [I]
    vectors: NDArray[np.float32],  # [I, D]
    cosine: float,
    device: torch.device | str = "cpu",
) -> NDArray[np.int64]:  # -> [I]
    """Return content ids that are equal for near-duplicates too, numbered from 0.

    Items belong together if their contents are equal or the cosine of their frozen vectors is
    above `cosine`, and so do all items that a chain of such pairs connects. Up to ALL_PAIRS items
    all pairs are compared, which costs I^2 D multiplications on `device`. Of more items those that
    share a cell are, which costs about I D (I / CELL_ITEMS + OVERLAP^2 CELL_ITEMS) if the vectors
    are spread evenly; a pair is missed if neither item has a cell of the other.
    """
    groups: NDArray[np.int64] = np.unique(contents, return_inverse=True)[1]
    held: list[NDArray[np.int64]] = []
    units = functional.normalize(torch.from_numpy(vectors).to(device))
    for found in _parallel_pairs(units, cosine):
        held.append(found)
        if sum(part.shape[1] for part in held) > MAX_SCORES:
            groups, held = _joined(groups, held), []
    return _joined(groups, held)


def _parallel_pairs(units: Tensor, cosine: float) -> Iterator[NDArray[np.int64]]:  # -> [2, E]
    """Yield the rows (smaller, larger) of vectors of length 1 with a cosine above `cosine`."""
    if len(units) <= ALL_PAIRS:
        yield from _pairs_of_all(units, cosine)
        return
    for rows in _cells(units):
        for found in _pairs_of_all(units[rows], cosine):
            yield rows.cpu().numpy()[found]


def _pairs_of_all(units: Tensor, cosine: float) -> Iterator[NDArray[np.int64]]:  # -> [2, E]
    size = max(1, MAX_SCORES // max(1, len(units)))
    for begin in range(0, len(units), size):
        near = (units[begin : begin + size] @ units[begin:].T > cosine).triu(1)
        found = near.nonzero().T.cpu().numpy()
        if found.shape[1]:
            yield found + begin


def _cells(units: Tensor) -> Iterator[Tensor]:
    """Yield the rows of each cell, in order; the centres are drawn."""
    drawn = np.random.default_rng(0).choice(len(units), len(units) // CELL_ITEMS, replace=False)
    centres = units[torch.from_numpy(drawn).to(units.device)].T
    parts = torch.split(units, max(1, MAX_SCORES // centres.shape[1]))
    nearest = torch.cat([(part @ centres).topk(OVERLAP).indices for part in parts])  # [I, OVERLAP]
    order = nearest.flatten().argsort(stable=True) // OVERLAP
    sizes = nearest.flatten().bincount(minlength=centres.shape[1])
    yield from torch.split(order, sizes.tolist())


def _joined(
    groups: NDArray[np.int64], pairs: list[NDArray[np.int64]]
) -> NDArray[np.int64]:  # [I], [2, E] each -> [I]
    """Return the groups after those of each pair of items were united."""
    if not pairs:
        return groups
    united = _components(groups[np.concatenate(pairs, 1)], int(groups.max()) + 1)
    joined: NDArray[np.int64] = united[groups]
    return joined


def _components(pairs: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Return the connected component [count] of each of `count` nodes with edges [2, E]."""
    edges = coo_array((np.ones(pairs.shape[1], bool), tuple(pairs)), shape=(count, count))
    labels: NDArray[np.int64] = connected_components(edges, directed=False)[1].astype(np.int64)
    return labels
