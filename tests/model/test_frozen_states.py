"""Training the top layers alone: frozen layers, and their states read from a file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from karma_ray.config import Config
from karma_ray.errors import InputError, StorageError
from karma_ray.model import frozen_states, packing
from karma_ray.model.config import ItemEncoderConfig
from karma_ray.model.frozen_layers import lower_parameters
from karma_ray.model.frozen_states import write_states
from karma_ray.model.karma import KarmaModel
from karma_ray.model.lora import is_low_rank, set_trained
from karma_ray.objectives.losses import ObjectiveConfig
from karma_ray.retrieval.encode import encode_catalog
from karma_ray.runs import frozen_outputs
from karma_ray.runs.frozen_outputs import FrozenPortions
from karma_ray.training.step import JointStep
from tests import tiny
from tests.top_layers import DEEP, model, states

TABLES = [
    {},
    {"pool": "mean"},
    {"instruction": "an item:"},
    {"lexical": 8},
    {"lexical": 8, "block": "both"},
]


def step(karma: KarmaModel, **changes: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of a joint step and its gradients."""
    karma.zero_grad(set_to_none=True)
    output = JointStep(ObjectiveConfig(), **changes)(karma, tiny.batch())
    if output.loss.requires_grad:
        output.loss.backward()  # type: ignore[no-untyped-call]
    found = {n: p.grad.clone() for n, p in karma.named_parameters() if p.grad is not None}
    karma.zero_grad(set_to_none=True)
    return output.loss.detach(), found


def fit_known(karma: KarmaModel) -> None:
    """Fit the block of frozen states to the catalogue."""
    sample = [torch.from_numpy(values.astype(np.int64)) for values in tiny.item_tokens()]
    karma.interest.item_encoder.fit_known(*sample, torch.arange(len(sample[0])))


def assert_same(
    ours: tuple[torch.Tensor, dict[str, torch.Tensor]],
    theirs: tuple[torch.Tensor, dict[str, torch.Tensor]],
) -> None:
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=1e-6)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in ours[1].items():
        torch.testing.assert_close(gradient, theirs[1][name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("train_layers", [1, 2])
@pytest.mark.parametrize("encoder", TABLES, ids=str)
def test_loss_and_gradients_are_those_of_running_the_frozen_layers(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    encoder: dict[str, Any],
    train_layers: int,
    packed: bool,
) -> None:
    monkeypatch.setattr(packing, "worth_packing", lambda real: packed)
    karma, batch = model(train_layers, **encoder), tiny.batch()
    if encoder.get("lexical"):
        karma.interest.item_encoder.words.fit(*tiny.item_tokens())
    if encoder.get("block"):
        fit_known(karma)
    table = states(karma, tmp_path / "states.npy")
    live, interest = step(karma), karma.interest
    seen = interest.encode_items(batch.item_tokens, batch.item_lengths, batch.item_rows)
    h = interest.interest(batch, seen)

    interest.item_encoder.states = table
    e = interest.encode_items(batch.item_tokens, batch.item_lengths, batch.item_rows)
    torch.testing.assert_close(e, seen, rtol=1e-5, atol=5e-6)
    torch.testing.assert_close(interest.interest(batch, e), h, rtol=1e-5, atol=5e-6)
    assert_same(step(karma), live)
    assert_same(step(karma, micro_batch_size=2, micro_tokens=40), live)
    lower = [n for n in live[1] if "item_encoder.body.embed" in n or ".body.layers.0." in n]
    assert [n for n in lower if n.startswith("interest.item_encoder")] == []


def test_only_the_layers_on_top_run_in_a_step(tmp_path: Path) -> None:
    karma, batch = model(), tiny.batch()
    encoder = karma.interest.item_encoder
    encoder.states = states(karma, tmp_path / "states.npy")
    ran: list[int] = []
    for number, layer in enumerate(encoder.body.layers):
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
    encoder(batch.item_tokens, batch.item_lengths, batch.item_rows)
    assert ran == [2]
    encoder(batch.item_tokens, batch.item_lengths)
    assert ran == [2, 0, 1, 2]


def test_all_layers_are_what_the_default_trains() -> None:
    assert_same(step(model(3)), step(model(0)))
    assert "interest.item_encoder.body.embed_tokens.weight" in step(model(3))[1]


def test_adapters_are_on_the_top_layers_alone_and_learn_from_the_file(tmp_path: Path) -> None:
    karma = model(1, rank=4)
    body = karma.interest.item_encoder.body
    low_rank = {name for name, _ in body.named_parameters() if is_low_rank(name)}
    assert low_rank and all(name.startswith("layers.2.") for name in low_rank)
    live = step(karma)
    karma.interest.item_encoder.states = states(karma, tmp_path / "states.npy")
    assert_same(step(karma), live)


def test_frozen_layers_stay_frozen_when_the_encoder_is_switched_on() -> None:
    karma = model()
    lower, encoder = lower_parameters(karma), karma.interest.item_encoder
    assert len(lower) == 1 + 2 * len(list(encoder.body.layers[0].parameters()))
    for trained in (False, True):
        set_trained(encoder, trained)
        for value in encoder.parameters():
            assert value.requires_grad == (trained and id(value) not in lower)


def test_the_catalogue_and_its_whitening_are_those_of_the_whole_encoder(tmp_path: Path) -> None:
    karma = model(pool="mean")
    tokens, lengths = tiny.item_tokens()
    interest, encoder = karma.interest, karma.interest.item_encoder
    sample = [torch.from_numpy(values.astype(np.int64)) for values in (tokens, lengths)]
    table, rows = states(karma, tmp_path / "states.npy"), torch.arange(len(lengths))
    found = []
    for encoder.states in (None, table):
        encoder.mean.zero_()
        torch.nn.init.eye_(encoder.output.weight)
        encoder.whiten(*sample, rows)
        found.append((encoder.mean.clone(), encode_catalog(interest, tokens, lengths)))
    torch.testing.assert_close(*(mean for mean, _ in found))
    np.testing.assert_allclose(*(vectors for _, vectors in found), rtol=1e-4, atol=1e-5)


def test_a_block_of_states_is_their_whitened_mean_and_never_learns(tmp_path: Path) -> None:
    karma = model(1, lexical=4, block="states")
    fit_known(karma)
    encoder, (tokens, lengths) = karma.interest.item_encoder, tiny.item_tokens()
    table = states(karma, tmp_path / "states.npy")
    ends = table.counts.cumsum()
    means = np.stack(
        [table.values[e - n : e].mean(0) for e, n in zip(ends, table.counts, strict=True)]
    )
    centred = means - means.mean(0)
    variances, axes = np.linalg.eigh(centred.T @ centred / len(centred))
    expected = centred @ (axes / np.sqrt(variances + 0.01 * variances.max()))[:, -4:]
    expected *= np.sqrt(DEEP.hidden_size) / np.linalg.norm(expected, axis=1, keepdims=True)
    before = encode_catalog(karma.interest, tokens, lengths)[:, -4:]
    signs = np.sign((before * expected).sum(0))  # axes have no sign of their own
    np.testing.assert_allclose(before * signs, expected, atol=2e-3)
    with torch.no_grad():
        for value in encoder.parameters():
            if value.requires_grad:
                value.add_(0.1)
    after = encode_catalog(karma.interest, tokens, lengths)
    np.testing.assert_array_equal(after[:, -4:], before)
    assert not step(karma)[1].keys() & {"interest.item_encoder.known.weight"}
    with pytest.raises(InputError, match=r"item_encoder\.block.*train_layers"):
        replace(Config().model, item_encoder=ItemEncoderConfig(lexical=4, block="states")).check()
    with pytest.raises(InputError, match=f"at most {DEEP.hidden_size}"):
        model(1, lexical=DEEP.hidden_size + 1, block="states")


def test_half_precision_takes_half_the_room_and_is_nearly_the_same(tmp_path: Path) -> None:
    karma, batch = model(), tiny.batch()
    files = [tmp_path / f"{name}.npy" for name in ("float32", "bfloat16")]
    exact, half = (states(karma, path, path.stem) for path in files)
    assert exact.values.nbytes == 2 * half.values.nbytes
    assert half.values.nbytes == 2 * int(half.counts.sum()) * DEEP.hidden_size
    rows, counts = batch.item_rows.numpy(), batch.item_lengths.numpy()
    ours, theirs = half.gather(rows, counts).float(), exact.gather(rows, counts)
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)


def test_states_of_other_texts_are_refused(tmp_path: Path) -> None:
    karma, batch = model(), tiny.batch()
    karma.interest.item_encoder.states = states(karma, tmp_path / "states.npy")
    with pytest.raises(ValueError, match="other texts"):
        karma.interest.encode_items(batch.item_tokens, batch.item_lengths - 1, batch.item_rows)


def test_a_killed_writer_continues_and_the_file_appears_whole(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for module in (frozen_states, frozen_outputs):
        monkeypatch.setattr(module, "PORTION", 10)
    karma, path, asked = model(), tmp_path / "states.npy", []
    portions = FrozenPortions(karma.interest.item_encoder, *tiny.item_tokens(), "float32")
    arguments = (str(path), portions.lengths, DEEP.hidden_size, "float32")

    def no_name(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    def killed(numbers: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        asked.append(numbers)
        for number in numbers:
            if len(asked) < 3 and number == 2 * len(asked):
                raise KeyboardInterrupt
            yield number, portions.portion(number)

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            write_states(*arguments, killed)
        assert not path.exists()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", no_name)
        write_states(*arguments, killed)
    write_states(*arguments, killed)  # all that is missing is the name
    assert asked == [[0, 1, 2, 3, 4], [2, 3, 4], [4]]
    whole = states(karma, tmp_path / "whole.npy")
    assert np.array_equal(np.load(path), whole.values)
    assert {p.name for p in tmp_path.glob("states.*")} - {"states.npy.lock"} == {"states.npy"}


def test_a_file_that_the_disk_cannot_hold_is_refused_before_the_work(tmp_path: Path) -> None:
    counts = np.full(1, 10**13)
    with pytest.raises(StorageError, match=r"1280000\.0 GB are needed"):
        write_states(str(tmp_path / "s.npy"), counts, 32, "float32", lambda numbers: iter(()))


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        ({"train_layers": 3}, r"train_layers: 3 is more than the 2 layers"),
        ({"layers": 1, "train_layers": 2}, r"train_layers: 2 is more than the 1 layers"),
        ({"layers": 1, "train_layers": 2, "checkpoint": "x"}, r"train_layers: 2 .* the 1 layers"),
        ({"train_layers": 1, "modality": "multimodal"}, r"train_layers: 1 .*pictures"),
        ({"train_layers": 1, "pool": "emb_token"}, r"pool: 'emb_token' .*choices: eos, mean"),
    ],
)
def test_what_cannot_be_frozen_is_refused(encoder: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(Config().model, item_encoder=ItemEncoderConfig(**encoder)).check()
    Config().model.check()


def test_more_layers_than_a_checkpoint_has_are_refused() -> None:
    with pytest.raises(InputError, match=r"train_layers: 4 is more than the 3 layers"):
        model(4)
