"""Low-rank adapters learn, the backbone under them does not, and nobody else notices."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from karma_ray.errors import InputError
from karma_ray.model.backbone import build_tiny, save_body
from karma_ray.model.backbones.plain_text import LINEAR_LAYERS
from karma_ray.model.config import DecodabilityConfig, ItemEncoderConfig, ModelConfig
from karma_ray.model.config import UserDecoderConfig as UserConfig
from karma_ray.model.interest import InterestModel
from karma_ray.model.karma import KarmaModel
from karma_ray.model.lora import is_low_rank, merged, parse_rank, rank_of, set_trained
from karma_ray.objectives.losses import ObjectiveConfig
from karma_ray.training.optim import build_optimizer
from karma_ray.training.step import JointStep
from tests import tiny

RANK = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a tiny body."""
    path = tmp_path_factory.mktemp("body")
    save_body(build_tiny(tiny.BODY, len(tiny.tokenizer().get_vocab()), 5), str(path))  # type: ignore[attr-defined]
    return path


def build(
    folder: Path, peft: str, *, seed: int = 0, lm_head: Tensor | None = None, **decodability: Any
) -> KarmaModel:
    config = ModelConfig(
        tiny=tiny.BODY,
        item_encoder=ItemEncoderConfig(checkpoint=str(folder)),
        user_decoder=UserConfig(checkpoint=str(folder)),
        decodability=DecodabilityConfig(**{"max_target_tokens": 8, **decodability}),
        peft=peft,
    )
    interest = InterestModel.build(config, tiny.tokenizer(), seed)
    return KarmaModel(interest, tiny.tokenizer(), lm_head=lm_head)


def joint_loss(karma: KarmaModel) -> Tensor:
    return JointStep(ObjectiveConfig())(karma, tiny.batch()).loss


def own_weights(karma: KarmaModel) -> dict[str, Tensor]:
    """What came with the checkpoints."""
    return {n: p for n, p in karma.named_parameters() if ".body." in n and not is_low_rank(n)}


def trained_names(module: nn.Module) -> set[str]:
    return {name for name, value in module.named_parameters() if value.requires_grad}


@pytest.mark.parametrize(
    "peft", ["lora", "lora:", "lora:0", "lora:-1", "lora:x", "lora:2.5", "lora:²", "qlora:4", ""]
)
def test_a_wrong_value_is_refused_with_the_choices(peft: str) -> None:
    with pytest.raises(InputError, match=r"model\.peft.*choices: full, lora:R") as caught:
        parse_rank(peft)
    assert repr(peft) in str(caught.value)


def test_a_rank_is_read_and_full_has_none() -> None:
    assert (parse_rank("full"), parse_rank("lora:1"), parse_rank("lora:16")) == (None, 1, 16)


def test_full_has_no_module_of_peft_and_trains_everything(folder: Path) -> None:
    karma = build(folder, "full")
    assert not [part for part in karma.modules() if type(part).__module__.startswith("peft")]
    assert trained_names(karma) == {name for name, _ in karma.named_parameters()}
    body = karma.interest.user_decoder.body
    assert rank_of(body) is None and merged(body) is body


def test_at_the_start_adapters_change_no_output(folder: Path) -> None:
    batch = tiny.batch()
    outputs = []
    for peft in ("full", f"lora:{RANK}"):
        karma = build(folder, peft)
        items = karma.interest.encode_items(batch.item_tokens, batch.item_lengths)
        interest, text = karma.forward_with_text(batch, items)
        outputs.append((items, interest, text.states))
    for plain, adapted in zip(*outputs, strict=True):
        assert torch.equal(plain, adapted)


def test_what_is_trained_and_how_many_numbers_that_is(folder: Path) -> None:
    karma = build(folder, f"lora:{RANK}")
    names = trained_names(karma)
    assert {n for n in names if ".body." in n} == {
        n for n, _ in karma.named_parameters() if is_low_rank(n)
    }
    for part in ("projector", "query_embedding", "readout", "no_query", "item_encoder.output"):
        assert any(part in name for name in names), part
    wide, narrow, inner = tiny.BODY.hidden_size, tiny.BODY.hidden_size // 2, 64
    sides = [2 * wide, wide + narrow, wide + narrow, 2 * wide, *3 * [wide + inner]]
    assert len(sides) == len(LINEAR_LAYERS)
    adapters = 2 * tiny.BODY.num_layers * RANK * sum(sides)
    held = dict(karma.named_parameters())
    assert sum(held[name].numel() for name in names if is_low_rank(name)) == adapters
    optimizer = build_optimizer(karma, learning_rate=1e-3)
    inside = {id(value) for group in optimizer.param_groups for value in group["params"]}
    assert inside == {id(held[name]) for name in names}


def test_steps_change_adapters_and_leave_every_own_weight_bit_by_bit(folder: Path) -> None:
    karma = build(folder, f"lora:{RANK}")
    before = {name: value.detach().clone() for name, value in karma.named_parameters()}
    losses = tiny.train(karma, lambda: joint_loss(karma), steps=8, learning_rate=1e-2)
    assert losses[-1] < losses[0]
    own = own_weights(karma)
    for name, value in karma.named_parameters():
        assert torch.equal(value, before[name]) == (name in own), name


def test_adapters_are_drawn_from_the_seed_alone(folder: Path) -> None:
    torch.manual_seed(1)
    first = build(folder, f"lora:{RANK}", seed=7)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    second, other = (build(folder, f"lora:{RANK}", seed=seed) for seed in (7, 8))
    for name, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name
    name = "interest.user_decoder.body.layers.0.mlp.up_proj.lora_A.default.weight"
    assert not torch.equal(other.state_dict()[name], first.state_dict()[name])
    twin = name.replace("user_decoder", "item_encoder")
    assert not torch.equal(first.state_dict()[twin], first.state_dict()[name])
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


def test_switching_gradients_never_wakes_the_own_weights(folder: Path) -> None:
    karma = build(folder, f"lora:{RANK}")
    encoder, asleep = karma.interest.item_encoder, set(own_weights(karma))
    before = trained_names(karma)
    set_trained(encoder, False)
    assert not trained_names(encoder)
    set_trained(karma, True)
    assert trained_names(karma) == before and not before & asleep
    plain = build(folder, "full")
    set_trained(plain.interest.item_encoder, False)
    assert not trained_names(plain.interest.item_encoder)
    set_trained(plain.interest.item_encoder, True)
    assert trained_names(plain) == {name for name, _ in plain.named_parameters()}


@pytest.mark.parametrize(
    ("decoder", "learns"), [("separate", True), ("frozen", False), ("light:1", True)]
)
def test_a_private_decoder_has_adapters_of_its_own(
    folder: Path, decoder: str, learns: bool
) -> None:
    karma = build(folder, f"lora:{RANK}", recon_decoder=decoder)
    private = karma.decodability.body
    assert rank_of(private) == RANK
    assert trained_names(private) == {
        name for name, _ in private.named_parameters() if learns and is_low_rank(name)
    }
    before = {name: value.detach().clone() for name, value in private.named_parameters()}
    tiny.train(karma, lambda: joint_loss(karma), steps=3, learning_rate=1e-2)
    changed = {n for n, value in private.named_parameters() if not torch.equal(value, before[n])}
    assert changed == trained_names(private)


def test_an_untied_head_belongs_to_the_backbone(folder: Path) -> None:
    width = len(tiny.tokenizer().get_vocab())  # type: ignore[attr-defined]
    head = torch.randn(width, tiny.BODY.hidden_size)
    adapted = build(folder, f"lora:{RANK}", lm_head=head, recon_decoder="separate")
    for _ in range(2):
        assert not adapted.lm_head.requires_grad and not adapted.decodability.lm_head.requires_grad
        set_trained(adapted, True)
    plain = build(folder, "full", lm_head=head, recon_decoder="separate")
    assert plain.lm_head.requires_grad and plain.decodability.lm_head.requires_grad


def test_a_merged_copy_computes_the_same_and_the_original_is_untouched(folder: Path) -> None:
    karma = build(folder, f"lora:{RANK}")
    tiny.train(karma, lambda: joint_loss(karma), steps=5, learning_rate=1e-2)
    body = karma.interest.user_decoder.body
    before = copy.deepcopy(body.state_dict())
    plain = merged(body)
    assert not [part for part in plain.modules() if type(part).__module__.startswith("peft")]
    fresh = build_tiny(tiny.BODY, body.config.vocab_size, 0)  # type: ignore[union-attr]
    assert plain.state_dict().keys() == fresh.state_dict().keys()
    assert plain.state_dict()["layers.0.mlp.up_proj.weight"].ne(
        before["layers.0.mlp.up_proj.base_layer.weight"]
    ).any()  # fmt: skip
    for name, value in body.state_dict().items():
        assert torch.equal(value, before[name]), name
    tokens = torch.arange(12).view(2, 6)
    with torch.no_grad():
        torch.testing.assert_close(
            plain(input_ids=tokens).last_hidden_state, body(input_ids=tokens).last_hidden_state,
            atol=1e-5, rtol=1e-5,
        )  # fmt: skip
