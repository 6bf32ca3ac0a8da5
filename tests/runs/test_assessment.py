"""The two harder questions of an evaluation: held-out categories and queries in other words."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from karma_ray import recipes
from karma_ray.artifacts import read_json
from karma_ray.baselines.floors import build_floor
from karma_ray.baselines.ranker import Ranker
from karma_ray.config import Config, override
from karma_ray.data.prepared import PreparedData
from karma_ray.errors import InputError
from karma_ray.evaluation.outcomes import FILES, Outcomes
from karma_ray.model.device import this_device
from karma_ray.runs.continuation import warn_of_other_split
from karma_ray.runs.evaluator import Evaluator
from karma_ray.runs.pipeline import evaluate_run, train_run
from karma_ray.runs.preparation import ensure_prepared


def settings(recipe: str, *more: str) -> Config:
    return override(recipes.build(recipe), ["training.num_workers=0", *more])


def table(path: Path, rows: dict[str, str]) -> str:
    lines = ["phrase\tparaphrase", *(f"{phrase}\t{other}" for phrase, other in rows.items())]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def queries_of(data: PreparedData) -> list[str]:
    return sorted({query for query in data.examples("test")["query"].to_pylist() if query})


@pytest.fixture(scope="module")
def data(shop: str) -> PreparedData:
    return ensure_prepared(shop, settings("tfidf").prepare)


@pytest.fixture(scope="module")
def held_out(shop: str, tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    uri = tmp_path_factory.mktemp("held") / "shop"
    shutil.copytree(shop, uri)
    return ensure_prepared(str(uri), settings("tfidf", "prepare.hold_out=0.25").prepare)


def test_a_run_without_gpus_is_measured_without_them(
    data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    seen = []

    def noting(*arguments: Any) -> Ranker:
        seen.append(this_device().type)
        return build_floor(*arguments)

    monkeypatch.setattr("karma_ray.baselines.floors.build_floor", noting)
    for use_gpu, device in (("false", "cpu"), ("auto", "cuda")):
        seen.clear()
        config = settings("popularity", f"training.use_gpu={use_gpu}")
        train_run(
            config, data.uri, str(tmp_path / use_gpu), cache=str(tmp_path / use_gpu / "cache")
        )
        assert set(seen) == {device}
        seen.clear()
        evaluate_run(str(tmp_path / use_gpu), cache=str(tmp_path / use_gpu / "cache"))
        assert set(seen) == {device}


def test_a_run_measures_both_and_keeps_their_values(held_out: PreparedData, tmp_path: Path) -> None:
    words = dict.fromkeys(queries_of(held_out)[::2], "zzz")
    named = table(tmp_path / "other.tsv", words)
    config = settings("tfidf", "prepare.hold_out=0.25", f"evaluation.paraphrases={named}")
    run = str(tmp_path / "run")
    metrics = train_run(config, held_out.uri, run, cache=str(tmp_path / "cache"))
    assert 0 < metrics["held_out/num_test"] < metrics["cold/num_test"] < metrics["num_test"]
    assert metrics["valid/held_out/num_test"] > 0
    assert metrics["paraphrased/num_test"] == metrics["num_test"]
    assert 0 < metrics["paraphrased/share_rewritten"] < 100
    assert metrics["paraphrased/HR@50"] < metrics["HR@50"]
    assert "paraphrased/held_out/HR@50" in metrics
    assert not any(name.startswith("valid/paraphrased") for name in metrics)
    outcomes = Outcomes.unpacked(*(Path(run, "outcomes", name).read_bytes() for name in FILES))
    for name in ("HR@50", "held_out/HR@50", "paraphrased/HR@50"):
        found = outcomes.values(name)
        assert found is not None and found[0].mean() == pytest.approx(metrics[name])
    floors = read_json(f"{run}/floors.json")
    assert {"held_out/HR@50", "paraphrased/HR@50"} <= floors["query_filter"].keys()
    assert "The same queries in other words" in Path(run, "report", "report.html").read_text()


def test_the_items_of_held_out_categories_are_cold_and_are_found_by_their_words_alone(
    data: PreparedData, held_out: PreparedData
) -> None:
    config = settings("tfidf", "prepare.hold_out=0.25")
    usual, held = Evaluator(config, data), Evaluator(config, held_out)
    assert usual.held_out is None and held.held_out is not None
    assert not (held.held_out & held.warm).any() and (held.held_out & usual.warm).any()
    for name in ("popularity", "tfidf"):
        before = usual.both_splits(build_floor(name, data))
        after = held.both_splits(build_floor(name, held_out))
        assert not any("held_out" in metric for metric in before)
        if name == "tfidf":  # it has no clicks to lose
            assert after["HR@10"] == before["HR@10"] and after["held_out/HR@50"] > 0


@pytest.mark.parametrize("name", ["query_filter", "query_filter_popular", "affinity", "oracle"])
def test_the_same_words_change_nothing_and_unknown_words_break_nothing(
    data: PreparedData, tmp_path: Path, name: str
) -> None:
    found = {}
    for kind in ("same", "unknown"):
        rows = {query: query if kind == "same" else "zzz" for query in queries_of(data)}
        named = table(tmp_path / f"{kind}.tsv", rows)
        config = settings("tfidf", f"evaluation.paraphrases={named}")
        found[kind] = Evaluator(config, data).both_splits(build_floor(name, data))
    same, unknown = found["same"], found["unknown"]
    for metric in ("HR@10", "MRR", "JS@50", "gAUC", "num_test", "num_gauc_groups"):
        assert same[f"paraphrased/{metric}"] == same[metric] == unknown[metric]
    assert unknown["paraphrased/HR@10"] < unknown["HR@10"]
    assert np.isfinite(list(unknown.values())).all()


def test_a_table_of_other_queries_is_refused_before_anything_is_trained(
    shop: str, tmp_path: Path
) -> None:
    named = table(tmp_path / "keys.tsv", {"lost keys": "missing keys"})
    for recipe in ("tfidf", "toy"):
        config = settings(recipe, f"evaluation.paraphrases={named}")
        with pytest.raises(InputError, match=r"keys\.tsv' covers no query of the test, such as"):
            train_run(config, shop, str(tmp_path / recipe))


def test_an_evaluation_on_data_prepared_otherwise_warns(
    data: PreparedData, held_out: PreparedData, caplog: pytest.LogCaptureFixture
) -> None:
    config = settings("tfidf", "prepare.hold_out=0.25", "prepare.num_partitions=1")
    warn_of_other_split(config, held_out)
    assert not caplog.messages
    warn_of_other_split(config, data)
    (message,) = caplog.messages
    assert "prepare.hold_out was 0.25 and is 0.0" in message


def test_floors_are_measured_anew_for_other_words_and_other_clicks(
    data: PreparedData, held_out: PreparedData, tmp_path: Path
) -> None:
    from karma_ray.runs.floor_metrics import floor_metrics

    first = table(tmp_path / "words.tsv", dict.fromkeys(queries_of(data), "zzz"))
    config = settings("tfidf", f"evaluation.paraphrases={first}", "evaluation.max_examples=5")
    usual = settings("tfidf", "evaluation.max_examples=5")
    for made, (source, asked) in enumerate([(data, usual), (held_out, usual), (data, config)]):
        floor_metrics(Evaluator(asked, source), str(tmp_path))
        assert len(list(tmp_path.glob("floors-*.json"))) == made + 1
    table(tmp_path / "words.tsv", dict.fromkeys(queries_of(data), "yyy"))
    floor_metrics(Evaluator(config, data), str(tmp_path))
    assert len(list(tmp_path.glob("floors-*.json"))) == 4
