"""Which pool items are honest negatives, decided from frozen content only (METHOD 1.5).

Live embeddings never decide: once they turn parallel, a mask on live cosine deletes every
negative and the loss falls to zero. Legend: N examples, P pool items, C items of a window.
"""

from __future__ import annotations

import torch
from torch import Tensor


def in_batch_mask(pool: Tensor, clicked: Tensor, clicked_mask: Tensor, window: Tensor) -> Tensor:
    """Mask [N, P] of in-batch negatives.

    pool [P] are content ids; clicked [B, C] (with clicked_mask) the content ids each window's
    user clicked; window [N] says which window an example belongs to. A pool item of the same
    content as *anything* this user clicked in the window (the positive included, and with it
    every click of the same page) is no negative.
    """
    # Looked up, not compared one by one: [B, C, P] would outgrow the scores themselves.
    if len(pool) == 0:
        return torch.ones(len(window), 0, dtype=torch.bool, device=pool.device)
    contents, place = torch.unique(pool, return_inverse=True)
    found = torch.searchsorted(contents, clicked).clamp(max=len(contents) - 1)
    hit = clicked_mask & (contents[found] == clicked)
    taken = torch.zeros(len(clicked), len(contents) + 1, dtype=torch.bool, device=pool.device)
    taken.scatter_(1, torch.where(hit, found, len(contents)), True)
    return ~taken[:, place][window]


def hard_negative_mask(
    hard: Tensor, hard_mask: Tensor, clicked: Tensor, clicked_mask: Tensor
) -> Tensor:
    """Mask [B, T, H]: an exposed item with the content of a click in this window is dropped."""
    same = (hard[..., None] == clicked[:, None, None, :]) & clicked_mask[:, None, None, :]
    return hard_mask & ~same.any(-1)


def inclusion_log_chance(share: Tensor, draws: int) -> Tensor:
    """log pi [P] of an item to be in a pool made of `draws` clicks: pi = 1 - (1 - p)^draws.

    share [P] are the p: what part of all training clicks is on the item's content, as the pool
    holds one item of each. With s - log pi in place of s the pool's part of a softmax denominator,
    sum of exp(s) / pi, is in the mean that of the whole catalogue (Horvitz and Thompson, 1952;
    the correction of sampling bias of Yi et al., RecSys 2019). Without it an item is pushed away
    as often as it is popular. What no batch draws, the positive and exposed negatives, is left as
    it is (2507.09331). Clicks of one window are taken as independent, as those of others are.
    """
    return torch.log(-torch.expm1(draws * torch.log1p(-share)))


def first_occurrences(ids: Tensor) -> Tensor:
    """Positions [P'] of the first occurrence of each distinct id in ids [P], in order.

    After gathering over workers the same item may stand in the pool twice; one stays, so that
    one worker and many see the same negatives.
    """
    order = ids.argsort(stable=True)
    ordered = ids[order]
    fresh = ordered.new_ones(len(ids)).bool()
    fresh[1:] = ordered[1:] != ordered[:-1]
    return order[fresh].sort().values
