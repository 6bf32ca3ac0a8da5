"""The engine against a straightforward step of the same mathematics: equal loss, equal gradients.

benchmarks/reference.py runs stock bodies on padded rows, encodes every use of an item anew, and
lays out Task 1, masks and logits in its own words; see there.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.reference import ReferenceStep
from karma_ray.data.batch import Batch
from karma_ray.model.karma import KarmaModel
from karma_ray.objectives.losses import ObjectiveConfig
from karma_ray.training.step import JointStep
from tests import tiny

# Unequal windows; a page of three, its first click among them; tied items; `copy` has the text of
# i0; missing queries; hard negatives that are clicked elsewhere; context before the trained steps.
ROWS = [
    tiny.window(["i0", "i1", "i2"], [0, 0, 1], hard=[["i9", "i1"], ["i8"], []], user="a"),
    tiny.window(["i5", "copy"], queries=[None, "mug"], user="b"),
    tiny.window([f"i{n}" for n in range(10, 17)], loss=[False] * 5 + [True] * 2, user="c"),
    tiny.window(["i7", "i1", "i5", "i9"], [0, 1, 1, 1], hard=[["i0"], ["i7", "i6"], [], ["i3"]],
                user="d"),
    tiny.window(["i20"], queries=[None], user="e"),
    tiny.window(["i21", "i22"], loss=[False, False], user="f"),
]  # fmt: skip
BATCHES = {
    "all_steps_decoded": {"num_decoded": 0},
    "two_steps_decoded": {"num_decoded": 2},
    "queries_dropped": {"drop_query": 0.5},
}


def _assert_same(karma: KarmaModel, batch: Batch, objective: ObjectiveConfig) -> None:
    ours, theirs = JointStep(objective)(karma, batch), ReferenceStep(objective)(karma, batch)
    for name in (name for name in ours.logs if name.startswith("loss/")):
        torch.testing.assert_close(theirs.logs[name], ours.logs[name], rtol=1e-5, atol=0, msg=name)
    torch.testing.assert_close(theirs.loss, ours.loss, rtol=1e-5, atol=0)
    wanted, found = (tiny.gradients(karma, output.loss) for output in (theirs, ours))
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        scale = float(wanted[name].abs().max())
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-5 * scale + 1e-7)


@pytest.mark.parametrize("changes", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize(("layout", "query_mode"), tiny.VARIANTS)
def test_every_layout_is_the_straightforward_step(
    layout: str, query_mode: str, changes: dict[str, Any]
) -> None:
    batch = tiny.batch(tiny.sequences(*ROWS), **changes)
    _assert_same(tiny.model(layout, query_mode), batch, ObjectiveConfig())


@pytest.mark.parametrize(
    "changes",
    [
        {"recon_cond": "fig1"},
        {"task1_see_readout": False},
        {"recon_decoder": "separate", "share_projector": False},
        {"recon_decoder": "light:1", "recon_detach_h": True},
        {"pool": "emb_token", "instruction": "red mug"},
        {"pool": "mean", "score": "cos_learned"},
        {"lm_head": torch.randn(400, 32, generator=torch.Generator().manual_seed(3))},
    ],
    ids=lambda changes: "-".join(changes),
)
@pytest.mark.parametrize("layout", ["interleaved", "query_last", "items_only"])
def test_every_variant_of_the_model_is_the_straightforward_step(
    layout: str, changes: dict[str, Any]
) -> None:
    if "lm_head" in changes:
        size = len(tiny.tokenizer().get_vocab())  # type: ignore[attr-defined]
        changes = {"lm_head": changes["lm_head"][:size]}
    _assert_same(
        tiny.model(layout, **changes), tiny.batch(tiny.sequences(*ROWS)), ObjectiveConfig()
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"generation": 0.0},
        {"reconstruction": 0.0, "lambda_dec": 0.3},
        {"ce_reduction": "sum"},
        {"act_positions": "last", "action_loss": "infonce"},
        {"act_reduction": "paper_sum", "hard_weight": 0.3, "batch_weight": 2.0},
    ],
)
def test_every_objective_is_the_straightforward_step(changes: dict[str, Any]) -> None:
    objective = replace(ObjectiveConfig(), **changes)
    _assert_same(tiny.model(), tiny.batch(tiny.sequences(*ROWS)), objective)


def test_random_shops_are_the_straightforward_step() -> None:
    for seed in range(3):
        batch = tiny.batch(tiny.shop(6, seed), seed, num_decoded=2, drop_query=0.3)
        _assert_same(tiny.model(seed=seed), batch, ObjectiveConfig())
