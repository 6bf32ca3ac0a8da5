"""One step of each stage: the losses are their formulas, and gradients go where they should."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from karma_ray.data.collate import Batch
from karma_ray.model.backbone import build_tiny, run_body, token_embeddings
from karma_ray.model.karma import Decoded, KarmaModel
from karma_ray.objectives.losses import ObjectiveConfig
from karma_ray.retrieval.encode import encode_catalog
from karma_ray.training.action_term import Pool, action_term, trained_steps
from karma_ray.training.item_table import share_items
from karma_ray.training.language import PretrainStep
from karma_ray.training.step import (
    JointStep,
    decoded_interest,
    decoded_losses,
)
from karma_ray.training.step_state import AT_THE_END, StepState
from karma_ray.training.warmup_step import TokenBatch, WarmupStep
from tests import tiny

ACTION_ONLY = ObjectiveConfig(generation=0.0, reconstruction=0.0)


def _texts(count: int = 16) -> TokenBatch:
    tokens, lengths = tiny.item_tokens()
    return TokenBatch(
        torch.from_numpy(tokens[:count].astype(np.int64)), torch.from_numpy(lengths[:count])
    )


def _vectors(karma: KarmaModel, batch: Batch) -> tuple[Tensor, Tensor]:
    items = karma.interest.encode_items(batch.item_tokens, batch.item_lengths)
    return karma.interest.interest(batch, items), items


def _assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


# --- learning --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "query_mode", "recon_decoder", "recon_cond"),
    [
        ("interleaved", "embed_pool", "shared", "eq7"),
        ("query_last", "tokens", "separate", "fig1"),
        ("query_last", "encoder", "light:1", "fig1"),
        ("items_only", "none", "frozen", "eq7"),
    ],
)
def test_thirty_steps_lower_every_term(
    layout: str, query_mode: str, recon_decoder: str, recon_cond: str
) -> None:
    karma = tiny.model(layout, query_mode, recon_decoder=recon_decoder, recon_cond=recon_cond)
    batch, step = tiny.batch(num_decoded=2), JointStep(ObjectiveConfig())
    before = step(karma, batch).logs
    tiny.train(karma, lambda: step(karma, batch).loss, steps=30)
    after = step(karma, batch).logs
    assert after["loss/action"] < 0.5 * before["loss/action"]
    assert after["loss/generation"] < 0.8 * before["loss/generation"]
    share = 1.0 if recon_decoder == "frozen" else 0.8
    assert after["loss/reconstruction"] < share * before["loss/reconstruction"]


@pytest.mark.parametrize("action", ["pairwise", "infonce", "bce", "mse"])
@pytest.mark.parametrize("score", ["rms_dot", "dot", "cos_learned"])
def test_every_action_loss_falls_under_every_score(action: str, score: str) -> None:
    karma, batch = tiny.model(score=score), tiny.batch()
    step = JointStep(replace(ACTION_ONLY, action_loss=action))  # type: ignore[arg-type]
    losses = tiny.train(karma, lambda: step(karma, batch).loss, steps=20)
    assert losses[-1] < 0.9 * losses[0]


def test_after_training_task_2_the_wrong_h_costs_words() -> None:
    """The health check of method 1.8: a decoder that ignores h would have no gap."""
    karma, batch = tiny.model(), tiny.batch(tiny.shop(4), num_decoded=1)
    step = JointStep(ObjectiveConfig(generation=0.0))
    assert abs(step.probe(karma, batch)["decode_gap"]) < 0.1
    tiny.train(karma, lambda: step(karma, batch).loss, steps=100, learning_rate=5e-3)
    probe = step.probe(karma, batch)
    assert probe["decode_gap"] > 0.5
    with torch.no_grad():
        h, _ = _vectors(karma, batch)
        rows = decoded_interest(batch, h)
        exists = batch.decode_mask.flatten()
        own = decoded_losses(karma.decode_interest(batch, rows), "token_mean")[exists]
    assert probe["decode_ce"] == pytest.approx(own.mean().item(), rel=1e-4)


@torch.no_grad()
def test_the_gap_compares_with_another_users_interest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not with the same user's at another decoded step."""
    karma, batch = tiny.model(), tiny.batch(tiny.shop(4), num_decoded=2)
    asked: list[Tensor] = []
    decode = karma.decode_interest

    def noted(batch: Batch, interest: Tensor, **options: bool) -> Decoded:
        asked.append(interest)
        return decode(batch, interest, **options)

    monkeypatch.setattr(karma, "decode_interest", noted)
    JointStep(ObjectiveConfig()).probe(karma, batch)
    own, other = asked
    window = torch.arange(4).repeat_interleave(2)
    exists = batch.decode_mask.flatten()
    source = (other[exists][:, None] == own[exists][None]).all(-1).int().argmax(1)
    assert (window[exists][source] != window[exists]).all()


def _action(
    karma: KarmaModel, batch: Batch, h: Tensor, items: Tensor, objective: ObjectiveConfig
) -> tuple[Tensor, float]:
    """Mean loss, and surviving negatives per trained step."""
    pool = share_items(batch).pool
    term = action_term(
        karma.interest, batch, h, items, Pool(items[pool], batch.item_content[pool]), objective
    )
    count = trained_steps(batch, objective.act_positions).sum()
    return term.loss / count, float(term.negatives.sum() / count)


# --- the action loss -------------------------------------------------------------------------


def _brute_force(karma: KarmaModel, batch: Batch, h: Tensor, items: Tensor) -> tuple[Tensor, float]:
    """Equation 5 with mean_by_type in Python loops, and negatives per step."""
    scores = karma.interest.query_vectors(h) @ karma.interest.index_vectors(items).T  # [B, T, U]
    content = batch.item_content.tolist()
    pool: dict[int, int] = {}  # content -> a clicked item of it
    for index in batch.item_index[batch.loss_mask].tolist():
        pool.setdefault(content[index], index)
    losses, survivors = [], 0
    for b, k in batch.loss_mask.nonzero().tolist():
        clicked = {content[i] for i in batch.item_index[b][batch.item_mask[b]].tolist()}
        exposed = batch.hard_index[b, k][batch.hard_mask[b, k]].tolist()
        hard = [j for j in exposed if content[j] not in clicked]
        others = [j for c, j in pool.items() if c not in clicked]
        survivors += len(hard) + len(others)
        gaps = scores[b, k] - scores[b, k, batch.item_index[b, k]]
        parts = [functional.softplus(gaps[js]).mean() for js in (hard, others) if js]
        losses.append(torch.stack(parts).sum())
    return torch.stack(losses).mean(), survivors / len(losses)


@pytest.mark.parametrize("score", ["rms_dot", "dot", "cos_learned"])
def test_the_action_loss_and_its_gradients_are_equation_5_on_the_served_scores(score: str) -> None:
    karma = tiny.model(score=score)
    crossing = tiny.sequences(  # users share clicks, and `copy` has the text of i0
        tiny.window(["i0", "i1", "i2"], [0, 0, 1], hard=[["i9", "i1"], ["i8"], []], user="a"),
        tiny.window(["copy", "i4", "i1"], hard=[["i0"], ["i7", "i6"], ["i9"]], user="b"),
        tiny.window(["i5", "i6", "i7"], loss=[False, False, True], user="c"),
    )
    for table in (tiny.shop(), crossing):
        batch = tiny.batch(table)
        leaves = [vectors.detach().requires_grad_() for vectors in _vectors(karma, batch)]
        loss, surviving = _action(karma, batch, *leaves, ACTION_ONLY)
        expected, survivors = _brute_force(karma, batch, *leaves)
        torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-4)
        assert surviving == pytest.approx(survivors)
        found, wanted = (torch.autograd.grad(value, leaves) for value in (loss, expected))
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_parallel_embeddings_keep_their_negatives() -> None:
    """Frozen content decides: a mask on live cosines would delete them all (method 1.5)."""
    karma, batch = tiny.model(), tiny.batch()
    h, items = _vectors(karma, batch)
    parallel = items[:1].expand_as(items)
    apart, together = (_action(karma, batch, h, e, ACTION_ONLY)[1] for e in (items, parallel))
    assert apart == together > 10


def test_constant_embeddings_cost_the_log_of_two_per_type() -> None:
    karma, batch = tiny.model(), tiny.batch()
    h, items = _vectors(karma, batch)
    loss, _ = _action(karma, batch, h, items[:1].expand_as(items), ACTION_ONLY)
    assert loss.item() == pytest.approx(2 * np.log(2), rel=1e-4)


def test_the_last_position_only_trains_one_step_per_window() -> None:
    table = tiny.sequences(
        tiny.window(["i0", "i1", "i2", "i3"], loss=[True, True, True, False]),
        tiny.window(["i4", "i5"]),
        tiny.window(["i6", "i7"], loss=[False, False]),
    )
    karma, batch = tiny.model(), tiny.batch(table)
    with torch.no_grad():
        h, items = _vectors(karma, batch)
    for positions, steps in (
        ("last", [(0, 2), (1, 1)]),
        ("all", [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]),
    ):
        leaf = h.clone().requires_grad_()
        objective = replace(ACTION_ONLY, act_positions=positions)  # type: ignore[arg-type]
        loss, _ = _action(karma, batch, leaf, items, objective)
        (gradient,) = torch.autograd.grad(loss, leaf)
        assert [tuple(at) for at in gradient.abs().sum(-1).nonzero().tolist()] == steps


@pytest.mark.parametrize("action", ["pairwise", "infonce", "bce", "mse"])
@pytest.mark.parametrize("num_decoded", [0, 2])
def test_a_batch_without_a_trained_click_costs_nothing(action: str, num_decoded: int) -> None:
    context = tiny.sequences(tiny.window(["i0", "i1"], loss=[False, False]))
    batch = tiny.batch(context, num_decoded=num_decoded)
    objective = ObjectiveConfig(action_loss=action)  # type: ignore[arg-type]
    karma = tiny.model()
    output = JointStep(objective)(karma, batch)
    assert output.loss.item() == 0
    assert not any(gradient.any() for gradient in tiny.gradients(karma, output.loss).values())


def test_a_context_window_beside_others_changes_no_loss() -> None:
    """Sums over a global count: a window without trained clicks adds to neither."""
    karma, step = tiny.model(), JointStep(ObjectiveConfig())
    rows = [tiny.window(["i0", "i1", "i2"], user="a"), tiny.window(["i3", "i4"], user="b")]
    context = tiny.window(["i8", "i9"], loss=[False, False], user="c")
    alone = step(karma, tiny.batch(tiny.sequences(*rows))).loss
    beside = step(karma, tiny.batch(tiny.sequences(*rows, context))).loss
    torch.testing.assert_close(beside, alone)


# --- the total -------------------------------------------------------------------------------


def test_lambda_zero_is_action_only_in_loss_and_gradients() -> None:
    karma, batch = tiny.model(), tiny.batch()
    outputs = [
        JointStep(objective)(karma, batch)
        for objective in (ObjectiveConfig(lambda_dec=0.0), ACTION_ONLY)
    ]
    assert outputs[0].loss.item() == outputs[1].loss.item()
    _assert_equal(*(tiny.gradients(karma, output.loss) for output in outputs))
    for output in outputs:
        assert not {"loss/generation", "loss/reconstruction"} & set(output.logs)


def test_the_action_part_does_not_depend_on_the_decoding_tasks() -> None:
    """Building Task 1's branches leaves the action term as it is."""
    karma, batch = tiny.model(), tiny.batch()
    alone = JointStep(ACTION_ONLY)(karma, batch).loss
    whole = JointStep(ObjectiveConfig())(karma, batch).logs["loss/action"]
    torch.testing.assert_close(whole, alone.detach())


def test_the_total_is_the_weighted_sum_of_the_logged_terms() -> None:
    objective = ObjectiveConfig(lambda_dec=0.5, generation=0.3, reconstruction=2.0)
    output = JointStep(objective)(tiny.model(), tiny.batch())
    terms = {name: float(value) for name, value in output.logs.items() if "loss/" in name}
    expected = terms["loss/action"] + 0.5 * (
        0.3 * terms["loss/generation"] + 2.0 * terms["loss/reconstruction"]
    )
    assert output.loss.item() == pytest.approx(expected, rel=1e-6)


def test_summed_tokens_weigh_long_texts_more_than_token_means() -> None:
    karma, batch = tiny.model(), tiny.batch()
    mean, total = (
        JointStep(ObjectiveConfig(ce_reduction=reduction))(karma, batch).logs["loss/generation"]
        for reduction in ("token_mean", "sum")
    )
    assert total > 2 * mean


def test_the_reduction_of_texts_leaves_the_clicks_alone() -> None:
    karma, batch = tiny.model(), tiny.batch()
    mean, total = (
        JointStep(ObjectiveConfig(ce_reduction=reduction))(karma, batch).logs
        for reduction in ("token_mean", "sum")
    )
    assert mean["loss/action"] == total["loss/action"]
    assert mean["loss/reconstruction"] != total["loss/reconstruction"]


# --- the item encoder's gradient -------------------------------------------------------------


def _encoder(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: g for name, g in found.items() if name.startswith("interest.item_encoder")}


def _gradients(karma: KarmaModel, batch: Batch, encoder_grad: str) -> dict[str, Tensor]:
    step = JointStep(ACTION_ONLY, encoder_grad)
    return _encoder(tiny.gradients(karma, step(karma, batch).loss))


@pytest.mark.parametrize("banked", [False, True])
def test_a_frozen_encoder_gets_no_gradient_at_all(banked: bool) -> None:
    karma, batch = tiny.model(), tiny.batch()
    state = StepState(bank=torch.randn(tiny.catalog().num_items, 32) if banked else None)
    loss = JointStep(ObjectiveConfig(), "frozen")(karma, batch, state).loss
    found = tiny.gradients(karma, loss)
    assert found and not _encoder(found)


@pytest.mark.parametrize("micro_batch_size", [0, 1])
def test_only_the_head_learns_from_features_that_are_computed_once(micro_batch_size: int) -> None:
    karma, batch = tiny.model(), tiny.batch()
    everywhere = JointStep(ObjectiveConfig(), "full")(karma, batch)
    wanted = tiny.gradients(karma, everywhere.loss)
    encoder, head = karma.interest.item_encoder, "interest.item_encoder.output.weight"
    encoder.requires_grad_(False)
    encoder.output.requires_grad_(True)
    tokens, lengths = tiny.item_tokens()
    features = encode_catalog(karma.interest, tokens, lengths, encode=encoder.features)
    state = StepState(bank=torch.from_numpy(features))
    step = JointStep(ObjectiveConfig(), "head", micro_batch_size=micro_batch_size)
    karma.zero_grad(set_to_none=True)
    output = step(karma, batch, state)
    torch.testing.assert_close(output.loss.detach(), everywhere.loss.detach())
    if not micro_batch_size:
        output.loss.backward()  # type: ignore[no-untyped-call]
    found = {n: p.grad for n, p in karma.named_parameters() if p.grad is not None}
    assert {name for name in found if "item_encoder" in name} == {head}
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-5, msg=name)
    delayed = JointStep(ObjectiveConfig(), "head", encoder_delay=0.5)
    assert head not in tiny.gradients(
        karma, delayed(karma, batch, replace(state, progress=0.4)).loss
    )


def test_a_delayed_encoder_is_frozen_before_its_share_of_the_training() -> None:
    karma, batch = tiny.model(), tiny.batch()
    step = JointStep(ObjectiveConfig(), encoder_delay=0.5)
    before, after = StepState(0.49), StepState(0.5)
    assert not _encoder(tiny.gradients(karma, step(karma, batch, before).loss))
    found = _encoder(tiny.gradients(karma, step(karma, batch, after).loss))
    _assert_equal(
        found, _encoder(tiny.gradients(karma, JointStep(ObjectiveConfig())(karma, batch).loss))
    )


def test_targets_only_is_the_gradient_of_targets_and_negatives() -> None:
    karma, batch = tiny.model(), tiny.batch()
    items = karma.interest.encode_items(batch.item_tokens, batch.item_lengths)
    h = karma.interest.interest(batch, items.detach())
    manual = _encoder(tiny.gradients(karma, _action(karma, batch, h, items, ACTION_ONLY)[0]))
    found = _gradients(karma, batch, "targets_only")
    _assert_equal(found, manual)
    full = _gradients(karma, batch, "full")
    assert any(not torch.equal(full[name], found[name]) for name in full)


def test_targets_only_gives_an_item_that_is_only_history_nothing() -> None:
    """The history path is cut: d loss / d e is zero at context items, and not at targets."""
    rows = tiny.sequences(
        tiny.window(["i0", "i1", "i2"], loss=[False, False, True]),
        tiny.window(["i3", "i4"], loss=[False, True]),
    )
    karma, batch = tiny.model(), tiny.batch(rows)
    items = karma.interest.encode_items(batch.item_tokens, batch.item_lengths).detach()
    items.requires_grad_()
    for encoder_grad, reached in (("full", [0, 1, 2, 3, 4]), ("targets_only", [2, 4])):
        step = JointStep(ACTION_ONLY, encoder_grad)
        h = karma.interest.interest(batch, step._history(batch, items, AT_THE_END))
        loss, _ = _action(karma, batch, h, items, ACTION_ONLY)
        (gradient,) = torch.autograd.grad(loss, items)
        assert batch.item_rows[gradient.abs().sum(1) > 0].tolist() == reached


def test_under_targets_only_the_history_is_read_through_the_bank() -> None:
    karma, batch = tiny.model(), tiny.batch()
    step = JointStep(ACTION_ONLY, "targets_only")
    live = step(karma, batch).loss
    tokens, lengths = tiny.item_tokens()
    with torch.no_grad():
        bank = karma.interest.encode_items(
            torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(lengths)
        )
    banked = step(karma, batch, StepState(bank=bank)).loss
    torch.testing.assert_close(banked, live, atol=1e-4, rtol=1e-4)
    flipped = step(karma, batch, StepState(bank=bank.flip(0))).loss
    assert abs(flipped.item() - live.item()) > 1e-2


# --- pretraining and warm-up -----------------------------------------------------------------


def test_pretraining_is_the_mean_cross_entropy_of_the_next_token() -> None:
    body, batch = build_tiny(tiny.BODY, 400, 0), _texts()
    rows = []
    for ids, length in zip(batch.tokens, batch.lengths.tolist(), strict=True):
        logits = run_body(body, token_embeddings(body)[ids[None, : length - 1]])
        logits = logits[0] @ token_embeddings(body).T
        rows.append(functional.cross_entropy(logits, ids[1:length], reduction="none"))
    expected = torch.cat(rows).mean()
    torch.testing.assert_close(PretrainStep()(body, batch).loss, expected, atol=1e-5, rtol=1e-5)


def test_pretraining_and_warm_up_fall() -> None:
    batch = _texts()
    karma = tiny.model()
    body = karma.interest.user_decoder.body
    for loss in (
        lambda: PretrainStep()(body, batch).loss,
        lambda: WarmupStep()(karma, batch).loss,
    ):
        losses = tiny.train(karma, loss, steps=30)
        assert losses[-1] < 0.8 * losses[0]


def test_logs_carry_no_graph() -> None:
    karma, batch = tiny.model(), tiny.batch()
    for output in (JointStep(ObjectiveConfig())(karma, batch), WarmupStep()(karma, _texts())):
        assert output.loss.requires_grad
        assert not [n for n, v in output.logs.items() if isinstance(v, Tensor) and v.requires_grad]
