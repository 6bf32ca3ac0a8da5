"""An item encoder starts from a folder of sentence-transformers with the library's vectors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from karma_ray import cli, pretrained, recipes
from karma_ray.config import Config, override
from karma_ray.data.prompts import SpecialIds, encode_texts
from karma_ray.errors import InputError
from karma_ray.model.backbone import build_tiny, load_body, save_body
from karma_ray.model.backbones.registry import FAMILIES
from karma_ray.model.backbones.sentence_folder import plain_body, sentence_folder
from karma_ray.model.backbones.tokenizer import load_tokenizer, save_framed, save_tokenizer
from karma_ray.model.config import ItemEncoderConfig
from karma_ray.model.interest import InterestModel
from karma_ray.model.item_encoder import start_from
from karma_ray.retrieval.sentence_encoder import export_encoder
from karma_ray.runs.plain_checkpoints import with_plain_checkpoints
from karma_ray.runs.stages import Stage, is_tiny
from tests import tiny_run
from tests.retrieval.test_sentence_transformers import TEXTS, library_vectors, model_of, unit


@pytest.fixture(autouse=True)
def without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def write_folder(
    folder: Path, *dense: nn.Linear, family: str = "qwen3", mode: str = "lasttoken",
    end: int | None = None, before: str = "", normalize: bool = True,
    prompts: dict[str, str] | None = None, most: int = 12,
) -> str:  # fmt: skip
    """A folder that the library itself wrote, around a random body; returns its path."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import (
        Dense,
        Normalize,
        Pooling,
        Transformer,
    )

    words = tiny_run.tokenizer()
    build = FAMILIES[family].tiny
    assert build is not None
    stock = str(folder.with_name(f"{folder.name}-stock"))
    save_body(build(tiny_run.TINY, len(words.get_vocab()), 1), stock)  # type: ignore[attr-defined]
    ids = words([before], add_special_tokens=False)["input_ids"][0] if before else []
    save_framed(words, stock, ids, SpecialIds.of(words).end_of_text if end is None else end, most)
    modules: list[Any] = [Transformer(stock, max_seq_length=most), Pooling(32, mode)]
    for linear in dense:
        modules.append(
            Dense(
                linear.in_features, linear.out_features, linear.bias is not None,
                nn.Identity(), linear.weight.data,
                None if linear.bias is None else linear.bias.data,
            )
        )  # fmt: skip
    modules += [Normalize()] * normalize
    SentenceTransformer(modules=modules, device="cpu", prompts=prompts).save(str(folder))
    return str(folder)


def suited(folder: str, *more: str) -> Config:
    """The configuration of a run whose item encoder starts from `folder`."""
    user = str(Path(folder).with_name("user"))
    if not Path(user).exists():
        words = tiny_run.tokenizer()
        save_body(build_tiny(tiny_run.TINY, len(words.get_vocab()), 2), user)  # type: ignore[attr-defined]
        save_tokenizer(words, user)
    flags = ["--recipe", "action_only"]
    for change in (
        f"model.item_encoder.checkpoint={folder}", f"model.user_decoder.checkpoint={user}", *more,
    ):  # fmt: skip
        flags += ["--set", change]
    return cli.load_config(cli.parser("a job", config=True).parse_args(flags), "toy")


def encoded(folder: str, config: Config, tmp_path: Path) -> np.ndarray:
    """The vectors with which a run of the configuration starts, at length 1."""
    root = tmp_path / "data"
    items = tiny_run.write_data(root) if not root.exists() else str(root / "data")
    config = with_plain_checkpoints(config, str(tmp_path / "cache"))
    assert not is_tiny(config)
    interest = Stage(config, items).build_joint().interest.eval()
    tokens, lengths = encode_texts(
        load_tokenizer(config.model.user_decoder.checkpoint), TEXTS, config.collate.max_item_tokens
    )
    with torch.no_grad():
        vectors = interest.encode_items(torch.from_numpy(tokens).long(), torch.from_numpy(lengths))
    return unit(vectors.numpy())


def linear(bias: bool, seed: int = 0, width: int = 32) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(32, width, bias=bias)


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize(("mode", "pool"), [("lasttoken", "eos"), ("mean", "mean")])
def test_a_run_starts_with_the_vectors_of_the_library(
    tmp_path: Path, family: str, mode: str, pool: str
) -> None:
    layers = (linear(True), linear(False, 1))
    folder = write_folder(tmp_path / "st", *layers, family=family, mode=mode)
    config = suited(folder)
    assert (config.model.item_encoder.pool, config.collate.max_item_tokens) == (pool, 12)
    np.testing.assert_allclose(
        encoded(folder, config, tmp_path), library_vectors(Path(folder), TEXTS), atol=1e-5
    )


@pytest.mark.parametrize("mode", ["lasttoken", "mean"])
def test_without_dense_the_pooled_states_are_the_librarys_and_are_whitened(
    tmp_path: Path, mode: str
) -> None:
    folder = write_folder(tmp_path / "st", mode=mode, before="an item:", normalize=False)
    config = suited(folder)
    assert config.model.item_encoder.instruction.strip() == "an item:"
    words = load_tokenizer(config.model.user_decoder.checkpoint)
    interest = InterestModel(
        config.model, load_body(folder), build_tiny(tiny_run.TINY, 320, 2), words
    ).eval()
    most = config.collate.max_item_tokens
    tokens, lengths = encode_texts(words, TEXTS, most)
    with torch.no_grad():
        states = interest.item_encoder.pooled(
            torch.from_numpy(tokens).long(), torch.from_numpy(lengths)
        )
    np.testing.assert_allclose(states.numpy(), library_vectors(Path(folder), TEXTS), atol=1e-5)
    found = sentence_folder(folder)
    assert found is not None and not start_from(interest.item_encoder, found)


def test_fewer_layers_take_no_dense_of_the_whole_body(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "st", linear(True))
    cut, whole = suited(folder, "model.item_encoder.layers=1"), suited(folder)
    vectors = [encoded(folder, config, tmp_path) for config in (cut, whole)]
    library = library_vectors(Path(folder), TEXTS)
    assert not np.allclose(vectors[0], library, atol=0.1)
    np.testing.assert_allclose(vectors[1], library, atol=1e-5)


@pytest.mark.parametrize(
    ("pool", "instruction"),
    [("eos", ""), ("emb_token", "an item of a shop:"), ("mean", "an item:")],
)
def test_a_run_that_starts_from_an_exported_encoder_has_its_vectors(
    tmp_path: Path, pool: str, instruction: str
) -> None:
    run = tiny_run.write_run(tmp_path, interest=model_of(pool=pool, instruction=instruction))
    export_encoder(run, str(tmp_path / "st"))
    folder = str(tmp_path / "st")
    config = suited(folder)
    assert config.model.item_encoder.pool == pool
    np.testing.assert_allclose(
        encoded(folder, config, tmp_path), library_vectors(tmp_path / "st", TEXTS), atol=1e-5
    )


def test_the_prompt_of_documents_becomes_the_instruction_unless_it_is_typed(
    tmp_path: Path,
) -> None:
    prompts = {"query": "a question: ", "document": "title: none | text: "}
    folder = write_folder(tmp_path / "st", prompts=prompts, most=40)
    assert suited(folder).model.item_encoder.instruction == "title: none | text:"
    typed = suited(folder, "model.item_encoder.instruction=mine", "model.item_encoder.pool=mean")
    assert (typed.model.item_encoder.instruction, typed.model.item_encoder.pool) == ("mine", "mean")
    only_queries = write_folder(tmp_path / "other", prompts={"query": "a question: "})
    assert suited(only_queries).model.item_encoder.instruction == ""


def test_the_transformer_may_lie_in_a_folder_of_its_own(tmp_path: Path) -> None:
    folder = Path(write_folder(tmp_path / "st", linear(True), mode="mean"))
    (folder / "0_Transformer").mkdir()
    for file in folder.iterdir():
        if file.is_file() and file.name not in (
            "modules.json",
            "config_sentence_transformers.json",
        ):
            file.rename(folder / "0_Transformer" / file.name)
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    (folder / "modules.json").write_text(json.dumps(modules))
    assert plain_body(str(folder)) == str(folder / "0_Transformer")
    assert sentence_folder(str(folder / "0_Transformer")) == sentence_folder(str(folder))
    np.testing.assert_allclose(
        encoded(str(folder), suited(str(folder)), tmp_path), library_vectors(folder, TEXTS),
        atol=1e-5,
    )  # fmt: skip


def test_another_decoder_width_than_that_of_the_vectors_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "st", linear(False, width=16))
    with pytest.raises(InputError, match="vectors of 16 dimensions, but the user decoder has"):
        encoded(folder, suited(folder), tmp_path)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written") / "st"
    prompts = {"document": "an item: "}
    return Path(write_folder(folder, linear(True), prompts=prompts, most=30))


def pooling(mode: str | list[str]) -> Any:
    return lambda facts: {**facts, "pooling_mode": mode}


@pytest.mark.parametrize(
    ("file", "change", "reason"),
    [
        ("1_Pooling/config.json", pooling("cls"), "pools by cls.*lasttoken, mean"),
        ("1_Pooling/config.json", pooling("max"), "pools by max"),
        ("1_Pooling/config.json", pooling("weightedmean"), "pools by weightedmean"),
        ("1_Pooling/config.json", pooling(["mean", "lasttoken"]), "pools by mean and lasttoken"),
        ("1_Pooling/config.json", lambda f: {**f, "include_prompt": False}, "leaves the prompt"),
        ("modules.json", lambda m: [*m, {**m[-1], "type": "custom.Module"}], "custom.Module"),
        ("modules.json", lambda m: m[:1], "runs the modules Transformer, not"),
        ("sentence_bert_config.json", lambda f: {**f, "do_lower_case": True}, "lowers the case"),
        ("sentence_bert_config.json", lambda f: {**f, "max_seq_length": 4}, "leaves no room"),
        (
            "2_Dense/config.json",
            lambda f: {**f, "activation_function": "torch.nn.modules.activation.Tanh"},
            "activation .*Tanh in 2_Dense",
        ),
        ("2_Dense/config.json", lambda f: {**f, "use_residual": True}, "more than a linear"),
        ("config.json", lambda f: {**f, "model_type": "bert"}, "bert.*qwen3"),
    ],
)
def test_what_an_item_encoder_does_not_compute_is_refused(
    written: Path, tmp_path: Path, file: str, change: Any, reason: str
) -> None:
    folder = tmp_path / "st"
    shutil.copytree(written, folder)
    path = folder / file
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(InputError, match=reason):
        is_tiny(suited(str(folder)))


def test_an_ordinary_checkpoint_is_no_such_folder(tmp_path: Path) -> None:
    user = suited(write_folder(tmp_path / "st")).model.user_decoder.checkpoint
    assert sentence_folder(user) is None and plain_body(user) == user
    assert plain_body("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    plain = override(recipes.action_only(), [f"model.checkpoint={user}"])
    assert pretrained.suited_to_weights(plain, ()).model.item_encoder.pool == "mean"
    assert ItemEncoderConfig().pool == "eos"
