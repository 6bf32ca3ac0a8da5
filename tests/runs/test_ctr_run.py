"""A CTR model from log to ranker: the folder is complete, resumed, refused, and serves the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from karma_ray import recipes
from karma_ray.artifacts import join, read_json, read_lines, read_table, write_json
from karma_ray.config import Config, override
from karma_ray.data.prepared import PreparedData
from karma_ray.errors import InputError
from karma_ray.ranking.floors import ItemRates
from karma_ray.ranking.judged import Judged
from karma_ray.ranking.load import load_ranker
from karma_ray.report.page import render_report
from karma_ray.report.terminal import summary
from karma_ray.runs.ctr import check_ranking, exposures_of
from karma_ray.runs.pipeline import evaluate_run, train_run
from karma_ray.training.checkpoints.checkpoint import load_weights
from tests.tiny_run import write_run

SMALL = (
    "training.num_workers=0", "training.batch_size=64", "training.report_every=4",
    "training.checkpoint_every=5", "ranking.width=4",
    "ranking.hidden=16", "ranking.query_buckets=256",
)  # fmt: skip


def config(recipe: str, *more: str) -> Config:
    return override(recipes.build(recipe), [*SMALL, *more])


@pytest.fixture(scope="module")
def run(shop: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, dict[str, Any]]:
    """(run folder, cache, metrics) of DIN on the small shop."""
    folder = tmp_path_factory.mktemp("ctr")
    out, cache = str(folder / "run"), str(folder / "cache")
    return out, cache, train_run(config("ctr_din"), shop, out, cache=cache)


def test_the_folder_of_a_run_is_complete(run: tuple[str, str, dict[str, Any]]) -> None:
    out, _, metrics = run
    parts = (
        "config.json", "manifest.json", "metrics.json", "floors.json", "reliability.json",
        "checkpoints/ctr/final/summary.json", "ranker/manifest.json", "predictions/test.parquet",
        "report/report.html", "report/reliability.png",
    )  # fmt: skip
    assert [part for part in parts if not Path(out, part).exists()] == []
    assert read_json(join(out, "metrics.json")) == metrics
    for name in ("AUC", "gAUC", "logloss", "ECE", "AUC_low", "warm/AUC", "valid/AUC"):
        assert np.isfinite(metrics[name]), name
    assert metrics["AUC_low"] < metrics["AUC"] < metrics["AUC_high"]
    floors = read_json(join(out, "floors.json"))
    assert list(floors) == ["global_ctr", "item_ctr", "oracle"]
    assert floors["global_ctr"]["AUC"] == 50 and floors["oracle"]["gAUC"] > 70


def test_the_loss_falls(run: tuple[str, str, dict[str, Any]]) -> None:
    lines = [line for line in read_lines(join(run[0], "metrics.jsonl")) if line["stage"] == "ctr"]
    assert lines[-1]["loss/click"] < 0.8 * lines[0]["loss/click"]


def test_the_closing_screen_and_the_page_say_how_good_it_is(
    run: tuple[str, str, dict[str, Any]],
) -> None:
    screen, page = summary(run[0]), Path(run[0], "report", "report.html").read_text()
    for text in ("AUC: ", "the best floor", "Calibration: ", "95 % interval over users"):
        assert text in screen and text in page
    assert len(screen.splitlines()) <= 40


def test_an_evaluation_again_gives_the_same_metrics(run: tuple[str, str, dict[str, Any]]) -> None:
    out, cache, metrics = run
    assert evaluate_run(out, cache=cache)[1] == metrics


def test_what_serves_gives_the_chances_that_were_measured(
    run: tuple[str, str, dict[str, Any]], shop: str
) -> None:
    out, cache, _ = run
    ranker, judged = load_ranker(out), Judged.load(join(out, "predictions"), "test")
    exposures = exposures_of(config("ctr_din"), PreparedData.load(shop), cache)
    row = read_table(exposures.split("test")).slice(0, 1).to_pylist()[0]
    ids = ranker.item_ids.to_pylist()
    history, shown = ([ids[n] for n in row[c]] for c in ("history_rows", "candidate_rows"))
    chance = ranker.probabilities(ranker.batch(row["query"], history, shown))
    np.testing.assert_allclose(chance, judged.chance[judged.page == 0], rtol=1e-5)
    unknown = ranker.batch(row["query"], [*history, "no such item"], ["no such item", *shown])
    assert unknown.candidate[0] == -1
    np.testing.assert_allclose(ranker.probabilities(unknown)[1:], chance, rtol=1e-5)


def test_a_resumed_run_equals_an_uninterrupted_one(
    run: tuple[str, str, dict[str, Any]], shop: str, tmp_path: Path, cut_off: Any
) -> None:
    _, cache, metrics = run
    again = str(tmp_path / "again")
    with cut_off():
        train_run(config("ctr_din"), shop, again, cache=cache)
    resumed = train_run(config("ctr_din"), shop, again, cache=cache, resume=True)
    assert resumed["AUC"] == metrics["AUC"] and resumed["logloss"] == metrics["logloss"]


def test_proxy_negatives_are_named_on_every_page(
    run: tuple[str, str, dict[str, Any]],
) -> None:
    path = join(run[0], "data.json")
    facts = read_json(path)
    try:
        write_json({**facts, "negative_source": "proxy"}, path)
        assert "PROXY" in Path(render_report(run[0])).read_text() and "PROXY" in summary(run[0])
    finally:
        write_json(facts, path)
        render_report(run[0])


def refused(shop: str, wanted: Config, **facts: Any) -> str:
    source = PreparedData.load(shop)
    with pytest.raises(InputError) as refusal:
        check_ranking(wanted, replace(source, facts={**source.facts, **facts}))
    return str(refusal.value)


def test_wrong_input_is_refused_before_training(
    run: tuple[str, str, dict[str, Any]], shop: str, tmp_path: Path
) -> None:
    assert "does not say what was shown" in refused(shop, config("ctr_din"), negative_source="none")
    assert "--vectors is needed" in refused(shop, config("ctr_simtier"))
    vectors = f"ranking.vectors={tmp_path}"
    assert "is not used by ranking.family=din" in refused(shop, config("ctr_din", vectors))
    assert "ranking.interest" in refused(shop, config("ctr_din", "ranking.interest=true"))
    assert "is not used by the recipe karma_text" in refused(shop, config("karma_text", vectors))
    with pytest.raises(InputError, match="another catalogue"):
        exposures_of(
            config("ctr_simtier", f"ranking.vectors={write_run(tmp_path / 'tiny')}"),
            PreparedData.load(shop), run[1],
        )  # fmt: skip
    with pytest.raises(InputError, match="has no finished ranker/"):
        load_ranker(str(tmp_path))


def test_items_that_were_never_shown_keep_their_attributes_alone(
    run: tuple[str, str, dict[str, Any]], shop: str
) -> None:
    ranker = load_ranker(run[0])
    exposures = exposures_of(config("ctr_din"), PreparedData.load(shop), run[1])
    warm = ItemRates.count(exposures, len(ranker.item_ids)).is_warm
    served = ranker.model.items.id.weight[1:].detach().clone()
    load_weights(join(run[0], "checkpoints/ctr/final"), ranker.model)
    trained = ranker.model.items.id.weight[1:].detach()
    assert 0 < warm.sum() < len(warm)
    assert served[warm].equal(trained[warm]) and not served[~warm].any()
