"""The recipes ctr_ocarm and ctr_sarm from log to ranker: what is made first, and what serves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from karma_ray.artifacts import RunFolder, join, read_manifest, read_table
from karma_ray.config import Config
from karma_ray.data.catalog import Catalog
from karma_ray.data.prepared import PreparedData
from karma_ray.errors import InputError
from karma_ray.ranking.floors import ItemRates
from karma_ray.ranking.judged import Judged
from karma_ray.ranking.load import load_ranker
from karma_ray.retrieval.encode import load_embeddings, save_embeddings
from karma_ray.retrieval.similarity import unit
from karma_ray.runs.ctr import (
    CtrStage,
    check_ranking,
    ensure_teacher,
    exposures_of,
    predictor,
    teacher_of,
    train_ctr,
)
from karma_ray.runs.ctr_assessment import assess_ctr
from karma_ray.runs.executor import HERE
from karma_ray.runs.preparation import ensure_prepared
from karma_ray.training.checkpoints.checkpoint import load_weights
from tests import tiny_run
from tests.ranking.test_sarm import talkative
from tests.runs.test_ctr_run import config


def small(recipe: str, *more: str) -> Config:
    return config(recipe, "ranking.epochs=0", "training.steps=6", *more)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def vectors(shop: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An untrained run that has embedded the shop's items."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_run, "catalog", lambda: Catalog.load(shop))
        model = talkative(tiny_run.tokenizer())
        return tiny_run.write_run(tmp_path_factory.mktemp("vectors"), interest=model)


def measured(wanted: Config, shop: str, out: str, cache: str) -> dict[str, Any]:
    """A run without its report."""
    source = ensure_prepared(shop, wanted.prepare)
    check_ranking(wanted, source)
    train_ctr(wanted, source, out, cache, HERE)
    return assess_ctr(wanted, source, out, cache)


def pages(wanted: Config, shop: str, cache: str) -> pa.Table:
    exposures = exposures_of(wanted, PreparedData.load(shop), cache)
    return read_table(exposures.split("test")).slice(0, 50)


def test_a_student_serves_what_it_was_measured_with_and_reads_nothing_later(
    shop: str, cache: str, tmp_path: Path
) -> None:
    out, wanted = str(tmp_path / "run"), small("ctr_ocarm")
    metrics = measured(wanted, shop, out, cache)
    assert np.isfinite(metrics["teacher/AUC"]) and np.isfinite(metrics["teacher/valid/AUC"])
    ranker, rows = load_ranker(out), pages(wanted, shop, cache)
    predict = predictor(ranker.model, ranker.collator)
    chance = predict(rows)
    later = {name: rows.column(name) for name in ("later_rows", "later_sessions")}
    assert any(later["later_rows"].to_pylist())
    empty = pa.array([[]] * len(rows), pa.list_(pa.int32()))
    for name in later:
        rows = rows.set_column(rows.column_names.index(name), name, empty)
    clicked = rows.column("clicked").to_pylist()
    turned = pa.array([[not click for click in page] for page in clicked])
    rows = rows.set_column(rows.column_names.index("clicked"), "clicked", turned)
    assert np.array_equal(predict(rows), chance)  # bit for bit
    judged = Judged.load(join(out, "predictions"), "test").chance[: len(chance)]
    np.testing.assert_allclose(chance, judged, rtol=1e-5)


def test_students_share_a_teacher_and_one_without_distillation_has_none(
    shop: str, cache: str
) -> None:
    source = ensure_prepared(shop, small("ctr_ocarm").prepare)
    found = teacher_of(small("ctr_ocarm"), source, cache)
    other = teacher_of(small("ctr_ocarm", "ranking.distillation=0.2"), source, cache)
    assert found is not None and other is not None and found[1] == other[1]
    assert ensure_teacher(small("ctr_ocarm"), source, cache, HERE) == found[1]
    seeded = teacher_of(small("ctr_ocarm", "seed=1"), source, cache)
    assert seeded is not None and seeded[1] != found[1]
    assert teacher_of(small("ctr_ocarm", "ranking.distillation=0"), source, cache) is None
    assert teacher_of(small("ctr_din"), source, cache) is None
    teacher = load_ranker(found[1])
    with pytest.raises(InputError, match="reads what comes after a request"):
        teacher.batch("dress", [], teacher.item_ids.to_pylist()[:3])


def unseen(stage: CtrStage) -> np.ndarray:
    rates = ItemRates.count(stage.exposures, stage.facts().num_items)
    return np.flatnonzero(~rates.is_warm)


def test_the_bank_of_a_run_gives_the_chances_of_its_text_encoder(
    shop: str, cache: str, vectors: str, tmp_path: Path
) -> None:
    out = str(tmp_path / "run")
    wanted = small("ctr_sarm", f"ranking.vectors={vectors}", "ranking.anchor_tokens=6")
    metrics = measured(wanted, shop, out, cache)
    assert 0 < metrics["gate/1/mean"] < 1 and metrics["gate/2/std"] > 0
    ranker, data = load_ranker(out), PreparedData.load(shop)
    assert not [name for name in ranker.model.state_dict() if "encoder" in name]
    stage = CtrStage(wanted, data.items_uri, exposures_of(wanted, data, cache), cache)
    trained = stage.build()
    load_weights(join(out, "checkpoints/ctr/final"), trained)
    trained.items.forget(unseen(stage))
    rows = pages(wanted, shop, cache)
    chances = [predictor(model.eval(), stage.collator())(rows) for model in (trained, ranker.model)]
    np.testing.assert_allclose(chances[1], chances[0], rtol=1e-4)


def test_the_control_with_frozen_vectors_is_trained_and_served(
    shop: str, cache: str, vectors: str, tmp_path: Path
) -> None:
    wanted = small("ctr_din", f"ranking.vectors={vectors}", "ranking.family=vectors")
    assert np.isfinite(measured(wanted, shop, str(tmp_path / "run"), cache)["AUC"])
    assert load_ranker(str(tmp_path / "run")).model.items.vectors[1:].any()


def test_aligned_embeddings_are_read_in_place_of_a_run_and_those_of_others_are_refused(
    shop: str, cache: str, vectors: str, tmp_path: Path
) -> None:
    run, place = RunFolder(vectors), join(vectors, "aligned_embeddings")
    wanted = small("ctr_din", f"ranking.vectors={place}", "ranking.family=vectors")
    own = load_embeddings(run.item_embeddings)
    for parent in ("another", read_manifest(run.item_embeddings)["content_hash"]):
        made = replace(own, embeddings=-own.embeddings, parents={"embeddings": parent})
        save_embeddings(made, place)
        if parent == "another":
            with pytest.raises(InputError, match="aligned from those of"):
                measured(wanted, shop, str(tmp_path / "refused"), cache)
    measured(wanted, shop, str(tmp_path / "run"), cache)
    items = load_ranker(str(tmp_path / "run")).model.items
    expected = unit(-own.in_order(Catalog.load(shop).item_ids).embeddings)
    np.testing.assert_array_equal(items.vectors[1:].numpy(), expected)
    similar = small("ctr_simtier", f"ranking.vectors={place}")
    with pytest.raises(InputError, match="reads a finished run"):
        check_ranking(similar, PreparedData.load(shop))


def test_settings_that_do_not_fit_are_refused(shop: str) -> None:
    source = PreparedData.load(shop)
    for wanted, message in (
        (small("ctr_sarm"), "--vectors is needed"),
        (small("ctr_din", "ranking.distillation=1"), "which has no teacher"),
    ):
        with pytest.raises(InputError, match=message):
            check_ranking(wanted, source)
