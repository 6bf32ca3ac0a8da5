"""A small comparison -> JSON, pictures, one page and a screen."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from karma_ray.evaluation.diagnosis import BodyDiagnosis, ModelDiagnosis
from karma_ray.metrics.attention import MEASURES
from karma_ray.report.attention_plots import attention_grid
from karma_ray.report.diagnosis_page import ROWS, Comparison, Subject, render_diagnosis, screen
from tests.report.test_page import read

ATTACK = "<script>$x$</script>"


def body(stripe: float, slots: list[str]) -> BodyDiagnosis:
    size = len(slots)
    maps = np.tril(np.ones((2, size, size), np.float32))
    maps[:, 3:, 2] += stripe * size
    maps /= maps.sum(-1, keepdims=True)
    content = np.zeros(size, bool)
    content[1 : size // 2] = True
    measures = {name: np.full((2, 4), 100 * stripe) for name in MEASURES}
    return BodyDiagnosis(measures, [(0, 1), (1, 1)], maps, maps, slots, content)


def subject(name: str, stripe: float, users: bool = True) -> Subject:
    items, requests = body(stripe, ["a", ATTACK, *"cdefgh"]), body(stripe, list("abcdefghij"))
    metrics = {key: stripe for key, label, _ in ROWS if label}
    metrics |= {"collapse/category_accuracy": math.nan}
    found = ModelDiagnosis(metrics, items, requests if users else None, torch.zeros(3, 2))
    return Subject(name, {"run": f"/runs/{name}", "recipe": ATTACK, "seed": 0}, found)


def comparison(*names: str, users: bool = True) -> Comparison:
    facts = {
        "data": "toy_shop", "data_uri": "/data", "seed": 0, "epsilon": 0.3, "num_items": 512,
        "num_held_out": 139, "item_length": 8, "num_vectors": 1200, "num_requests": 512,
        "history": 4,
    }  # fmt: skip
    subjects = [subject(name, 0.1 * place, users) for place, name in enumerate(names)]
    return Comparison(subjects, facts, ["The weights that x began with are no longer there."])


def test_numbers_are_flat_and_what_was_not_measured_is_absent(tmp_path: Path) -> None:
    render_diagnosis(comparison("frozen", "karma"), str(tmp_path))
    value = json.loads((tmp_path / "diagnosis.json").read_text())
    assert list(value["models"]) == ["frozen", "karma"]
    karma = value["models"]["karma"]
    assert karma["metrics"]["collapse/content_sink"] == 0.1
    assert all(isinstance(number, float) for number in karma["metrics"].values())
    assert "collapse/category_accuracy" not in karma["metrics"]
    assert np.shape(karma["heads"]["item_encoder"]["content_sink"]) == (2, 4)
    assert value["notes"] and value["num_items"] == 512


def test_the_page_shows_the_table_the_pictures_and_what_is_missing(tmp_path: Path) -> None:
    text, words = read(render_diagnosis(comparison("frozen", "action", "karma"), str(tmp_path)))
    for expected in ("toy_shop", "content sinks, %", "action", "no longer there", "User decoder"):
        assert expected in words
    assert "<script" not in text
    pictures = sorted(path.name for path in tmp_path.glob("*.png"))
    assert pictures == [f"diagnosis_{n}.png" for n in ("example", "heads", "items", "users")]
    assert text.count("data:image/png;base64,") == 4


def test_without_requests_the_user_decoder_is_left_out(tmp_path: Path) -> None:
    _, words = read(render_diagnosis(comparison("karma", users=False), str(tmp_path)))
    assert "User decoder: mean" not in words
    assert not (tmp_path / "diagnosis_users.png").exists()


@pytest.mark.parametrize("count", [1, 3, 6])
def test_the_screen_fits_and_its_columns_stand_below_their_names(count: int) -> None:
    text = screen(comparison(*[f"run-{n}" for n in range(count)]))
    lines = text.splitlines()
    assert len(lines) <= 40
    header = next(line for line in lines if "run-0" in line)
    row = next(line for line in lines if "effective rank of e" in line)
    assert len(header) == len(row)
    missing = next(line for line in lines if "category from e" in line)
    assert missing.count("–") == count


def test_models_stand_side_by_side_and_heads_below_each_other() -> None:
    def size(models: int, heads: int) -> tuple[int, int]:
        maps = np.tril(np.full((heads, 6, 6), 0.2))
        chosen = [(0, head) for head in range(heads)]
        content = attention_grid([("m", maps)] * models, chosen, list("abcdef"))
        return Image.open(io.BytesIO(content)).size

    one, wide, tall = size(1, 1), size(3, 1), size(1, 2)
    assert wide[0] > 2 * one[0] and wide[1] == one[1]
    assert tall[1] == pytest.approx(2 * one[1], rel=0.05) and tall[0] == one[0]


def test_a_stripe_shows_and_what_is_unseen_is_grey() -> None:
    def pixels(stripe: float) -> np.ndarray:
        shown = body(stripe, list("abcdefgh"))
        content = attention_grid([("m", shown.mean_maps[:1])], [(0, 1)], shown.slots)
        return np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(int)

    plain, striped = pixels(0.0), pixels(0.9)
    assert plain.shape == striped.shape
    assert np.abs(plain - striped).max() > 100
    grey = (plain == [0xEA, 0xEE, 0xF2]).all(-1)
    assert grey.mean() > 0.05
