"""Every choice that the method leaves open is reached from the command line, from a search space
and from the documentation, under its published name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from karma_ray import recipes
from karma_ray.cluster.search_space import load_space
from karma_ray.config import Config, from_dict, override, to_dict
from karma_ray.studies.rows import Row
from karma_ray.studies.tables import TABLES

ROOT = Path(__file__).resolve().parents[1]
DOC = (ROOT / "docs" / "switches.md").read_text()

SEARCHED: dict[str, tuple[Any, ...]] = {
    "model.user_decoder.layout": ("interleaved", "items_only", "query_last"),
    "model.user_decoder.query_mode": ("embed_pool", "tokens", "encoder", "none"),
    "model.item_encoder.lexical": (0, 16),
    "objective.act_positions": ("all", "last"),
    "collate.num_decoded": (2, 1, 0),
    "model.score.kind": ("rms_dot", "dot", "cos_learned"),
    "model.score.scale": (32.0, 10.0),
    "objective.act_reduction": ("mean_by_type", "paper_sum"),
    "objective.hard_weight": (1.0, 0.5),
    "objective.batch_weight": (1.0, 0.1),
    "objective.action_loss": ("pairwise", "infonce", "bce", "mse"),
    "training.encoder_grad": ("full", "targets_only", "head", "frozen"),
    "model.decodability.recon_decoder": ("shared", "separate", "light:1", "frozen"),
    "model.decodability.recon_cond": ("eq7", "fig1"),
    "model.decodability.task1_see_readout": (True, False),
    "model.decodability.recon_token_dropout": (0.0, 0.5),
    "model.decodability.share_projector": (True, False),
    "model.imagery.img_cond": ("both", "task1", "task2"),
    "model.imagery.img_head": ("fm", "ddpm_eps", "ddpm_v", "ddpm_x0", "edm", "mse"),
    "model.imagery.denoiser.times": ("uniform", "logit_normal"),
    "model.imagery.denoiser.shift": (0.0, 3.0),
    "model.generator.denoiser.times": ("uniform", "logit_normal"),
    "model.generator.denoiser.shift": (0.0, 3.0),
    "warmup.train": ("decoder", "adapters_only", "all"),
    "warmup.skip": (False, True),
    "objective.lambda_dec": (1.0, 0.1),
    "objective.lambda_img": (0.0, 0.3),
    "objective.generation": (1.0, 0.0),
    "objective.reconstruction": (1.0, 0.0),
    "objective.ce_reduction": ("token_mean", "sum"),
    "objective.gen_mode": ("add", "replace"),
    "model.generator.samples": (1, 16),
    "model.generator.agg": ("single", "mean", "union"),
    "model.generator.steps": (0, 1),
    "model.peft": ("full", "lora:8"),
}
"""The open choices (docs/switches.md): field -> values, the default first."""
MEASURED: dict[str, tuple[Any, ...]] = {
    "evaluation.gauc_weight": ("impressions", "positives", "uniform"),
    "evaluation.hr_unit": ("click", "any_hit"),
    "evaluation.js_mode": ("per_item", "pooled"),
    "evaluation.corpus": ("full", "sampled:1000"),
    "collate.visual_features": ("", "/other/features"),
}
"""What is measured, or what data are read: not searched, or the search would pick its own ruler."""
PAIRED: dict[str, tuple[Any, ...]] = {"objective.logq": (False, True)}
"""Refused but beside one value of another switch, so no search draws it: rows of `baselines`."""
CONTROLS: dict[str, tuple[Any, ...]] = {
    "model.decodability.recon_detach_h": (False, True),
    "model.decodability.recon_text": ("own", "shuffled"),
}
"""Null controls, which a search refuses to draw because they must not win: rows of `switches`."""
ALL = {**SEARCHED, **MEASURED, **PAIRED, **CONTROLS}
SPACES = [load_space(str(path)) for path in sorted((ROOT / "tune_spaces").glob("*.py"))]
ROWS = {row.name: row for table in ("switches", "imagery") for row in TABLES[table].rows}


def value_at(config: Config, path: str) -> Any:
    """The value of a dotted field."""
    found: Any = config
    for part in path.split("."):
        found = getattr(found, part)
    return found


def text(value: Any) -> str:
    """As it is typed."""
    return str(value).lower() if isinstance(value, bool) else str(value)


@pytest.mark.parametrize(("path", "values"), ALL.items())
def test_a_switch_is_set_from_the_command_line_and_a_file(
    path: str, values: tuple[Any, ...]
) -> None:
    assert value_at(recipes.karma_text(), path) == values[0]
    for value in values:
        config = override(recipes.karma_text(), [f"{path}={text(value)}"])
        assert value_at(config, path) == value
        assert from_dict(to_dict(config)) == config


@pytest.mark.parametrize(("path", "values"), SEARCHED.items())
def test_a_switch_is_reached_by_a_search(path: str, values: tuple[Any, ...]) -> None:
    domains = [space.domains[path] for space in SPACES if path in space.domains]
    assert domains, f"no file of tune_spaces/ draws {path}"
    if path == "model.generator.agg":  # `single` is either of them with one sample
        values = values[1:]
    named = [value for value in values if isinstance(value, str | bool)]
    drawn = {value for domain in domains for value in getattr(domain, "categories", ())}
    assert set(named) <= drawn


@pytest.mark.parametrize(("path", "values"), ALL.items())
def test_a_switch_is_documented_with_its_values(path: str, values: tuple[Any, ...]) -> None:
    (line,) = [line for line in DOC.splitlines() if f"`{path}`" in line]
    for value in values:
        if isinstance(value, str) and value and ":" not in value and "/" not in value:
            assert value in line, f"{value} is not in the line of {path}"


@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_the_switches_differs_in_what_it_names(name: str) -> None:
    row: Row = ROWS[name]
    base, changed = recipes.build(row.built_from), override(
        recipes.build(row.built_from), row.settings
    )  # fmt: skip
    differing = {
        assignment.partition("=")[0]
        for assignment in row.settings
        if value_at(base, assignment.partition("=")[0])
        != value_at(changed, assignment.partition("=")[0])
    }
    assert len(differing) == len(row.settings), "a row that sets what is the default"
    assert (changed == base) == (name == row.built_from)


def test_the_rows_cover_every_named_value_of_the_searched_switches() -> None:
    has_no_row = re.compile(
        r"^(objective\.(lambda|hard|batch|gen|recon)|model\.generator|model\.score\.scale)"
    )
    settings = {setting for row in ROWS.values() for setting in row.settings}
    for path, values in SEARCHED.items():
        if has_no_row.match(path):  # a number, or a row of Table 1 or 2
            continue
        for value in values[1:]:
            assert f"{path}={text(value)}" in settings
