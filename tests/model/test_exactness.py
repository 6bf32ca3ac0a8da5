"""A checkpoint that would be computed otherwise than it was trained is refused with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3Model

from karma_ray.errors import InputError
from karma_ray.model.backbone import load_body
from karma_ray.model.backbones.registry import checkpoint_family

FIELD = "model.user_decoder.checkpoint"
LONG = {"rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 32}

WRONG: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "a sliding window": (
        {"use_sliding_window": True, "sliding_window": 4},
        {"use_sliding_window": False, "sliding_window": 4},
        "has a sliding window (use_sliding_window=true)",
    ),
    "some layers that slide": (
        {"layer_types": ["full_attention", "sliding_attention"]},
        {"layer_types": ["full_attention", "full_attention"]},
        "has a sliding window (sliding_attention)",
    ),
    "a window without a switch": (
        {"sliding_window": 4096}, {"sliding_window": None}, "has a sliding window (sliding_window)"
    ),
    "attention both ways": ({"is_causal": False}, {"is_causal": True}, "in both directions"),
    "soft-capped attention": (
        {"attn_logit_softcapping": 50.0}, {"attn_logit_softcapping": None},
        "soft-capped logits (attn_logit_softcapping=50.0)",
    ),
    "soft-capped logits": (
        {"final_logit_softcapping": 30.0}, {"final_logit_softcapping": None},
        "soft-capped logits (final_logit_softcapping=30.0)",
    ),
    "norms of another family": ({"use_qk_norm": True}, {"use_qk_norm": False}, "use_qk_norm=True"),
    "scaled states": (
        {"embedding_multiplier": 12.0}, {"embedding_multiplier": 1.0},
        "scales its states or logits (embedding_multiplier=12.0)",
    ),
    "interleaved rotations": (
        {"rope_interleave": True}, {"rope_interleave": False}, "interleaved RoPE, rope_interleave"
    ),
    "rotations of three axes": (
        {"rope_parameters": {"rope_theta": 1e4, "mrope_section": [2, 1, 1]}},
        {"rope_parameters": {"rope_theta": 1e4}},
        "rotary positions with mrope_section=[2, 1, 1]",
    ),
    "half-rotated heads": (
        {"partial_rotary_factor": 0.5}, {"partial_rotary_factor": 1.0}, "rotates a part of each"
    ),
    "layers without positions": (
        {"no_rope_layers": [1, 0]}, {"no_rope_layers": None}, "layers without rotary positions"
    ),
    "positions by the longest text": (
        {"rope_parameters": {"rope_type": "dynamic", **LONG}},
        {"rope_parameters": {"rope_type": "yarn", **LONG}},
        "rotary positions of type 'dynamic'; computed exactly are default, linear, llama3, yarn",
    ),
    "two sets of positions": (
        {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        "rotary positions of type 'longrope'",
    ),
    "remote code": (
        {"auto_map": {"AutoModelForCausalLM": "modeling.Model"}},
        {"auto_map": {"AutoTokenizer": ["tokenization.Tokenizer", None]}},
        "brings code of its own (auto_map: AutoModelForCausalLM)",
    ),
    "quantised weights": (
        {"quantization_config": {"quant_method": "gptq"}}, {},
        "is quantised (gptq)",
    ),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 16}
    Qwen3Model(Qwen3Config(**sizes, **heads)).save_pretrained(tmp_path)
    return tmp_path


def _describe(folder: Path, settings: dict[str, Any]) -> None:
    kept = json.loads((folder / "config.json").read_text())
    for name in (
        "rope_parameters", "sliding_window", "use_sliding_window", "layer_types",
        "quantization_config",
    ):  # fmt: skip
        kept.pop(name, None)
    (folder / "config.json").write_text(json.dumps({**kept, **settings}))


@pytest.mark.parametrize("name", WRONG)
def test_what_would_be_computed_otherwise_is_refused_and_its_neutral_value_is_not(
    folder: Path, name: str
) -> None:
    wrong, right, message = WRONG[name]
    _describe(folder, wrong)
    with pytest.raises(InputError) as caught:
        load_body(str(folder), FIELD)
    assert caught.value.field == FIELD and caught.value.value == str(folder)
    assert message in str(caught.value)
    _describe(folder, right)
    load_body(str(folder), FIELD)


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"model_type": "gemma2", "final_logit_softcapping": 30.0}, "soft-capped logits"),
        ({"model_type": "mistral", "sliding_window": 4096}, "sliding window"),
        ({"model_type": "minicpm", "auto_map": {"AutoConfig": "code.C"}}, "remote code is not run"),
        ({"model_type": "glm", "partial_rotary_factor": 0.5}, "rotates a part"),
    ],
)
def test_another_architecture_is_refused_with_what_is_known_of_it(
    tmp_path: Path, facts: dict[str, Any], reason: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(facts))
    with pytest.raises(InputError, match=reason) as caught:
        checkpoint_family(str(tmp_path), FIELD)
    assert caught.value.value == facts["model_type"]
    assert "choices: qwen3, qwen2, llama" in str(caught.value)


def test_a_config_without_a_model_type_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"no model_type in its config\.json"):
        checkpoint_family(str(tmp_path), FIELD)


def test_the_window_that_is_refused_would_have_changed_the_states() -> None:
    """What the refusal is for: the stock model with its window is another function."""
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 16}
    torch.manual_seed(0)
    full = Qwen3Model(Qwen3Config(**sizes, **heads)).eval()
    window = {"use_sliding_window": True, "sliding_window": 2, "max_window_layers": 0}
    slid = Qwen3Model(Qwen3Config(**sizes, **heads, **window)).eval()
    slid.load_state_dict(full.state_dict())
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        states = [model(input_ids=tokens).last_hidden_state for model in (full, slid)]
    assert not torch.allclose(*states, atol=1e-4)
