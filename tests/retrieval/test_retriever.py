"""What is served is what is measured; odd requests still get an answer."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import torch

from karma_ray.errors import InputError, KarmaRayError, SkewError
from karma_ray.model.device import this_device
from karma_ray.retrieval.encode import encode_catalog
from karma_ray.retrieval.export import load_bundle
from karma_ray.retrieval.index_build import index_run
from karma_ray.retrieval.requests import HistoryItem, Request, request_table
from karma_ray.retrieval.retriever import Retriever, check_run
from tests import tiny_run

HISTORY = [HistoryItem("i3", "shirt"), HistoryItem("i21", "scarf"), HistoryItem("i8", None)]
REQUESTS = [Request("red mug", HISTORY), Request(None, HISTORY[:1]), Request("lamp"), Request()]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> str:
    return tiny_run.write_run(tmp_path_factory.mktemp("retriever"))


@pytest.fixture(scope="module")
def retriever(run: str) -> Retriever:
    return Retriever.load(run)


def test_the_top_of_score_is_what_recall_returns(retriever: Retriever) -> None:
    measured = retriever.score(request_table(REQUESTS))
    assert measured.shape == (4, 40) and measured.dtype == np.float32
    for row, answer in zip(measured, retriever.recall_batch(REQUESTS, 10), strict=True):
        best = np.argsort(-row)[:10]
        assert [i.item_id for i in answer.items] == [retriever.table.item_ids[b] for b in best]
        np.testing.assert_allclose([i.score for i in answer.items], row[best], rtol=1e-5, atol=1e-4)
        assert [i.title for i in answer.items] == [retriever.table.titles[b] for b in best]


def test_a_loaded_run_scores_as_the_model_in_memory(retriever: Retriever) -> None:
    words, items = tiny_run.tokenizer(), tiny_run.catalog()
    model = tiny_run.interest_model(words)
    vectors = encode_catalog(model, *tiny_run.item_tokens(words, items))
    memory = Retriever.from_model(model, tiny_run.collator(words, items), items, vectors)
    examples = request_table(REQUESTS)
    assert np.array_equal(memory.score(examples), retriever.score(examples))


def test_the_device_is_an_argument_and_by_default_the_gpu_of_the_process(
    run: str, retriever: Retriever, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = request_table(REQUESTS)
    scores, answers = retriever.score(examples), retriever.recall_batch(REQUESTS, 10)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert this_device().type == "cuda" and this_device("cpu").type == "cpu"
    # A step that took the default instead of the argument would look for the GPU.
    there = Retriever.load(run, device="cpu")
    assert there.device.type == there.index.engine.device.type == "cpu"
    assert np.array_equal(there.score(examples), scores)
    assert there.recall_batch(REQUESTS, 10) == answers
    assert index_run(run, device="cpu").num_items == 40
    if not torch.backends.cuda.is_built():
        with pytest.raises((AssertionError, RuntimeError), match=r"(?i)cuda"):
            Retriever.load(run)


def test_requests_do_not_influence_each_other(retriever: Retriever) -> None:
    together = retriever.recall_batch(REQUESTS, 5)
    for request, answer in zip(REQUESTS, together, strict=True):
        alone = retriever.recall(request.query, request.history, 5)
        assert [i.item_id for i in alone.items] == [i.item_id for i in answer.items]
        np.testing.assert_allclose(
            [i.score for i in alone.items], [i.score for i in answer.items], atol=1e-4
        )


def test_query_and_history_both_matter(retriever: Retriever) -> None:
    def scores(query: str | None, history: list[HistoryItem]) -> np.ndarray:
        return retriever.score(request_table([Request(query, history)]))[0]

    base = scores("red mug", HISTORY)
    assert not np.allclose(base, scores("black boots", HISTORY), atol=1e-3)
    assert not np.allclose(base, scores("red mug", HISTORY[::-1]), atol=1e-3)
    assert not np.allclose(base, scores("red mug", []), atol=1e-3)


def test_score_items_gives_the_numbers_of_recall_and_none_for_the_unknown(
    retriever: Retriever,
) -> None:
    best = retriever.recall("lamp", HISTORY, 4)
    ids = [i.item_id for i in best.items]
    answer = retriever.score_items("lamp", HISTORY, [ids[2], "nobody", ids[0]])
    assert answer.scores[1] is None
    np.testing.assert_allclose(
        [answer.scores[0], answer.scores[2]], [best.items[2].score, best.items[0].score], atol=1e-4
    )
    assert retriever.score_items("lamp", [], ["nobody"]).scores == [None]


def test_unknown_history_items_are_skipped_and_listed_once(retriever: Retriever) -> None:
    odd = [HistoryItem("gone"), *HISTORY, HistoryItem("gone"), HistoryItem("also gone")]
    answer = retriever.recall("mug", odd, 5)
    clean = retriever.recall("mug", HISTORY, 5)
    assert answer.ignored_item_ids == ["gone", "also gone"] and clean.ignored_item_ids == []
    assert answer.items == clean.items


def test_excluded_history_leaves_k_other_items_in_the_same_order(retriever: Retriever) -> None:
    everything = retriever.recall("mug", HISTORY, 40).items
    clicked = {item.item_id for item in HISTORY}
    expected = [i.item_id for i in everything if i.item_id not in clicked]
    for k in (3, 37, 40):
        found = retriever.recall("mug", HISTORY, k, exclude_history=True).items
        assert [i.item_id for i in found] == expected[:k]
    assert len(everything) == 40


def test_a_history_with_times_is_put_in_order(retriever: Retriever) -> None:
    times = [datetime(2024, 1, day, tzinfo=UTC) for day in (1, 2, 3)]
    dated = [HistoryItem(h.item_id, h.query, t) for h, t in zip(HISTORY, times, strict=True)]
    assert retriever.recall("mug", dated[::-1], 5) == retriever.recall("mug", dated, 5)


def test_a_history_longer_than_the_model_keeps_its_last_items(retriever: Retriever) -> None:
    long = [HistoryItem(f"i{n}") for n in range(30)]
    limit = tiny_run.COLLATE.max_history
    assert retriever.recall("mug", long, 5).items == retriever.recall("mug", long[-limit:], 5).items


def test_k_below_one_is_refused(retriever: Retriever) -> None:
    with pytest.raises(InputError, match="k: 0"):
        retriever.recall("mug", [], 0)


def test_with_data_the_columns_follow_that_catalogue(run: str, tmp_path: Path) -> None:
    from karma_ray.artifacts import join, write_table

    reverse = tiny_run.items_table().take(list(range(39, -1, -1)))
    write_table(reverse, join(str(tmp_path), "items"))
    examples = request_table(REQUESTS)
    turned = Retriever.load(run, data=str(tmp_path))
    np.testing.assert_allclose(
        turned.score(examples)[:, ::-1], Retriever.load(run).score(examples), atol=1e-4
    )
    assert turned.recall("mug", HISTORY, 3) == Retriever.load(run).recall("mug", HISTORY, 3)


@pytest.mark.parametrize(
    ("part", "command"), [("bundle", "train"), ("item_embeddings", "embed"), ("index", "index")]
)
def test_an_unfinished_run_names_the_part_and_the_command(tmp_path, part, command) -> None:
    run = tiny_run.write_run(tmp_path)
    Path(run, part, "manifest.json").unlink()
    with pytest.raises(InputError, match=rf"no finished {part}/.*jobs/{command}\.py"):
        Retriever.load(run)
    with pytest.raises(InputError, match="does not exist"):
        check_run(str(tmp_path / "nowhere"))


def test_parts_of_different_runs_do_not_mix(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    run, other = tiny_run.write_run(first), tiny_run.write_run(second, seed=5)
    for part in ("item_embeddings", "index"):
        Path(run, part).rename(tmp_path / part)
        Path(other, part).rename(Path(run, part))
        with pytest.raises(SkewError, match=part):
            Retriever.load(run)
        Path(run, part).rename(Path(other, part))
        (tmp_path / part).rename(Path(run, part))
    Retriever.load(run)


def test_an_index_of_older_embeddings_of_the_same_bundle_is_refused(tmp_path: Path) -> None:
    run = tiny_run.write_run(tmp_path)
    manifest = Path(run, "item_embeddings", "manifest.json")
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "content_hash": "new"}))
    with pytest.raises(SkewError, match="item_embeddings here is new"):
        Retriever.load(run)
    index_run(run)
    Retriever.load(run)


def test_a_retriever_holds_no_item_encoder_unless_it_reads_queries(
    run: str, retriever: Retriever, tmp_path: Path
) -> None:
    names = dict(retriever.interest.named_parameters())
    assert names and not [name for name in names if name.startswith("item_encoder")]
    with pytest.raises(KarmaRayError, match="without its item encoder"):
        retriever.interest.encode_items(*tiny_run_tokens())
    whole = load_bundle(f"{run}/bundle").interest
    held = sum(value.numel() for value in whole.user_decoder.parameters())
    assert held <= sum(value.numel() for value in names.values()) < 1.1 * held
    model = tiny_run.interest_model(tiny_run.tokenizer())
    reading = replace(model.config.user_decoder, query_mode="encoder")
    model.config = replace(model.config, user_decoder=reading)
    model.user_decoder.config = reading
    del model.user_decoder.query_embedding  # only pooled queries have one
    encoder = Retriever.load(tiny_run.write_run(tmp_path, interest=model))
    assert [n for n, _ in encoder.interest.named_parameters() if n.startswith("item_encoder")]
    assert len(encoder.recall("red mug", HISTORY, 3).items) == 3


def tiny_run_tokens() -> tuple[torch.Tensor, torch.Tensor]:
    tokens, lengths = tiny_run.item_tokens(tiny_run.tokenizer(), tiny_run.catalog())
    return torch.from_numpy(tokens).long(), torch.from_numpy(lengths).long()
