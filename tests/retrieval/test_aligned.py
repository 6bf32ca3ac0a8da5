"""A run's embeddings after its LLM was fine-tuned on co-clicks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from karma_ray.artifacts import read_manifest
from karma_ray.baselines.sequential import IdRecommender, IdSizes
from karma_ray.codes.alignment import AlignmentConfig
from karma_ray.codes.tuning import TuningConfig
from karma_ray.data.vectors import mapped_vectors
from karma_ray.errors import InputError
from karma_ray.model.config import ModelConfig
from karma_ray.retrieval.aligned import align_run
from karma_ray.retrieval.encode import load_embeddings
from karma_ray.retrieval.export import save_bundle
from tests import aligned_run

SMALL = TuningConfig(relevance=0.05, steps=40, batch_size=32, learning_rate=2e-3, generation=0.5)


@pytest.fixture(scope="module")
def aligned(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """A run with a lexical block whose aligned embeddings are finished."""
    run = aligned_run.write_run(tmp_path_factory.mktemp("aligned"), lexical=8)
    return run, align_run(run, config=SMALL)


def test_tuning_lowers_both_losses_and_keeps_held_out_pairs_near(
    aligned: tuple[str, dict[str, Any]],
) -> None:
    _, facts = aligned
    assert facts["method"] == "llm" and facts["relevance"] == {"by": "texts", "least": 0.05}
    assert facts["start_cosine"] > 0.999
    assert facts["generation_after"] < facts["generation_before"] - 0.5
    assert facts["pair_recall_after"] >= facts["pair_recall_before"]
    for first, last in facts["terms"].values():
        assert last < first
    assert facts["trained_on"] + facts["held_out"] == facts["related_pairs"]


def test_what_is_fixed_of_an_embedding_stays(aligned: tuple[str, dict[str, Any]]) -> None:
    run, facts = aligned
    own, found = (mapped_vectors(f"{run}/{name}") for name in ("item_embeddings",
                                                               "aligned_embeddings"))  # fmt: skip
    assert np.array_equal(own[:, 32:], found[:, 32:]) and not np.allclose(
        own[:, :32], found[:, :32]
    )
    there = load_embeddings(f"{run}/aligned_embeddings", facts["parents"]["bundle"])
    assert there.item_ids == load_embeddings(f"{run}/item_embeddings").item_ids


def test_the_same_seed_gives_the_same_vectors_and_finished_ones_are_used_again(
    aligned: tuple[str, dict[str, Any]], tmp_path: Path
) -> None:
    run, facts = aligned
    there = Path(run, "aligned_embeddings", "part-00000.parquet")
    os.utime(there, (1, 1))
    assert align_run(run, config=SMALL) == facts
    assert there.stat().st_mtime == 1
    again = align_run(run, config=SMALL, out=str(tmp_path / "again"))
    assert again["content_hash"] == facts["content_hash"]
    other = AlignmentConfig(relevance=0.05, steps=2, batch_size=32)
    projected = align_run(run, config=other, out=str(tmp_path / "again"))
    assert projected["method"] == "projection"
    assert projected == read_manifest(str(tmp_path / "again"))


def test_without_steps_the_vectors_are_the_runs_own(tmp_path: Path) -> None:
    run = aligned_run.write_run(tmp_path)
    facts = align_run(run, config=TuningConfig(relevance=0.05, steps=0))
    own, found = (mapped_vectors(f"{run}/{name}") for name in ("item_embeddings",
                                                               "aligned_embeddings"))  # fmt: skip
    np.testing.assert_allclose(found, own, atol=1e-3)
    assert facts["terms"] == {"contrastive": [], "generation": []}
    assert facts["generation_after"] == facts["generation_before"]


def test_a_pretrained_llm_says_which_pairs_are_related(tmp_path: Path) -> None:
    """It has a head of its own and its items are means of states, which a fitted map meets."""
    run = aligned_run.write_run(tmp_path, pool="mean", pretrained=True)
    config = TuningConfig(chance=0.5, steps=10, batch_size=16, learning_rate=2e-3, summary_tokens=2)
    facts = align_run(run, config=config)
    by = facts["relevance"]
    assert by["by"] == "llm" and by["llm"] == str(tmp_path / "llm") and by["chance"] == 0.5
    assert 100 <= facts["related_pairs"] < facts["asked_pairs"] == facts["co_click_pairs"]
    assert facts["start_cosine"] > 0.9
    assert facts["generation_after"] < facts["generation_before"]
    fewer = align_run(run, config=TuningConfig(chance=0.9, steps=0, most_pairs=200))
    assert fewer["asked_pairs"] == 200


def test_a_run_whose_llm_is_gone_is_judged_by_texts(tmp_path: Path, caplog) -> None:
    run = aligned_run.write_run(tmp_path, pretrained=True)
    Path(tmp_path, "llm", "config.json").unlink()
    facts = align_run(run, config=TuningConfig(relevance=0.05, steps=0))
    assert facts["relevance"]["by"] == "texts" and "not by the pretrained LLM" in caplog.text


def test_too_few_pairs_and_a_model_over_ids_are_refused(tmp_path: Path) -> None:
    run = aligned_run.write_run(tmp_path)
    with pytest.raises(InputError, match=r"--aligned: 0 .*too few"):
        align_run(run, config=TuningConfig(gap_s=1.0))
    words = aligned_run.tokenizer()
    over_ids = IdRecommender(ModelConfig(kind="sasrec"), IdSizes(160, 400, 9))
    over_ids.know(aligned_run.catalog().item_ids)
    save_bundle(over_ids, words, aligned_run.COLLATE, f"{run}/bundle")
    with pytest.raises(InputError, match=r"--aligned: 'llm' .*over item ids; choices: projection"):
        align_run(run, config=SMALL)
