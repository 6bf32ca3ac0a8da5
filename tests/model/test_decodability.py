"""Task 1 sees what its read-out sees, Task 2 sees h and nothing else (method 1.7 and 1.8)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from karma_ray import recipes
from karma_ray.data.collate import Batch
from karma_ray.data.prompts import SpecialIds
from karma_ray.errors import InputError
from karma_ray.model.backbone import run_body, token_embeddings
from karma_ray.model.decodability import (
    TextTargets,
    history_to_text,
    shuffled_text,
    text_targets,
)
from karma_ray.model.karma import Decoded, KarmaModel
from karma_ray.objectives.losses import ObjectiveConfig
from karma_ray.training.step import JointStep, decoded_interest, decoded_losses
from tests import tiny
from tests.model.conftest import Build

layouts = pytest.mark.parametrize(
    ("layout", "query_mode"),
    [("interleaved", "embed_pool"), ("query_last", "tokens"), ("items_only", "none")],
)


def _items(karma: KarmaModel, batch: Batch) -> Tensor:
    return karma.interest.encode_items(batch.item_tokens, batch.item_lengths).detach()


def _losses(task: Decoded, batch: Batch) -> Tensor:
    return decoded_losses(task, "token_mean")[batch.decode_mask.flatten()]


def _task2(karma: KarmaModel, batch: Batch, h: Tensor) -> Tensor:
    return _losses(karma.decode_interest(batch, h), batch)


def _some_h(batch: Batch, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch.decode_step.numel(), 32, generator=generator)


# --- targets ---------------------------------------------------------------------------------


def test_text_is_framed_by_start_and_end() -> None:
    special = SpecialIds(end_of_text=0, text_start=1, text_end=2)
    tokens = torch.tensor([[7, 8, 9, 0], [7, 0, 0, 0], [0, 0, 0, 0]])
    found = text_targets(tokens, torch.tensor([4, 2, 1]), special, max_tokens=8)
    assert found.inputs.tolist() == [[1, 7, 8, 9], [1, 7, 0, 0], [1, 0, 0, 0]]
    assert found.labels[0].tolist() == [7, 8, 9, 2]
    assert found.labels[1, :2].tolist() == [7, 2]
    assert found.labels[2, :1].tolist() == [2]
    assert found.mask.sum(1).tolist() == [4, 2, 1]


def test_a_long_text_is_decoded_up_to_its_limit() -> None:
    special = SpecialIds(end_of_text=0, text_start=1, text_end=2)
    found = text_targets(torch.tensor([[7, 8, 9, 0]]), torch.tensor([4]), special, max_tokens=2)
    assert found.inputs.tolist() == [[1, 7, 8]]
    assert found.labels.tolist() == [[7, 8, 2]]


# --- Task 1 ----------------------------------------------------------------------------------


@layouts
def test_the_stripped_graph_gives_the_h_of_training(
    build: Build, layout: str, query_mode: str
) -> None:
    """Branches of text change nothing in the prefix (method 1.11)."""
    karma, batch = build(layout, query_mode), tiny.batch()
    items = _items(karma, batch)
    with torch.no_grad():
        h, _ = karma.forward_with_text(batch, items)
        stripped = karma.interest.interest(batch, items)
    exists = batch.step_mask
    torch.testing.assert_close(h[exists], stripped[exists], atol=1e-6, rtol=1e-6)


@layouts
@pytest.mark.parametrize("see_readout", [True, False])
def test_the_text_of_a_step_sees_no_item_of_its_page_or_later(
    build: Build, layout: str, query_mode: str, see_readout: bool
) -> None:
    karma, batch = build(layout, query_mode), tiny.batch()
    items = _items(karma, batch).requires_grad_()
    prefix = karma.interest.prefix(batch, items)
    _, text = history_to_text(
        karma.interest.user_decoder.body, prefix, batch, karma.targets(batch),
        see_readout=see_readout,
    )  # fmt: skip
    text = text.view(*batch.decode_step.shape, *text.shape[1:])
    for b, m in batch.decode_mask.nonzero().tolist():
        (gradient,) = torch.autograd.grad(text[b, m].pow(3).sum(), items, retain_graph=True)
        reached = set(gradient.abs().sum(1).nonzero().flatten().tolist())
        k = batch.decode_step[b, m]
        steps = (batch.item_mask[b] & (batch.group[b] < batch.group[b, k])).nonzero().flatten()
        if layout == "items_only" and not see_readout:
            steps = steps[:-1]  # the read-out *is* the last item
        assert reached == set(batch.item_index[b, steps].tolist())


@layouts
def test_without_the_readout_text_loses_that_slot_and_no_other(
    build: Build, layout: str, query_mode: str
) -> None:
    karma, batch = build(layout, query_mode), tiny.batch()
    prefix = karma.interest.prefix(batch, _items(karma, batch))
    leaf = prefix.embeddings.detach().requires_grad_()
    reached = {}
    for see in (True, False):
        _, text = history_to_text(
            karma.interest.user_decoder.body, replace(prefix, embeddings=leaf), batch,
            karma.targets(batch), see_readout=see,
        )  # fmt: skip
        text = text.view(*batch.decode_step.shape, *text.shape[1:])
        for b, m in batch.decode_mask.nonzero().tolist():
            (gradient,) = torch.autograd.grad(text[b, m].pow(3).sum(), leaf, retain_graph=True)
            found = gradient.abs().sum(-1).nonzero().tolist()
            assert {window for window, _ in found} == {b}
            reached[b, m, see] = {slot for _, slot in found}
    for b, m in batch.decode_mask.nonzero().tolist():
        own = int(prefix.layout.readout[b, batch.decode_step[b, m]])
        with_own, without = reached[b, m, True], reached[b, m, False]
        assert own in with_own and own not in without
        lost = with_own - without - {own}
        assert not lost  # what text still sees stands before p_k and never saw it


@layouts
def test_branches_do_not_see_each_other(build: Build, layout: str, query_mode: str) -> None:
    karma, batch = build(layout, query_mode), tiny.batch(num_decoded=3)
    targets = karma.targets(batch)
    prefix = karma.interest.prefix(batch, _items(karma, batch))
    inputs = targets.inputs.clone()
    inputs[1::3] = inputs[1::3].flip(1)

    def states(targets: TextTargets) -> tuple[Tensor, Tensor]:
        body = karma.interest.user_decoder.body
        with torch.no_grad():
            return history_to_text(body, prefix, batch, targets, see_readout=True)

    (prefix_before, before), (prefix_after, after) = (
        states(targets),
        states(replace(targets, inputs=inputs)),
    )
    assert torch.equal(prefix_before, prefix_after)
    for other in (0, 2):
        assert torch.equal(before[other::3], after[other::3])
    assert not torch.equal(before[1::3], after[1::3])


@layouts
def test_parallel_branches_are_the_branches_one_at_a_time(
    build: Build, layout: str, query_mode: str
) -> None:
    karma, batch = build(layout, query_mode), tiny.batch(num_decoded=3)
    items = _items(karma, batch)
    with torch.no_grad():
        together = decoded_losses(karma.forward_with_text(batch, items)[1], "token_mean")
        for m in range(3):
            one = replace(
                batch, decode_step=batch.decode_step[:, m : m + 1],
                decode_mask=batch.decode_mask[:, m : m + 1],
            )  # fmt: skip
            alone = decoded_losses(karma.forward_with_text(one, items)[1], "token_mean")
            exists = batch.decode_mask[:, m]
            torch.testing.assert_close(together[m::3][exists], alone[exists], atol=1e-5, rtol=1e-5)


def test_a_branch_continues_its_prefix_as_one_plain_causal_pass(build: Build) -> None:
    """So position ids restart at p_k + 1, and labels follow the paper's equation 6."""
    karma = build("interleaved", "embed_pool")
    batch = tiny.batch(tiny.sequences(tiny.window(["i3", "i14", "i8", "i5"])))
    items = _items(karma, batch)
    body = karma.interest.user_decoder.body
    prefix = karma.interest.prefix(batch, items)
    with torch.no_grad():
        _, text = karma.forward_with_text(batch, items)
        for k in range(4):
            seen = prefix.embeddings[0, : int(prefix.layout.readout[0, k]) + 1]
            words = token_embeddings(body)[text.targets.inputs[k]]
            states = run_body(body, torch.cat([seen, words])[None])[0, len(seen) :]
            said = text.targets.mask[k]
            torch.testing.assert_close(text.states[k][said], states[said], atol=1e-5, rtol=1e-5)


# --- Task 2 ----------------------------------------------------------------------------------


@pytest.mark.parametrize("recon_cond", ["eq7", "fig1"])
def test_with_h_fixed_the_history_changes_nothing(recon_cond: str) -> None:
    """The bottleneck is strict: Task 2 has no other door to the behaviour."""
    karma = tiny.model(recon_cond=recon_cond)
    batch = tiny.batch(num_decoded=1)
    target = torch.arange(batch.item_index.shape[1]) == batch.decode_step
    other = replace(batch, item_index=torch.where(target, batch.item_index, 0))
    assert not torch.equal(other.item_index, batch.item_index)
    h = _some_h(batch)
    assert torch.equal(_task2(karma, other, h), _task2(karma, batch, h))


def test_h_reaches_every_word_of_its_own_text_only() -> None:
    karma, batch = tiny.model(), tiny.batch()
    h = _some_h(batch).requires_grad_()
    states = karma.decode_interest(batch, h).states
    for row in (0, 3):
        for position in (0, 2):
            (gradient,) = torch.autograd.grad(
                states[row, position].pow(3).sum(), h, retain_graph=True
            )
            assert gradient.abs().sum(1).nonzero().flatten().tolist() == [row]


def test_eq7_ignores_the_query_and_fig1_uses_it() -> None:
    batch = tiny.batch()
    swapped = replace(batch, query_index=(batch.query_index + 1) % len(batch.query_lengths))
    h = _some_h(batch)
    for recon_cond, equal in (("eq7", True), ("fig1", False)):
        karma = tiny.model(recon_cond=recon_cond)
        losses = [_task2(karma, given, h) for given in (batch, swapped)]
        assert torch.equal(*losses) == equal


def test_fig1_without_a_query_is_eq7() -> None:
    batch = tiny.batch(drop_query=1.0)
    h = _some_h(batch)
    eq7, fig1 = (_task2(tiny.model(recon_cond=cond), batch, h) for cond in ("eq7", "fig1"))
    torch.testing.assert_close(fig1, eq7, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("recon_cond", ["eq7", "fig1"])
def test_task_2_is_one_plain_causal_row_per_target(recon_cond: str) -> None:
    """`[prompt] P(h_t) <s> [query] w_1..w_L`, without any mask."""
    karma, batch = tiny.model(recon_cond=recon_cond), tiny.batch(tiny.shop(2))
    body, h = karma.interest.user_decoder.body, _some_h(batch)
    words = token_embeddings(body)
    with torch.no_grad():
        task = karma.decode_interest(batch, h)
        query_of = batch.query_index.gather(1, batch.decode_step).flatten()
        for row in range(len(h)):
            query = batch.query_tokens[query_of[row], : batch.query_lengths[query_of[row]]]
            query = query if recon_cond == "fig1" else query[:0]
            inputs = task.targets.inputs[row]
            soft = karma.interest.user_decoder.projector(h[row : row + 1])
            parts = [words[karma.decodability.prompt], soft, words[inputs[:1]], words[query]]
            states = run_body(body, torch.cat([*parts, words[inputs[1:]]])[None])[0]
            expected = states[-len(inputs) :]
            said = task.targets.mask[row]
            torch.testing.assert_close(task.states[row][said], expected[said], atol=1e-5, rtol=1e-5)


# --- Task 2's variants -----------------------------------------------------------------------


def _task2_gradients(karma: KarmaModel, batch: Batch) -> dict[str, Tensor]:
    items = karma.interest.encode_items(batch.item_tokens, batch.item_lengths)
    h = decoded_interest(batch, karma.interest.interest(batch, items))
    return tiny.gradients(karma, _task2(karma, batch, h).sum())


def _moves(found: dict[str, Tensor], part: str) -> bool:
    return any(name.startswith(part) and bool(g.any()) for name, g in found.items())


@pytest.mark.parametrize("recon_decoder", ["shared", "separate"])
def test_a_detached_h_leaves_the_encoders_task_2_gradient_exactly_zero(recon_decoder: str) -> None:
    batch = tiny.batch()
    free, null = (
        _task2_gradients(tiny.model(recon_decoder=recon_decoder, recon_detach_h=cut), batch)
        for cut in (False, True)
    )
    for part in ("interest.item_encoder", "interest.user_decoder.readout"):
        assert _moves(free, part) and not _moves(null, part)
    assert _moves(null, "interest.user_decoder.projector")
    assert _moves(null, "interest.user_decoder.body") == (recon_decoder == "shared")


def test_a_null_with_a_decoder_and_a_projector_of_its_own_moves_nothing_that_serves() -> None:
    null = recipes.build("null_detached_separate").model.decodability
    assert null.recon_detach_h and null.recon_decoder == "separate" and not null.share_projector
    karma = tiny.model(recon_detach_h=True, recon_decoder="separate", share_projector=False)
    found = _task2_gradients(karma, tiny.batch())
    assert _moves(found, "decodability.body") and _moves(found, "decodability.projector")
    assert not _moves(found, "interest")


def test_a_shared_decoder_has_no_weights_of_its_own() -> None:
    karma = tiny.model()
    assert not list(karma.decodability.parameters())
    assert _moves(_task2_gradients(karma, tiny.batch()), "interest.user_decoder.body")


def test_a_frozen_decoder_gets_no_gradient_and_h_comes_to_it() -> None:
    found = _task2_gradients(tiny.model(recon_decoder="frozen"), tiny.batch())
    assert not [name for name in found if name.startswith("decodability")]
    assert _moves(found, "interest.item_encoder") and _moves(found, "interest.user_decoder.readout")


@pytest.mark.parametrize("recon_decoder", ["separate", "frozen", "light:1"])
def test_a_private_decoder_leaves_the_trunk_to_h(recon_decoder: str) -> None:
    """With h held fixed, Task 2 moves nothing of the shared body."""
    karma, batch = tiny.model(recon_decoder=recon_decoder), tiny.batch()
    found = tiny.gradients(karma, _task2(karma, batch, _some_h(batch)).sum())
    assert not _moves(found, "interest.user_decoder.body")
    assert _moves(found, "decodability.body") == (recon_decoder != "frozen")


def test_a_separate_decoder_starts_as_a_copy_and_then_goes_its_way() -> None:
    karma, batch = tiny.model(recon_decoder="separate"), tiny.batch()
    h = _some_h(batch)
    torch.testing.assert_close(_task2(karma, batch, h), _task2(tiny.model(), batch, h))
    before = karma.interest.user_decoder.body.layers[0].mlp.up_proj.weight.clone()
    tiny.train(karma, lambda: _task2(karma, batch, h).mean(), steps=2)
    shared, own = karma.interest.user_decoder.body, karma.decodability.body
    assert torch.equal(shared.layers[0].mlp.up_proj.weight, before)
    assert not torch.equal(own.layers[0].mlp.up_proj.weight, before)


def test_a_light_decoder_has_the_layers_it_says() -> None:
    karma = tiny.model(recon_decoder="light:1")
    assert len(karma.decodability.body.layers) == 1
    assert len(karma.interest.user_decoder.body.layers) == 2


@pytest.mark.parametrize(
    "value", ["lite", "light", "light:", "light:0", "light:3", "light:x", "separate:2", "Shared"]
)
def test_an_unknown_decoder_is_an_input_error(value: str) -> None:
    with pytest.raises(InputError, match="choices") as caught:
        tiny.model(recon_decoder=value)
    assert caught.value.field == "model.decodability.recon_decoder"


def test_a_projector_of_its_own_is_a_copy_that_task_2_trains_instead() -> None:
    karma, batch = tiny.model(share_projector=False), tiny.batch()
    h = _some_h(batch)
    torch.testing.assert_close(_task2(karma, batch, h), _task2(tiny.model(), batch, h))
    for shared in (True, False):
        karma = tiny.model(share_projector=shared)
        found = tiny.gradients(karma, _task2(karma, batch, h).sum())
        assert _moves(found, "interest.user_decoder.projector") == shared
        assert _moves(found, "decodability.projector") == (not shared)


def test_token_dropout_changes_inputs_and_never_labels() -> None:
    batch = tiny.batch()
    h = _some_h(batch)
    plain = tiny.model().decode_interest(batch, h)
    karma = tiny.model(recon_token_dropout=0.5)
    first, again, other = (
        karma.decode_interest(replace(batch, row_key=batch.row_key + shift), h)
        for shift in (0, 0, 1)
    )
    assert torch.equal(first.states, again.states)
    assert not torch.equal(first.states, other.states)
    assert torch.equal(first.targets.labels, plain.targets.labels)
    assert torch.equal(first.targets.mask, plain.targets.mask)
    # `<s>` is never dropped, so the first word is predicted as without dropout
    torch.testing.assert_close(first.states[:, 0], plain.states[:, 0])


def test_measurements_are_without_token_dropout() -> None:
    batch = tiny.batch()
    h = _some_h(batch)
    karma = tiny.model(recon_token_dropout=0.5)
    found = karma.decode_interest(batch, h, dropout=False).states
    assert torch.equal(found, tiny.model().decode_interest(batch, h).states)
    step = JointStep(ObjectiveConfig())
    assert step.probe(karma, batch) == step.probe(karma, batch)


def test_full_token_dropout_leaves_only_h() -> None:
    karma, batch = tiny.model(recon_token_dropout=1.0), tiny.batch()
    task = karma.decode_interest(batch, _some_h(batch)[:1].expand(batch.decode_step.numel(), -1))
    said = task.targets.mask
    same = task.states[:1].expand_as(task.states)
    torch.testing.assert_close(task.states[said], same[said])


# --- strangers' texts ------------------------------------------------------------------------


def _decoded_items(batch: Batch) -> Tensor:
    return batch.item_rows[batch.item_index.gather(1, batch.decode_step).flatten()]


def test_shuffled_texts_are_other_items_texts_and_still_reach_h() -> None:
    karma, batch = tiny.model(recon_text="shuffled"), tiny.batch()
    h = _some_h(batch).requires_grad_()
    task = karma.decode_interest(batch, h)
    own, rows = karma.targets(batch), batch.decode_mask.flatten()
    mine = [label[mask].tolist() for label, mask in zip(own.labels, own.mask, strict=True)]
    found = [
        label[mask].tolist()
        for label, mask in zip(task.targets.labels, task.targets.mask, strict=True)
    ]
    assert not any(a == b for a, b, real in zip(found, mine, rows, strict=True) if real)
    # the same texts are decoded, so the same tokens are computed
    assert sorted(found) == sorted(mine)
    _losses(task, batch).sum().backward()
    assert h.grad is not None and bool((h.grad[rows].norm(dim=1) > 0).all())


def test_every_batch_shuffles_anew_and_measurements_do_not() -> None:
    karma, batch = tiny.model(recon_text="shuffled"), tiny.batch()
    h = _some_h(batch)
    first, again, other = (
        karma.decode_interest(replace(batch, row_key=batch.row_key + shift), h).targets.labels
        for shift in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    measured = karma.decode_interest(batch, h, dropout=False).targets
    assert torch.equal(measured.labels, karma.targets(batch).labels)


def test_no_position_decodes_its_own_item_however_often_it_stands_there() -> None:
    items = torch.tensor([7, 7, 7, 3, 4, 5, 9, 7])
    labels = items[:, None].clone()
    mask = torch.ones(8, 1, dtype=torch.bool)
    mask[6] = False
    for key in range(20):
        found = shuffled_text(TextTargets(labels, labels, mask), items, key)
        said = found.mask[:, 0]
        assert not bool((found.labels[:, 0] == items)[said].any())
        assert not bool(said[6])
    # 4 of 7 rows hold one item: one of them at least has nobody else's text to take
    assert int(said.sum()) == 6
