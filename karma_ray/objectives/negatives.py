"""Masks and corrections of negatives, decided from frozen content only (method 1.5).

They never use current embeddings: once these become parallel, a mask on their cosine would remove
all negatives and the loss would fall to 0. Legend: N examples, P pool items, C items of a window.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
