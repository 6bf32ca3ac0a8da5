"""The funnel's page: every stage, what is absent, and text that is not trusted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from karma_ray.report.funnel_page import cell, render_funnel, screen
from karma_ray.report.funnel_table import Delta, Funnel, FunnelRow
from tests.report.test_page import read

ATTACK = "<script>$x$</script>"


@pytest.fixture
def funnel() -> Funnel:
    rows = [
        FunnelRow("recall", "HR@2%", 30.0, 20.0, None, Delta(10.0, 8.0, 12.0, (9.0, 11.0)),
                  None, 2.51),
        FunnelRow("prerank", "HR@10%", 50.0, None, 45.0, None, Delta(5.0, -1.0, 11.0, (5.0,)),
                  1.86),
    ]  # fmt: skip
    facts = {
        "data": ATTACK, "num_test": 10, "num_valid": 12, "num_users": 4, "num_items": 100,
        "seeds": [1, 2], "recalled": 2, "kept": 2, "pool": 20, "runs": [f"/runs/{ATTACK}"],
        "beside": [], "prerank_metric": "HR@10%",
    }  # fmt: skip
    return Funnel(
        facts, ["DERIVED queries: the log has none."], ["Ranking is not measured."], rows,
        {"recall/HR@2%": 30.0000004}, {"recall": [("lists", ATTACK)]}, {ATTACK: [(0, 1), (1, 2)]},
    )  # fmt: skip


def test_the_page_shows_stages_that_were_measured(funnel: Funnel, tmp_path: Path) -> None:
    page = Path(render_funnel(funnel, str(tmp_path)))
    text = page.read_text()
    assert ATTACK not in text and "&lt;script&gt;" in text
    read(str(page))  # well-formed
    for part in ("Recall", "Pre-ranking", "+10.00 [+8.00, +12.00]", "DERIVED queries", "+2.51"):
        assert part in text
    assert "<h2>Ranking</h2>" not in text and "Ranking is not measured." in text
    value = json.loads((tmp_path / "funnel.json").read_text())
    assert value["recall/HR@2%"] == 30.0 and value["labels"] == funnel.labels
    assert (tmp_path / "differences.png").exists() and (tmp_path / "weights.png").exists()


def test_the_screen_has_one_line_per_metric(funnel: Funnel) -> None:
    lines = screen(funnel).splitlines()
    assert max(map(len, lines)) <= 120
    assert next(line for line in lines if line.startswith("  HR@10%")).split()[1:] == [
        "50.00", "–", "45.00", "–", "+5.00", "[-1.00,", "+11.00]", "+1.86",
    ]  # fmt: skip
    assert lines[-2:] == ["DERIVED queries: the log has none.", "Ranking is not measured."]


def test_cells() -> None:
    assert (cell(None), cell(1.234), cell(1.0, signed=True)) == ("–", "1.23", "+1.00")
