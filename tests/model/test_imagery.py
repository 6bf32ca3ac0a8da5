"""Image queries see what method 1.9 lets them see, and every switch does what it says."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from karma_ray.data.batch import Batch
from karma_ray.errors import InputError
from karma_ray.model.backbone import run_body
from karma_ray.model.decodability import run_branches, text_branch
from karma_ray.model.denoiser import DenoiserConfig
from karma_ray.model.imagery import Imagery, ImageTargets
from karma_ray.model.karma import KarmaModel
from karma_ray.objectives.denoising import DENOISINGS, FlowMatching
from karma_ray.objectives.losses import ObjectiveConfig
from karma_ray.training.step import JointStep, decoded_interest
from tests import pictures, tiny

layouts = pytest.mark.parametrize(
    ("layout", "query_mode"),
    [("interleaved", "embed_pool"), ("query_last", "tokens"), ("items_only", "none")],
)


def _items(karma: KarmaModel, batch: Batch) -> Tensor:
    return karma.interest.encode_items(batch.item_tokens, batch.item_lengths).detach()


def _some_h(batch: Batch) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch.decode_step.numel(), 32, generator=generator)


def _branch_states(karma: KarmaModel, batch: Batch, items: Tensor) -> Tensor:
    """Task 1's states at the image slots [R, K, D], text and all as in training."""
    assert karma.imagery is not None
    body, prefix = karma.interest.user_decoder.body, karma.interest.prefix(batch, items)
    text = text_branch(body, karma.targets(batch))
    branch = karma.imagery.branch(ImageTargets.of(batch).mask, text)
    return run_branches(body, prefix, batch, [text, branch], see_readout=True)[1][1]


# --- Task 1 ----------------------------------------------------------------------------------


@layouts
@pytest.mark.parametrize("with_text", [False, True])
def test_image_queries_see_the_text_branch_only_when_told(
    layout: str, query_mode: str, with_text: bool
) -> None:
    karma = pictures.model(layout, query_mode, imagery={"img_sees_text": with_text})
    batch = pictures.batch()
    items = _items(karma, batch)
    other = replace(batch, item_tokens=batch.item_tokens.roll(1, 0))  # lengths stay
    images = ImageTargets.of(batch).mask
    with torch.no_grad():
        states = [_branch_states(karma, given, items)[images] for given in (batch, other)]
        losses = [karma.forward_with_images(given, items, text=True)[2] for given in (batch, other)]
    assert torch.equal(*states) == (not with_text)
    assert torch.equal(*losses) == (not with_text)


@layouts
def test_neither_h_nor_text_sees_an_image_branch(layout: str, query_mode: str) -> None:
    karma, batch = pictures.model(layout, query_mode), pictures.batch()
    items = _items(karma, batch)
    with torch.no_grad():
        h, text, _ = karma.forward_with_images(batch, items, text=True)
        alone, nothing, losses = karma.forward_with_images(batch, items, text=False)
        plain_h, plain_text = karma.forward_with_text(batch, items)
    assert nothing is None and text is not None
    said = plain_text.targets.mask
    torch.testing.assert_close(text.states[said], plain_text.states[said], atol=1e-5, rtol=1e-5)
    for found in (h, alone):
        torch.testing.assert_close(found[batch.step_mask], plain_h[batch.step_mask],
                                   atol=1e-5, rtol=1e-5)  # fmt: skip
    both = karma.forward_with_images(batch, items, text=True)[2]
    torch.testing.assert_close(losses, both, atol=1e-5, rtol=1e-5)


@layouts
def test_an_image_branch_sees_no_item_of_its_page_or_later(layout: str, query_mode: str) -> None:
    karma, batch = pictures.model(layout, query_mode), pictures.batch()
    items = _items(karma, batch).requires_grad_()
    states = _branch_states(karma, batch, items).view(*batch.decode_step.shape, 5, 32)
    exists = batch.visual_mask & batch.decode_mask
    assert 0 < int(exists.sum()) < int(batch.decode_mask.sum())
    for b, m in exists.nonzero().tolist():
        (gradient,) = torch.autograd.grad(states[b, m].pow(3).sum(), items, retain_graph=True)
        reached = set(gradient.abs().sum(1).nonzero().flatten().tolist())
        steps = batch.item_mask[b] & (batch.group[b] < batch.group[b, batch.decode_step[b, m]])
        assert reached == set(batch.item_index[b, steps].tolist())


def test_an_image_branch_continues_its_prefix_and_is_bidirectional() -> None:
    """The same as one pass of the prefix up to p_k with the block behind it, nothing else."""
    karma = pictures.model()
    batch = pictures.batch(tiny.sequences(tiny.window(["i3", "i15", "i8", "i6"])))
    items = _items(karma, batch)
    assert karma.imagery is not None
    body, prefix = karma.interest.user_decoder.body, karma.interest.prefix(batch, items)
    with torch.no_grad():
        states = _branch_states(karma, batch, items)
        for k in range(4):
            seen = prefix.embeddings[0, : int(prefix.layout.readout[0, k]) + 1]
            soft = torch.cat([seen, karma.imagery.block(1)[0]])[None]
            visible = torch.ones(soft.shape[1], soft.shape[1], dtype=torch.bool).tril()
            visible[len(seen) :] = True
            expected = run_body(body, soft, visible[None])[0, len(seen) :]
            torch.testing.assert_close(states[k], expected, atol=1e-5, rtol=1e-5)


def test_a_branch_behind_another_counts_its_places_from_there() -> None:
    """Under img_sees_text the image stands behind the text's real words, not over them."""
    karma = pictures.model(imagery={"img_sees_text": True})
    batch = pictures.batch(tiny.sequences(tiny.window(["i3", "i15"])))
    assert karma.imagery is not None
    items, body = _items(karma, batch), karma.interest.user_decoder.body
    prefix, targets = karma.interest.prefix(batch, items), karma.targets(batch)
    words = text_branch(body, targets)
    with torch.no_grad():
        states = _branch_states(karma, batch, items)
        for k in range(2):
            seen = prefix.embeddings[0, : int(prefix.layout.readout[0, k]) + 1]
            said = words.embeddings[k][targets.mask[k]]
            before = len(seen) + len(said)
            soft = torch.cat([seen, said, karma.imagery.block(1)[0]])[None]
            visible = torch.ones(soft.shape[1], soft.shape[1], dtype=torch.bool).tril()
            visible[before:] = True
            expected = run_body(body, soft, visible[None])[0, before:]
            torch.testing.assert_close(states[k], expected, atol=1e-5, rtol=1e-5)


# --- Task 2 ----------------------------------------------------------------------------------


def test_task_2_is_p_of_h_and_the_block_and_nothing_else() -> None:
    karma, batch = pictures.model(), pictures.batch()
    assert karma.imagery is not None
    h, user = _some_h(batch), karma.interest.user_decoder
    images = ImageTargets.of(batch)
    visible = torch.ones(6, 6, dtype=torch.bool)
    visible[0, 1:] = False
    with torch.no_grad():
        soft = user.projector(h)
        states = karma.imagery.vector_states(user.body, soft, images.mask)
        for row in images.mask.nonzero().flatten().tolist():
            inputs = torch.cat([soft[row : row + 1], karma.imagery.block(1)[0]])[None]
            expected = run_body(user.body, inputs, visible[None])[0, 1:]
            torch.testing.assert_close(states[row], expected, atol=1e-5, rtol=1e-5)


def test_with_h_fixed_neither_history_nor_text_changes_task_2() -> None:
    karma, batch = pictures.model(), pictures.batch()
    other = replace(
        batch, item_tokens=batch.item_tokens.roll(1, 0), query_index=batch.query_index * 0
    )
    h = _some_h(batch)
    assert torch.equal(karma.interest_image_losses(batch, h), karma.interest_image_losses(other, h))


def test_h_reaches_its_own_image_only() -> None:
    karma, batch = pictures.model(), pictures.batch()
    h = _some_h(batch).requires_grad_()
    losses = karma.interest_image_losses(batch, h)
    for row in ImageTargets.of(batch).mask.nonzero().flatten().tolist()[:3]:
        (gradient,) = torch.autograd.grad(losses[row], h, retain_graph=True)
        assert gradient.abs().sum(1).nonzero().flatten().tolist() == [row]


def _moves(found: dict[str, Tensor], part: str) -> bool:
    return any(name.startswith(part) and bool(g.any()) for name, g in found.items())


@pytest.mark.parametrize("recon_decoder", ["shared", "separate"])
def test_a_detached_h_cuts_the_image_gradient_of_task_2_exactly(recon_decoder: str) -> None:
    batch, found = pictures.batch(), {}
    for cut in (False, True):
        karma = pictures.model(recon_decoder=recon_decoder, recon_detach_h=cut)
        items = karma.interest.encode_items(batch.item_tokens, batch.item_lengths)
        h = decoded_interest(batch, karma.interest.interest(batch, items))
        found[cut] = tiny.gradients(karma, karma.interest_image_losses(batch, h).sum())
    for part in ("interest.item_encoder", "interest.user_decoder.readout"):
        assert _moves(found[False], part) and not _moves(found[True], part)
    for part in ("imagery.queries", "imagery.begin", "imagery.end", "imagery.head",
                 "interest.user_decoder.projector"):  # fmt: skip
        assert _moves(found[True], part)
    assert _moves(found[True], "interest.user_decoder.body") == (recon_decoder == "shared")
    assert _moves(found[True], "decodability.body") == (recon_decoder == "separate")


# --- switches --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cond", "tasks"), [("both", {"1", "2"}), ("task1", {"1"}), ("task2", {"2"})]
)
def test_img_cond_says_where_image_queries_stand(cond: str, tasks: set[str]) -> None:
    """Task 1's do not pass through W_h, Task 2's through nothing else."""
    karma = pictures.model(imagery={"img_cond": cond}, recon_decoder="separate")
    batch = pictures.batch()
    objective = ObjectiveConfig(generation=0.0, reconstruction=0.0, lambda_img=1.0)
    output = JointStep(objective)(karma, batch)
    logs = {name: float(value) for name, value in output.logs.items()}
    assert {name[-1] for name in logs if name.startswith("image/task")} == tasks
    parts = [logs[f"image/task{number}"] for number in sorted(tasks)]
    assert logs["loss/image"] == pytest.approx(sum(parts) / len(parts))
    assert not [name for name in logs if name in ("loss/generation", "loss/reconstruction")]
    found = tiny.gradients(karma, output.loss)
    assert _moves(found, "decodability.body") == ("2" in tasks)


@pytest.mark.parametrize("head", ["fm", "ddpm_eps", "ddpm_v", "ddpm_x0", "edm", "mse"])
def test_img_head_is_the_named_denoising_of_the_same_states(head: str) -> None:
    karma, plain = pictures.model(imagery={"img_head": head}), pictures.model()
    assert karma.imagery is not None and plain.imagery is not None
    assert karma.imagery.denoising == DENOISINGS[head]
    assert torch.equal(karma.imagery.queries, plain.imagery.queries)
    batch = pictures.batch()
    h = _some_h(batch)
    same = torch.equal(karma.interest_image_losses(batch, h), plain.interest_image_losses(batch, h))
    assert same == (head == "fm")


@pytest.mark.parametrize(
    "fields", [{"times": "logit_normal"}, {"shift": 3.0}], ids=["times", "shift"]
)
def test_flow_matching_learns_at_the_times_that_are_set(fields: dict[str, Any]) -> None:
    """With the same weights and draws its losses are others."""
    batch = pictures.batch()

    def found(denoiser: DenoiserConfig) -> tuple[Imagery, Tensor]:
        karma = pictures.model(imagery={"denoiser": denoiser})
        assert karma.imagery is not None
        torch.nn.init.constant_(karma.imagery.head.output.weight, 0.1)  # 0: answers 0 at any time
        return karma.imagery, karma.interest_image_losses(batch, _some_h(batch))

    (plain, before), (changed, after) = (
        found(config) for config in (DenoiserConfig(), DenoiserConfig(**fields))
    )
    pairs = zip(plain.parameters(), changed.parameters(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)
    assert not torch.equal(before, after)
    assert changed.denoising == FlowMatching(**fields)
    (name,) = fields
    with pytest.raises(InputError, match=rf"imagery\.denoiser\.{name}: .*'edm'"):
        pictures.model(imagery={"img_head": "edm", "denoiser": DenoiserConfig(**fields)})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"shift": -1.0},
            "model.imagery.denoiser.shift: -1.0 should be greater than or equal to 0",
        ),
        ({"shift": float("inf")}, "model.imagery.denoiser.shift: inf"),
        (
            {"num_layers": 0},
            "model.imagery.denoiser.num_layers: 0 should be greater than or equal to 1",
        ),
        ({"width": -4}, "model.imagery.denoiser.width: -4"),
    ],
)
def test_a_network_that_cannot_be_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=re.escape(words)):
        pictures.model(imagery={"denoiser": DenoiserConfig(**fields)})


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_a_connector_mixes_the_tokens_of_an_image_and_no_others(layers: int) -> None:
    karma = pictures.model(imagery={"img_connector": layers})
    assert karma.imagery is not None and len(karma.imagery.connector) == layers
    states = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    told = karma.imagery.conditions(states)
    assert told.shape == (2, 3, 32)
    (gradient,) = torch.autograd.grad(told[0, 0].pow(3).sum(), states)
    reached = gradient.abs().sum(-1).nonzero().tolist()
    assert reached == ([[0, 1]] if layers == 0 else [[0, 1], [0, 2], [0, 3]])


# --- targets and draws -----------------------------------------------------------------------


def test_images_are_those_of_the_decoded_items() -> None:
    batch, table = pictures.batch(num_decoded=2), pictures.features()
    rows = batch.item_rows[batch.item_index.gather(1, batch.decode_step)]
    for b, m in batch.decode_mask.nonzero().tolist():
        row = int(rows[b, m])
        assert bool(batch.visual_mask[b, m]) == (row not in pictures.MISSING)
        if row not in pictures.MISSING:
            expected = torch.from_numpy(table.values[row])
            assert torch.equal(batch.visual_feature[b, m], expected)
    absent = ~(batch.visual_mask & batch.decode_mask)
    assert absent.any() and not batch.visual_feature[absent].any()


def test_an_item_without_an_image_has_no_loss_and_no_gradient() -> None:
    karma, batch = pictures.model(), pictures.batch()
    h = _some_h(batch).requires_grad_()
    losses = karma.interest_image_losses(batch, h)
    mask = ImageTargets.of(batch).mask
    assert not losses[~mask].any() and losses[mask].all()
    (gradient,) = torch.autograd.grad(losses.sum(), h)
    assert not gradient[~mask].any() and gradient[mask].any(1).all()


def test_noise_is_drawn_by_the_rows_key() -> None:
    karma, batch = pictures.model(), pictures.batch()
    h = _some_h(batch)
    whole = karma.interest_image_losses(batch, h)
    again = karma.interest_image_losses(batch, h)
    other = karma.interest_image_losses(replace(batch, row_key=batch.row_key + 1), h)
    assert torch.equal(whole, again)
    mask = ImageTargets.of(batch).mask
    assert (whole != other)[mask].all()
    flipped = {
        name: getattr(batch, name).flip(0)
        for name in ("row_key", "decode_step", "decode_mask", "visual_feature", "visual_mask")
    }
    backward = h.view(*batch.decode_step.shape, -1).flip(0).flatten(0, 1)
    found = karma.interest_image_losses(replace(batch, **flipped), backward)
    found = found.view(batch.decode_step.shape).flip(0).flatten()
    torch.testing.assert_close(found, whole, atol=1e-5, rtol=1e-5)


def test_what_serves_is_the_same_with_and_without_a_visual_term() -> None:
    plain, karma = tiny.model(), pictures.model()
    assert karma.interest.state_dict().keys() == plain.interest.state_dict().keys()
    for name, value in karma.interest.state_dict().items():
        assert torch.equal(value, plain.interest.state_dict()[name])
    extra = set(karma.state_dict()) - set(plain.state_dict())
    assert extra and all(name.startswith("imagery.") for name in extra)
