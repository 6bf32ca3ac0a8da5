"""Every family computes what transformers' own model of it computes, and survives our files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from karma_ray.model.backbone import (
    build_tiny,
    load_body,
    run_body,
    save_body,
    stock_body,
    token_embeddings,
    truncated,
)
from karma_ray.model.backbones.checkpoints import load_lm_head
from karma_ray.model.backbones.registry import FAMILIES
from karma_ray.model.lora import adapt, is_low_rank, merged
from karma_ray.training.flops import BodyCost
from tests import tiny

VOCABULARY, WIDTH, LENGTHS = 97, 32, (9, 2, 6)
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48,
    "max_position_embeddings": 64,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 4.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
MODELS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "llama untied": (LlamaConfig, {"tie_word_embeddings": False}),
    "llama with biases": (LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "llama with narrow heads": (LlamaConfig, {"head_dim": 6}),
    "llama of long texts": (LlamaConfig, {"rope_parameters": LLAMA3}),
    "llama with linear positions": (LlamaConfig, {"rope_parameters": LINEAR}),
    "qwen2": (Qwen2Config, {}),
    "qwen2 untied": (Qwen2Config, {"tie_word_embeddings": False}),
    "qwen2 with yarn": (Qwen2Config, {"rope_parameters": YARN}),
    "qwen3": (Qwen3Config, {"head_dim": 8}),
    "qwen3 untied with biases": (
        Qwen3Config, {"head_dim": 12, "attention_bias": True, "tie_word_embeddings": False}
    ),
}  # fmt: skip
PLAIN = ("llama", "qwen2", "qwen3")


def _checkpoint(name: str, folder: Path) -> nn.Module:
    """A whole language model, as a hub would hold it, whose attention attends."""
    kind, settings = MODELS[name]
    config = kind(**{**SHAPE, "tie_word_embeddings": True, **settings})
    with torch.random.fork_rng():
        torch.manual_seed(3)
        whole = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        with torch.no_grad():
            for value in whole.parameters():  # biases too, which begin at zero
                value.add_(0.1 * torch.randn(value.shape))
    whole.save_pretrained(folder)
    return whole  # type: ignore[no-any-return]


def _head(folder: Path, body: nn.Module) -> Tensor:
    own = load_lm_head(str(folder))
    return token_embeddings(body) if own is None else own


def _padded() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(5))
    return tokens, torch.arange(9) < torch.tensor(LENGTHS)[:, None]


def _branches() -> tuple[Tensor, Tensor]:
    """Two branches after a history of five slots that do not see each other, and positions."""
    visible = torch.ones(9, 9, dtype=torch.bool).tril()
    visible[7:, 5:7] = False
    return visible.expand(3, 9, 9), torch.tensor([0, 1, 2, 3, 4, 5, 6, 5, 6]).expand(3, 9)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("branches", [False, True], ids=["causal", "branches"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_logits_are_those_of_transformers_own_model(
    tmp_path: Path, name: str, branches: bool, packed: bool
) -> None:
    whole, (tokens, real) = _checkpoint(name, tmp_path), _padded()
    body = load_body(str(tmp_path)).eval()
    visible, positions = _branches()
    if not branches:
        visible, positions = torch.ones_like(visible).tril(), torch.arange(9).expand(3, 9)
    theirs = whole(
        inputs_embeds=whole.get_input_embeddings()(tokens),  # type: ignore[operator]
        attention_mask=torch.zeros(3, 1, 9, 9).masked_fill(~visible[:, None], -1e9),
        position_ids=positions,
    ).logits
    states = run_body(
        body, token_embeddings(body)[tokens], visible if branches else None,
        positions, real if packed else None,
    )  # fmt: skip
    ours = states @ _head(tmp_path, body).T
    torch.testing.assert_close(ours[real], theirs[real], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_body_survives_saving_bitwise_and_is_the_stock_one(tmp_path: Path, name: str) -> None:
    _checkpoint(name, tmp_path / "whole")
    body = load_body(str(tmp_path / "whole")).eval()
    save_body(body, str(tmp_path / "body"))
    again = load_body(str(tmp_path / "body")).eval()
    soft = torch.randn(2, 6, WIDTH, generator=torch.Generator().manual_seed(0))
    assert torch.equal(run_body(again, soft), run_body(body, soft))
    stock = stock_body(body)
    assert set(stock.state_dict()) == set(body.state_dict())
    torch.testing.assert_close(
        stock(inputs_embeds=soft).last_hidden_state, run_body(body, soft), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_merged_adapters_compute_the_same_without_them(tmp_path: Path, name: str) -> None:
    _checkpoint(name, tmp_path / "whole")
    body = load_body(str(tmp_path / "whole")).eval()
    expected = set(body.state_dict())
    soft = torch.randn(2, 6, WIDTH, generator=torch.Generator().manual_seed(0))
    before = run_body(body, soft)
    adapt(body, 2, seed=1)
    for parameter, value in body.named_parameters():
        if is_low_rank(parameter):
            value.add_(0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1)))
    plain = merged(body)
    assert set(plain.state_dict()) == expected
    assert not torch.allclose(run_body(plain, soft), before)
    torch.testing.assert_close(run_body(plain, soft), run_body(body, soft), atol=1e-5, rtol=1e-5)
    save_body(plain, str(tmp_path / "merged"))
    again = load_body(str(tmp_path / "merged")).eval()
    assert torch.equal(run_body(again, soft), run_body(plain, soft))


@pytest.mark.parametrize("name", PLAIN)
def test_the_first_layers_of_any_family_can_be_taken(tmp_path: Path, name: str) -> None:
    _checkpoint(name, tmp_path / "whole")
    body = load_body(str(tmp_path / "whole"))
    light = truncated(body, 1)
    assert len(light.layers) == 1 and light.config.num_hidden_layers == 1  # type: ignore
    save_body(light, str(tmp_path / "light"))
    soft = torch.randn(2, 6, WIDTH)
    assert torch.equal(run_body(load_body(str(tmp_path / "light")), soft), run_body(light, soft))


@pytest.mark.parametrize("name", MODELS)
def test_operations_are_those_of_the_weight_matrices(tmp_path: Path, name: str) -> None:
    _checkpoint(name, tmp_path)
    body = load_body(str(tmp_path))
    weights = sum(p.numel() for n, p in body.named_parameters() if n.endswith("_proj.weight"))
    assert BodyCost.of(body).linear == 2 * weights


@pytest.mark.parametrize("name", PLAIN)
def test_a_tiny_body_of_every_family_can_be_built(name: str) -> None:
    build = FAMILIES[name].tiny
    assert build is not None
    body = build(tiny.BODY, 50, 0)
    assert token_embeddings(body).shape == (50, tiny.BODY.hidden_size)
    if name == "qwen3":
        assert torch.equal(
            token_embeddings(build_tiny(tiny.BODY, 50, 0)), token_embeddings(body)
        )  # the family of the tiny model
