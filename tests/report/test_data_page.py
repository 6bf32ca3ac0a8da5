"""The page of a data folder says what its numbers say, and needs nothing beside itself."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from jobs import describe as job
from jobs import prepare as preparing
from karma_ray.data.description import describe
from karma_ray.report.data_page import data_screen, labels, render_data_page
from tests.data.logs import event
from tests.data.test_description import shop, write_data


def test_the_job_prints_a_screen_and_writes_a_page_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job.main([write_data(tmp_path, shop())])
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) <= 40
    assert "12 users" in printed and str(tmp_path / "description.html") in printed
    page = (tmp_path / "description.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert "red big lamp" in page and "No row was set aside" in page


def test_preparing_reads_a_small_log_again_to_describe_it_and_of_a_large_one_says_how(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_data(tmp_path, shop())
    preparing.main(["--data", data])
    assert str(tmp_path / "description.html") in capsys.readouterr().out
    (tmp_path / "description.html").unlink()
    monkeypatch.setattr(preparing, "DESCRIBED_ROWS", 1)
    monkeypatch.delattr(preparing, "describe")
    preparing.main(["--data", data])
    assert f"python jobs/describe.py {data}" in capsys.readouterr().out
    assert not (tmp_path / "description.html").exists()


def test_derived_queries_and_proxies_are_labelled(tmp_path: Path) -> None:
    numbers = describe(write_data(tmp_path, shop()))
    numbers |= {"query_source": "derived", "negative_source": "proxy"}
    assert len(labels(numbers)) == 2
    assert "queries DERIVED, negatives PROXY" in data_screen(numbers)


def test_a_log_without_clicks_queries_or_times_has_a_page_too(tmp_path: Path) -> None:
    numbers = describe(write_data(tmp_path, [event("u", None, [], None, None)]))
    page = Path(render_data_page(numbers, str(tmp_path)))
    assert "data:image/png" in page.read_text() or page.exists()
    assert data_screen(numbers)
