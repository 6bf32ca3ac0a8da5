"""Which records are the same run, and which compare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from karma_ray import recipes
from karma_ray.config import Config, from_dict, override, to_dict
from karma_ray.studies.plan import Data, planned
from karma_ray.studies.records import (
    baseline_key,
    learnt_from,
    read_records,
    run_key,
    same_run,
    validated,
)
from karma_ray.studies.tables import TABLES

SHOP = "e3279c522d234d1d"
COMMITTED = Path(__file__).parents[2] / "docs" / "results"


def test_the_committed_records_are_still_understood_and_of_one_toy_shop() -> None:
    """A field that goes has to go from them too, or they compare with nothing; and no rank is of
    more than what is learned."""
    records = read_records(COMMITTED)
    assert len(records) > 100
    for record in records:
        model = from_dict(record["config"]).model
        width = model.tiny.hidden_size if model.kind == "karma" else model.ids.width
        for name in ("collapse/effective_rank_e", "collapse/effective_rank_h"):
            assert record["metrics"].get(name, 0) <= width, (record["row"], record["set"], name)
    assert {r["data_hash"] for r in records if r["data"] == "toy_shop"} == {SHOP}


def test_a_studys_settings_still_make_every_committed_record() -> None:
    """Whoever changes them, or a recipe, starts a study anew: its records are no longer found."""
    rows = {row.name: row for table in TABLES.values() for row in table.rows}
    of_run = {
        (r["data"], r["row"], *r["set"], *r.get("searched", [])): r  # one seed stands for all
        for r in read_records(COMMITTED)
        if "row" in r
    }
    assert len(of_run) > 100
    for (name, row, *sets), record in of_run.items():
        data = Data("", name, record["data_hash"])
        (trial,) = planned([rows[row]], [record["seed"]], data, sets)
        assert same_run(record, trial.config, data.hash), (name, record["name"])


def made(recipe: str, *assignments: str, seed: int = 0) -> dict[str, Any]:
    config = override(recipes.build(recipe), [*assignments, f"seed={seed}"])
    return {
        "data": "toy_shop", "row": recipe, "recipe": recipe, "seed": seed, "data_hash": SHOP,
        "assignments": list(assignments), "set": list(assignments), "config": to_dict(config),
        "metrics": {},
    }  # fmt: skip


def key(recipe: str, *assignments: str, seed: int = 0) -> str:
    return run_key(made(recipe, *assignments, seed=seed)["config"], SHOP)


@pytest.mark.parametrize(
    ("recipe", "assignment"),
    [
        ("karma_text", "training.threads_per_worker=3"),  # how it is executed
        ("karma_text", "training.validate_every=7"),
        ("karma_text", "seed=4"),
        ("action_only", "objective.lambda_dec=0.3"),  # nothing is decoded
        ("action_only", "model.decodability.recon_decoder=separate"),
        ("karma_text", "model.imagery.img_head=mse"),  # no image is reconstructed
        ("popularity", "training.steps=7"),  # nothing is trained
    ],
)
def test_a_field_that_changes_nothing_changes_no_run(recipe: str, assignment: str) -> None:
    assert key(recipe, assignment) == key(recipe)


@pytest.mark.parametrize(
    ("recipe", "assignment"),
    [
        ("karma_text", "objective.lambda_dec=0.3"),
        ("action_only", "model.decodability.max_target_tokens=5"),  # the warm-up decodes
        ("action_only", "training.steps=7"),
        ("action_only", "training.report_every=7"),  # the warm-up ends at a plateau of reports
        ("popularity", "evaluation.max_examples=7"),
        ("embedding_to_text", "model.decodability.recon_text=shuffled"),
    ],
)
def test_a_field_that_matters_makes_another_run(recipe: str, assignment: str) -> None:
    assert key(recipe, assignment) != key(recipe)


def test_other_data_are_another_run() -> None:
    config = made("karma_text")["config"]
    assert run_key(config, "other") != run_key(config, SHOP)


def test_the_same_run_has_the_same_seed() -> None:
    config = override(Config(), ["seed=2"])
    assert same_run(made("karma_text", seed=2), config, SHOP)
    assert not same_run(made("karma_text", seed=1), config, SHOP)
    assert not same_run(made("karma_text", seed=2), config, "other")


def test_records_older_than_a_field_are_read_with_its_default() -> None:
    saved = made("null_shuffled")["config"]
    del saved["training"]["encoder_lr"]
    assert run_key(saved, SHOP) == key("null_shuffled")


def test_records_with_a_field_that_is_gone_are_nobodys_equal() -> None:
    saved = made("karma_text")["config"]
    saved["training"]["long_gone"] = 1
    assert "training.long_gone" in learnt_from(saved)
    assert run_key(saved, SHOP) != key("karma_text")


def test_a_weight_of_the_texts_leaves_the_baseline_what_it_is() -> None:
    lower = made("karma_text", "objective.lambda_dec=0.3")
    assert baseline_key(lower, "action_only") == key("action_only")
    assert baseline_key(lower, "karma_text") != key("karma_text")
    longer = made("karma_text", "training.steps=7")
    assert baseline_key(longer, "action_only") == key("action_only", "training.steps=7")


def test_unknown_settings_are_compared_with_nothing() -> None:
    assert baseline_key({"assignments": ["training.long_gone=1"]}, "action_only") == ""


def test_settings_are_chosen_by_all_validation_examples_where_they_were_measured() -> None:
    record = {"metrics": {}, "curve": [{"HR@50": 10.0}, {"HR@50": 12.0}]}
    assert validated(record) == 12.0
    assert validated({**record, "metrics": {"valid/HR@50": 11.0, "HR@50": 99.0}}) == 11.0
    assert validated({"metrics": {"HR@50": 99.0}}) is None
    assert validated({"metrics": {"valid/HR@50": float("nan")}}) is None
