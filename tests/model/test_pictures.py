"""A multimodal item encoder is Qwen3-VL on pictures and a text encoder without them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Qwen3VLModel

from karma_ray.artifacts import join
from karma_ray.data.pixels import PixelTable
from karma_ray.errors import InputError
from karma_ray.model import packing
from karma_ray.model.backbone import (
    build_tiny,
    build_tiny_with_pictures,
    load_body,
    run_body,
    save_body,
    token_embeddings,
)
from karma_ray.model.backbones.qwen3_vl_pictures import cut_patches, insert_pictures
from karma_ray.model.lora import adapt, merged
from karma_ray.objectives.losses import ObjectiveConfig
from karma_ray.retrieval.encode import encode_catalog
from karma_ray.retrieval.export import load_bundle, save_bundle
from karma_ray.training.step import JointStep
from karma_ray.training.warmup_step import TokenBatch, WarmupStep
from tests import multimodal, tiny

ROWS = [1, 0, 7, 5, 12]  # rows 0 and 5 have no picture


def _texts(rows: list[int] = ROWS) -> tuple[Tensor, Tensor, Tensor]:
    tokens, lengths = tiny.item_tokens()
    return (
        torch.from_numpy(tokens[rows].astype(np.int64)),
        torch.from_numpy(lengths[rows]),
        torch.tensor(rows),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Qwen3-VL folder whose weights are wide enough that attention attends."""
    body = build_tiny_with_pictures(build_tiny(tiny.BODY, 300, 0), 5, 6, 1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in body.parameters():
            value.add_(0.1 * torch.randn(value.shape, generator=generator))
    path = str(tmp_path_factory.mktemp("vl"))
    save_body(body, path)
    return path


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("side", [64, 96])
def test_hidden_states_are_those_of_transformers_own_qwen3_vl(
    folder: str, side: int, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Positions in a plane and DeepStack included; of 4 and of 9 image tokens."""
    monkeypatch.setattr(packing, "worth_packing", lambda real: packed)
    body, reference = (
        load_body(folder, "x", with_vision=True),
        Qwen3VLModel.from_pretrained(folder).eval(),
    )
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(10, 290, (3, 7), generator=generator)
    lengths, pictured = torch.tensor([7, 7, 5]), torch.tensor([True, False, True])
    pixels = torch.randint(0, 256, (2, side, side, 3), generator=generator, dtype=torch.uint8)
    seen = insert_pictures(body, token_embeddings(body)[text], lengths - 1, 2, pictured, pixels)
    real = torch.arange(seen.embeddings.shape[1]) <= seen.last[:, None]
    found = run_body(body, seen.embeddings, positions=seen.positions, real=real, deep=seen.deep)
    image = 299
    reference.config.image_token_id = image
    count = (side // 32) ** 2
    patches, grids = cut_patches(((pixels.float() / 255 - 0.5) / 0.5).permute(0, 3, 1, 2), 16, 2, 2)
    patches = patches.view(2, -1, patches.shape[1])
    for row, picture in enumerate([0, None, 1]):
        own = text[row, : lengths[row]]
        options = {}
        if picture is not None:
            shown = [torch.tensor([5]), torch.full((count,), image), torch.tensor([6])]
            own = torch.cat([own[:2], *shown, own[2:]])
            options = {
                "pixel_values": patches[picture], "image_grid_thw": grids[:1],
                "mm_token_type_ids": (own == image).long()[None],
            }  # fmt: skip
        expected = reference(input_ids=own[None], **options).last_hidden_state[0]
        assert seen.last[row] == len(own) - 1
        torch.testing.assert_close(found[row, : len(own)], expected, atol=2e-5, rtol=1e-4)


def test_a_saved_body_loads_with_the_very_same_weights(folder: str, tmp_path: Path) -> None:
    body = load_body(folder, "x", with_vision=True)
    save_body(body, str(tmp_path))
    again = load_body(str(tmp_path), "x", with_vision=True).state_dict()
    assert again.keys() == body.state_dict().keys()
    assert all(torch.equal(value, again[name]) for name, value in body.state_dict().items())


def test_an_item_without_a_picture_is_encoded_as_by_the_text_encoder() -> None:
    text, karma = tiny.model(seed=3), multimodal.model(seed=3)
    tokens, lengths, rows = _texts([0, 5, 48])
    expected = text.interest.encode_items(tokens, lengths)
    for given in (rows, torch.full_like(rows, -1)):
        found = karma.interest.encode_items(tokens, lengths, given)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    beside = karma.interest.encode_items(*_texts([0, 1, 5]))[[0, 2]]  # in one batch with a picture
    torch.testing.assert_close(beside, expected[:2], atol=1e-5, rtol=1e-5)


def test_a_picture_changes_its_own_item_alone() -> None:
    karma = multimodal.model()
    before = karma.interest.encode_items(*_texts())
    values = karma.interest.item_encoder.pictures.values.copy()  # type: ignore[union-attr]
    values[7, 1:] = 255 - values[7, 1:]
    karma.interest.item_encoder.pictures = PixelTable(values)
    changes = (karma.interest.encode_items(*_texts()) - before).abs().amax(1)
    assert changes[2] > 1e-3
    assert changes[[0, 1, 3, 4]].max() < 1e-5


def test_a_text_encoder_ignores_rows_and_pictures() -> None:
    karma = tiny.model()
    tokens, lengths, rows = _texts()
    before = karma.interest.encode_items(tokens, lengths)
    karma.interest.item_encoder.pictures = multimodal.pictures()
    assert torch.equal(karma.interest.encode_items(tokens, lengths, rows), before)


@pytest.mark.parametrize("vision", ["full", "frozen"])
def test_the_action_loss_reaches_the_vision_tower_unless_it_is_frozen(vision: str) -> None:
    karma = multimodal.model(vision=vision)
    step = JointStep(ObjectiveConfig(lambda_dec=0.0))
    reached = tiny.gradients(karma, step(karma, tiny.batch()).loss)
    tower = {name: value for name, value in reached.items() if ".visual." in name}
    if vision == "frozen":
        assert not tower
    else:
        parameters = dict(karma.interest.item_encoder.body.visual.named_parameters())  # type: ignore[union-attr]
        assert len(tower) == len(parameters)
        # A key's bias moves all scores of a query alike; everything else has a gradient.
        assert all(value.abs().max() > 0 for value in tower.values())
    assert any(".embed_tokens." in name for name in reached)


def test_the_gradient_cache_sees_the_same_pictures() -> None:
    objective, batch = ObjectiveConfig(lambda_dec=0.0), tiny.batch()
    found = []
    for step in (JointStep(objective), JointStep(objective, micro_batch_size=2, micro_tokens=30)):
        karma = multimodal.model()
        output = step(karma, batch)
        if output.loss.requires_grad:
            output.loss.backward()
        gradients = {n: p.grad for n, p in karma.named_parameters() if p.grad is not None}
        found.append((output.loss.detach(), gradients))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-4, rtol=1e-4)
    assert found[0][1].keys() == found[1][1].keys()
    for name, value in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], value, atol=2e-3, rtol=2e-2, msg=name)


def test_the_warm_up_encodes_with_pictures() -> None:
    karma, losses = multimodal.model(), []
    for shift in (0, 1):
        tokens, lengths, rows = _texts([1, 2, 3])
        loss = WarmupStep()(karma, TokenBatch(tokens, lengths, rows=rows + 10 * shift)).loss
        losses.append(loss.item())
    assert losses[0] != losses[1]


def test_embeddings_are_bitwise_equal_after_export(tmp_path: Path) -> None:
    karma, words = multimodal.model(), tiny.tokenizer()
    tokens, lengths = tiny.item_tokens()
    before = encode_catalog(karma.interest, tokens, lengths, batch_size=16)
    uri = join(str(tmp_path), "bundle")
    save_bundle(karma.interest, words, tiny.PLAIN, uri)
    loaded = load_bundle(uri).interest
    assert loaded.config.item_encoder.modality == "multimodal"
    loaded.item_encoder.pictures = multimodal.pictures()
    after = encode_catalog(loaded, tokens, lengths, batch_size=16)
    np.testing.assert_array_equal(after, before)
    part = np.array([7, 0, 31])
    some = encode_catalog(loaded, tokens[part], lengths[part], rows=part)
    np.testing.assert_allclose(some, before[part], atol=1e-5)


def test_adapters_leave_the_vision_tower_alone_and_merge_away() -> None:
    karma = multimodal.model()
    encoder = karma.interest.item_encoder
    before = encoder(*_texts())
    adapt(encoder.body, 2, seed=0)
    torch.testing.assert_close(encoder(*_texts()), before)
    trained = [name for name, value in encoder.body.named_parameters() if value.requires_grad]
    assert trained and not any("visual" in name for name in trained)
    plain = merged(encoder.body)
    assert [name for name in plain.state_dict() if "lora" in name] == []


def test_rows_pictures_and_sizes_are_asked_for() -> None:
    karma = multimodal.model()
    tokens, lengths, rows = _texts()
    with pytest.raises(ValueError, match="needs catalogue rows"):
        karma.interest.encode_items(tokens, lengths)
    karma.interest.item_encoder.pictures = None
    with pytest.raises(ValueError, match="needs pictures"):
        karma.interest.encode_items(tokens, lengths, rows)
    with pytest.raises(InputError, match=r"image_size: 40 is not a multiple of 32"):
        multimodal.model(image_size=40)


def test_a_folder_that_cannot_see_is_refused(tmp_path: Path) -> None:
    save_body(build_tiny(tiny.BODY, 300, 0), str(tmp_path))
    with pytest.raises(InputError, match=r"model.item_encoder.checkpoint: 'qwen3'.*qwen3_vl"):
        load_body(str(tmp_path), "model.item_encoder.checkpoint", with_vision=True)
    with pytest.raises(InputError, match=r"no config\.json"):
        load_body(str(tmp_path / "nowhere"), "x", with_vision=True)
