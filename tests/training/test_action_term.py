"""The correction of in-batch negatives for popularity, in the loss of a batch.

Equation 5 itself is held to brute force in test_step.py.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from karma_ray.data.batch import Batch
from karma_ray.model.karma import KarmaModel
from karma_ray.objectives.losses import ObjectiveConfig
from karma_ray.training.action_term import Pool, action_term, trained_steps
from karma_ray.training.item_table import share_items
from karma_ray.training.step_state import StepState
from tests import tiny

PLAIN = ObjectiveConfig(action_loss="infonce")
LOGQ = replace(PLAIN, logq=True)
# Users share clicks, `copy` has the text of i0, and hard negatives are clicked elsewhere: eight
# clicks, of which i0 and copy, i1 and the rest have 3, 2 and 1.
ROWS = [
    tiny.window(["i0", "i1", "i2"], [0, 0, 1], hard=[["i9", "i1"], ["i8"], []], user="a"),
    tiny.window(["copy", "i4", "i1"], hard=[["i0"], ["i7", "i6"], ["i9"]], user="b"),
    tiny.window(["i5", "i0", "i7"], loss=[False, True, True], user="c"),
]


def _vectors(karma: KarmaModel, batch: Batch) -> tuple[Tensor, Tensor]:
    items = karma.interest.encode_items(batch.item_tokens, batch.item_lengths)
    return karma.interest.interest(batch, items), items


def _loss(
    karma: KarmaModel, batch: Batch, h: Tensor, items: Tensor, objective: ObjectiveConfig,
    shares: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Summed over the trained steps."""
    pool = Pool.of(share_items(batch), items, objective, StepState(shares=shares))
    return action_term(karma.interest, batch, h, items, pool, objective).loss


def _brute_force(
    karma: KarmaModel, batch: Batch, h: Tensor, items: Tensor, log_chance: dict[int, float],
    positions: str = "all",
) -> Tensor:  # fmt: skip
    """InfoNCE in Python loops, in-batch negatives of content c at s - log_chance[c]."""
    scores = karma.interest.query_vectors(h) @ karma.interest.index_vectors(items).T  # [B, T, U]
    content = batch.item_content.tolist()
    pool: dict[int, int] = {}
    for index in sorted(batch.item_index[batch.loss_mask].tolist()):
        pool.setdefault(content[index], index)
    total = scores.new_zeros(())
    for b, k in trained_steps(batch, positions).nonzero().tolist():
        clicked = {content[i] for i in batch.item_index[b][batch.item_mask[b]].tolist()}
        hard = batch.hard_index[b, k][batch.hard_mask[b, k]].tolist()
        terms = [scores[b, k, batch.item_index[b, k]]]
        terms += [scores[b, k, j] for j in hard if content[j] not in clicked]
        terms += [scores[b, k, j] - log_chance[c] for c, j in pool.items() if c not in clicked]
        total = total + torch.logsumexp(torch.stack(terms), 0) - terms[0]
    return total


@pytest.mark.parametrize("positions", ["all", "last"])
def test_the_corrected_loss_and_its_gradients_are_those_of_the_loops(positions: str) -> None:
    """With `last` the pool is still made of every click, and all of them are counted."""
    karma, batch = tiny.model(), tiny.batch(tiny.sequences(*ROWS))
    objective = replace(LOGQ, act_positions=positions)  # type: ignore[arg-type]
    leaves = [vectors.detach().requires_grad_() for vectors in _vectors(karma, batch)]
    clicks = {"i0": 3, "copy": 3, "i1": 2, "i2": 1, "i4": 1, "i7": 1}
    shares = torch.full((tiny.catalog().num_items,), 1 / 8)
    for name, count in clicks.items():
        shares[tiny.catalog().rows([name])] = count / 8
    contents = tiny.catalog().content_ids[tiny.catalog().rows(list(clicks))].tolist()
    log_chance = {
        content: math.log(1 - (1 - count / 8) ** 8)
        for content, count in zip(contents, clicks.values(), strict=True)
    }
    found = _loss(karma, batch, *leaves, objective, shares)
    wanted = _brute_force(karma, batch, *leaves, log_chance, positions)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    gradients = [torch.autograd.grad(value, leaves) for value in (found, wanted)]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)
    plain = _loss(karma, batch, *leaves, replace(objective, logq=False))
    assert abs(float((found - plain).detach())) > 0.1


def test_where_all_items_are_equally_popular_in_batch_negatives_move_by_one_number() -> None:
    karma, batch = tiny.model(), tiny.batch(tiny.sequences(*ROWS))
    h, items = _vectors(karma, batch)
    shares = torch.full((tiny.catalog().num_items,), 0.02)
    pool = Pool.of(share_items(batch), items, LOGQ, StepState(shares=shares))
    assert pool.log_chance is not None
    by = math.log(1 - 0.98 ** int(batch.loss_mask.sum()))
    torch.testing.assert_close(pool.log_chance, torch.full_like(pool.log_chance, by))
    constant = dict.fromkeys(batch.item_content.tolist(), by)
    wanted = _brute_force(karma, batch, h, items, constant)
    torch.testing.assert_close(_loss(karma, batch, h, items, LOGQ, shares), wanted)


@pytest.mark.parametrize("loss", ["pairwise", "infonce", "bce", "mse"])
def test_without_the_switch_nobody_s_popularity_changes_a_bit(loss: str) -> None:
    karma, batch = tiny.model(), tiny.batch(tiny.sequences(*ROWS))
    h, items = _vectors(karma, batch)
    objective = replace(PLAIN, action_loss=loss)  # type: ignore[arg-type]
    chosen = share_items(batch).pool
    pool = Pool(items[chosen], batch.item_content[chosen])
    wanted = action_term(karma.interest, batch, h, items, pool, objective).loss
    shares = torch.rand(tiny.catalog().num_items)
    assert torch.equal(_loss(karma, batch, h, items, objective, shares), wanted)


def test_a_click_that_is_surely_in_the_batch_is_not_corrected() -> None:
    karma, batch = tiny.model(), tiny.batch(tiny.sequences(*ROWS))
    h, items = _vectors(karma, batch)
    everywhere = torch.ones(tiny.catalog().num_items)
    found = _loss(karma, batch, h, items, LOGQ, everywhere)
    assert torch.equal(found, _loss(karma, batch, h, items, PLAIN))
