"""A GGUF file becomes a plain folder that computes the same, or is refused with the reason."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from karma_ray.errors import InputError
from karma_ray.model.backbone import (
    load_body,
    quantised_from,
    run_body,
    save_body,
    token_embeddings,
)
from karma_ray.model.backbones.checkpoints import load_lm_head
from karma_ray.model.backbones.gguf_file import SPLITS, convert, split_as
from karma_ray.model.backbones.tokenizer import ROLES, load_tokenizer
from tests import tiny

gguf = pytest.importorskip("gguf", reason="the optional package gguf is not installed")
from tests import gguf_files  # noqa: E402

FIELD = "model.user_decoder.checkpoint"
TOKENS = torch.randint(300, (2, 9), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def _logits(folder: Path) -> torch.Tensor:
    body, head = load_body(str(folder)).eval(), load_lm_head(str(folder))
    states = run_body(body, token_embeddings(body)[TOKENS])
    return states @ (token_embeddings(body) if head is None else head).T


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", gguf_files.CLASSES)
@torch.no_grad()
def test_a_converted_model_is_the_model_that_was_written(
    tmp_path: Path, family: str, tied: bool
) -> None:
    whole = gguf_files.whole(family, tied=tied)
    gguf_files.write(tmp_path / "m.gguf", whole)
    origin = convert(str(tmp_path / "m.gguf"), str(tmp_path / "m"), FIELD)
    assert origin["file"] == "m.gguf" and origin["quantisation"] == "F32"
    weights = load_file(tmp_path / "m" / "model.safetensors")
    for name, value in whole.named_parameters():
        assert torch.equal(weights[name], value), name
    theirs = whole(input_ids=TOKENS).logits
    torch.testing.assert_close(_logits(tmp_path / "m"), theirs, atol=1e-5, rtol=1e-5)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "m", attn_implementation="eager")
    assert torch.equal(plain(input_ids=TOKENS).logits, theirs)


def test_quantised_weights_are_what_they_stand_for(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    gguf_files.write(file, gguf_files.whole("llama"), quantised=True)
    origin = convert(str(file), str(tmp_path / "m"), FIELD)
    assert origin["quantisation"] == "Q8_0" and origin["tensors"] == {"Q8_0": 15, "F32": 5}
    weights = load_file(tmp_path / "m" / "model.safetensors")
    for tensor in gguf.GGUFReader(str(file)).tensors:
        if tensor.name == "blk.1.ffn_down.weight":
            expected = gguf.dequantize(tensor.data, tensor.tensor_type)
            found = weights["model.layers.1.mlp.down_proj.weight"].numpy()
            np.testing.assert_array_equal(found, expected)
    stock = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        theirs = stock(input_ids=TOKENS).logits
    torch.testing.assert_close(_logits(tmp_path / "m"), theirs, atol=1e-5, rtol=1e-5)


def test_a_model_that_was_trained_on_still_says_what_it_came_from(tmp_path: Path) -> None:
    gguf_files.write(tmp_path / "m.gguf", gguf_files.whole("llama"), quantised=True)
    origin = convert(str(tmp_path / "m.gguf"), str(tmp_path / "m"), FIELD)
    save_body(load_body(str(tmp_path / "m")), str(tmp_path / "bundle"))
    assert quantised_from(load_body(str(tmp_path / "bundle"))) == origin
    assert "quantization_config" not in json.loads((tmp_path / "bundle/config.json").read_text())
    save_body(tiny.model().interest.user_decoder.body, str(tmp_path / "own"))
    assert quantised_from(load_body(str(tmp_path / "own"))) is None


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "qwen2", "llama-bpe"])
def test_the_tokenizer_keeps_ids_and_roles_and_splits_as_the_file_says(
    tmp_path: Path, pre: str
) -> None:
    gguf_files.write(tmp_path / "m.gguf", gguf_files.whole("llama"), pre=pre)
    convert(str(tmp_path / "m.gguf"), str(tmp_path / "m"), FIELD)
    tokenizer = load_tokenizer(str(tmp_path / "m"))
    assert (tmp_path / "m" / ROLES).is_file()
    assert tokenizer.text_marks == tiny.tokenizer().text_marks
    assert tokenizer.get_vocab() == tiny.tokenizer().get_vocab()  # type: ignore[attr-defined]
    text = "Red  shirts, it's 2024\n ménage"
    pieces = [
        piece for piece, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    ]
    assert ("2024" in "".join(pieces)) and ("2" in pieces) == (pre in ("smollm", "qwen2"))
    assert ("Ġ2024" in pieces) == (pre == "gpt-2") and ("202" in pieces) == (pre == "llama-bpe")
    assert tokenizer.decode(tokenizer([text])["input_ids"][0]) == text


def test_a_sentence_piece_vocabulary_fills_the_roles_of_llama_2(tmp_path: Path) -> None:
    gguf_files.write(tmp_path / "m.gguf", gguf_files.whole("llama"), sentence_piece=True)
    convert(str(tmp_path / "m.gguf"), str(tmp_path / "m"), FIELD)
    tokenizer = load_tokenizer(str(tmp_path / "m"))
    assert tokenizer.text_marks == ("</s>", "<s>", "</s>")
    ids = tokenizer(["red mug é"], add_special_tokens=False)["input_ids"][0]
    assert tokenizer.convert_ids_to_tokens(ids) == [
        "▁red", "▁", "m", "u", "g", "▁", "<0xC3>", "<0xA9>"
    ]  # fmt: skip
    assert tokenizer.decode(ids) == "red mug é"


def test_a_split_of_ours_is_that_of_the_real_tokenizer(shared_data: Path) -> None:
    folder = shared_data / "qwen_tokenizer"
    if not folder.is_dir():
        pytest.skip("no qwen_tokenizer among the datasets")
    real = AutoTokenizer.from_pretrained(str(folder)).backend_tokenizer
    texts = [
        "Ladies' vest-top 2024,  size 38\n\n\tIt's  红色毛衣 №5 e\u0301",
        *tiny.catalog().texts(),
    ]
    before = [real.encode(text).ids for text in texts]
    split_as(real, SPLITS["qwen2"])
    assert [real.encode(text).ids for text in texts] == before
    real.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert [real.encode(text).ids for text in texts] != before


# --- refusals --------------------------------------------------------------------------------

ROWS = np.ones(8, np.float32)
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "scaled positions": ({"extra": {"llama.rope.scaling.type": "yarn"}}, "rope.scaling.type=yarn"),
    "positions in a tensor": ({"tensors": {"rope_freqs.weight": ROWS}}, "weights rope_freqs"),
    "a bias that would be dropped": (
        {"tensors": {"blk.0.attn_q.bias": np.ones(64, np.float32)}},
        "weights model.layers.0.self_attn.q_proj.bias",
    ),
    "a missing layer": ({"without": "blk.1.attn_q.weight"}, "lacks the weights model.layers.1"),
    "a sliding window": (
        {"extra": {"llama.attention.sliding_window": 4096}}, "attention.sliding_window=4096"
    ),
    "soft-capped logits": (
        {"extra": {"llama.final_logit_softcapping": 30.0}}, "final_logit_softcapping=30.0"
    ),
    "attention both ways": ({"extra": {"llama.attention.causal": False}}, "in both directions"),
    "no space in front of texts": (
        {"sentence_piece": True, "extra": {"tokenizer.ggml.add_space_prefix": False}},
        "without a space in front of texts",
    ),
    "another split": ({"pre": "tekken"}, "tokenizer.ggml.pre); choices: gpt-2, smollm"),
    "no split": ({"pre": ""}, "None is how the tokenizer of"),
}  # fmt: skip


def _refusal(file: Path, folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        convert(str(file), str(folder), FIELD)
    assert caught.value.field == FIELD
    return str(caught.value)


@pytest.mark.parametrize("name", WRONG)
def test_what_would_not_be_computed_is_refused(tmp_path: Path, name: str) -> None:
    spoilt, message = WRONG[name]
    gguf_files.write(tmp_path / "m.gguf", gguf_files.whole("llama"), **spoilt)
    assert message in _refusal(tmp_path / "m.gguf", tmp_path / "m")


def test_neutral_metadata_pass(tmp_path: Path) -> None:
    neutral = {"llama.rope.scaling.type": "none", "llama.attention.sliding_window": 0}
    gguf_files.write(
        tmp_path / "m.gguf", gguf_files.whole("llama"),
        extra={**neutral, "llama.attention.causal": True, "general.name": "tiny"},
    )  # fmt: skip
    convert(str(tmp_path / "m.gguf"), str(tmp_path / "m"), FIELD)
    gguf_files.write(tmp_path / "bare.gguf", gguf_files.whole("llama"))
    convert(str(tmp_path / "bare.gguf"), str(tmp_path / "bare"), FIELD)
    assert torch.equal(_logits(tmp_path / "m"), _logits(tmp_path / "bare"))


def test_heads_that_are_rotated_in_part_are_refused(tmp_path: Path) -> None:
    whole = gguf_files.whole("llama")
    gguf_files.write(tmp_path / "m.gguf", whole)
    written = (tmp_path / "m.gguf").read_bytes()
    key = b"llama.rope.dimension_count"
    at = written.index(key) + len(key) + 4  # behind the type of the value
    assert written[at : at + 4] == (16).to_bytes(4, "little")
    (tmp_path / "m.gguf").write_bytes(written[:at] + (8).to_bytes(4, "little") + written[at + 4 :])
    assert "has heads of 16 dimensions, but llama.rope.dimension_count=8" in _refusal(
        tmp_path / "m.gguf", tmp_path / "m"
    )


def test_another_architecture_is_named_with_the_choices(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "gemma2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    message = _refusal(tmp_path / "m.gguf", tmp_path / "m")
    assert "'gemma2' is the architecture of" in message
    assert "choices: qwen3, qwen2, llama" in message


@pytest.mark.parametrize("kept", [0, 3, 1000, -4000])
def test_a_damaged_file_is_named(tmp_path: Path, kept: int) -> None:
    gguf_files.write(tmp_path / "m.gguf", gguf_files.whole("llama"))
    written = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(written[:kept])
    assert "damaged or incomplete GGUF file" in _refusal(tmp_path / "m.gguf", tmp_path / "m")


def test_a_pointer_a_missing_file_and_a_missing_package_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "m.gguf"
    assert "is no file on this machine" in _refusal(file, tmp_path / "m")
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9880\n")
    assert "Git LFS pointer in place of m.gguf" in _refusal(file, tmp_path / "m")
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install gguf" in _refusal(file, tmp_path / "m")
