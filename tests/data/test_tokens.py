"""Tokens of the catalogue are made once per node and are those of its texts."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest

from karma_ray.artifacts import join, write_table
from karma_ray.data import tokens
from karma_ray.data.catalog import Catalog
from karma_ray.data.prompts import encode_texts
from karma_ray.data.tokens import TextLengths, catalog_tokens
from karma_ray.model.backbones.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from tests import tiny
from tests.gloo import import_once


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    """The tiny catalogue, from a data folder."""
    write_table(tiny.catalog().table, join(str(tmp_path / "data"), "items"))
    return Catalog.load(str(tmp_path / "data"), str(tmp_path / "cache"))


def _assert_tokens(catalog: Catalog, words: Any, max_tokens: int) -> None:
    found, lengths = catalog_tokens(catalog, words, max_tokens)
    expected, expected_lengths = encode_texts(words, catalog.texts(), max_tokens)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(lengths, expected_lengths)
    assert (found.dtype, lengths.dtype) == (expected.dtype, expected_lengths.dtype)


def _files(catalog: Catalog) -> list[Path]:
    assert catalog.copy is not None
    return sorted(catalog.copy.parent.glob("*.tokens.npy"))


@pytest.mark.parametrize("chunk", [7, 1000])
@pytest.mark.parametrize("max_tokens", [4, 10, 64])
def test_stored_tokens_are_those_of_the_texts(
    catalog: Catalog, max_tokens: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "CHUNK", chunk)
    for _ in range(2):
        _assert_tokens(catalog, tiny.tokenizer(), max_tokens)


def test_the_second_process_does_not_tokenize(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, lengths = catalog_tokens(catalog, tiny.tokenizer(), 10)
    monkeypatch.setattr(tokens, "encode_texts", None)
    again, same = catalog_tokens(catalog, tiny.tokenizer(), 10)
    np.testing.assert_array_equal(again, first)
    np.testing.assert_array_equal(same, lengths)
    for mapped in (again, same):
        assert not mapped.flags.writeable and not mapped.flags.owndata


def test_processes_that_start_together_tokenize_once(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def counted(*arguments: Any) -> Any:
        calls.append(arguments)
        return encode_texts(*arguments)

    monkeypatch.setattr(tokens, "encode_texts", counted)
    threads = [
        Thread(target=catalog_tokens, args=(catalog, tiny.tokenizer(), 10)) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1 == len(_files(catalog))


def _stages(data: str, cache: str, log: str) -> None:
    """What a worker opens, stage after stage, noting what it tokenises."""

    def noted(words: Any, texts: list[str], *rest: Any) -> Any:
        with open(log, "a") as sink:
            sink.write(f"{len(texts)}\n")
        return encode_texts(words, texts, *rest)

    tokens.encode_texts = noted
    for _ in range(3):
        catalog_tokens(Catalog.load(data, cache), tiny.tokenizer(), 10)


def test_the_workers_of_a_node_tokenize_once_over_all_stages(tmp_path: Path) -> None:
    write_table(tiny.catalog().table, join(str(tmp_path / "data"), "items"))
    names = [str(tmp_path / name) for name in ("data", "cache", "log")]
    with multiprocessing.get_context(import_once()).Pool(2) as pool:
        pool.starmap(_stages, [names] * 2, chunksize=1)
    assert (tmp_path / "log").read_text().split() == [str(tiny.catalog().num_items)]


def test_other_words_lengths_or_items_make_other_files(catalog: Catalog, tmp_path: Path) -> None:
    catalog_tokens(catalog, tiny.tokenizer(), 10)
    save_tokenizer(tiny.tokenizer(), str(tmp_path / "words"))
    catalog_tokens(catalog, load_tokenizer(str(tmp_path / "words")), 10)
    assert len(_files(catalog)) == 1
    catalog_tokens(catalog, tiny.tokenizer(), 11)
    other = train_tokenizer(iter(["entirely other text"]), 300)
    _assert_tokens(catalog, other, 10)
    write_table(tiny.catalog().table[:20], join(str(tmp_path / "few"), "items"))
    few = Catalog.load(str(tmp_path / "few"), str(tmp_path / "cache"))
    _assert_tokens(few, tiny.tokenizer(), 10)
    assert len(_files(catalog)) == 4


def test_a_catalogue_in_memory_leaves_no_file() -> None:
    assert tiny.catalog().copy is None
    _assert_tokens(tiny.catalog(), tiny.tokenizer(), 10)


@pytest.mark.parametrize(("limit", "told"), [(3, True), (64, False)])
def test_texts_that_lose_their_end_are_counted_and_told(
    catalog: Catalog, limit: int, told: bool
) -> None:
    words = tiny.tokenizer()
    counts = [len(words([text])["input_ids"][0]) for text in catalog.texts()]
    found = TextLengths.of(catalog, words, limit)
    assert found.read == limit - 1
    assert found.share_cut == pytest.approx(np.mean([n > limit - 1 for n in counts]), abs=1e-4)
    assert found.median == np.ceil(np.median(counts))
    assert bool(found.warning()) == told
    if told:
        assert f"--set collate.max_item_tokens={found.p95 + 1}" in found.warning()
        enough = TextLengths.of(catalog, words, found.p95 + 1)
        assert enough.share_cut <= 0.05


def test_only_a_sample_of_a_large_catalogue_is_measured(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    words = tiny.tokenizer()

    def watched(texts: list[str], **options: Any) -> Any:
        asked.append(len(texts))
        return words(texts, **options)

    monkeypatch.setattr(tokens, "SAMPLED", 7)  # of 49
    TextLengths.of(catalog, watched, 8)  # type: ignore[arg-type]
    assert asked == [7]
