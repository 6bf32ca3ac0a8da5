"""The importer of MIND: its two headerless tables, impressions, histories and split."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from karma_ray.artifacts import read_table
from karma_ray.data.config import PrepareConfig
from karma_ray.data.importers.registry import importer
from karma_ray.errors import InputError
from karma_ray.runs.preparation import prepare

NEWS = [
    'N1\tsports\tsoccer\tThe "Brands" Queen\tShop the notebooks.\thttps://x/1\t[]\t[]',
    "N2\tnews\tnewsus\tTwo\t\thttps://x/2\t[]\t[]",
    "N3\tnews\tnewsus\tThree\tThird.\thttps://x/3\t[]\t[]",
    "N4\tnews\tnewsus\t\tNo title.\thttps://x/4\t[]\t[]",
]
TRAIN = [
    "1\tU1\t11/11/2019 9:05:58 AM\tN1 N9 N2\tN3-0 N2-1 N1-0",
    "2\tU2\t11/12/2019 12:00:00 AM\t\tN1-1 N3-0",
    "3\tU1\t11/12/2019 1:00:00 PM\tN1 N9 N2\tN3-1 N1-0",
    "4\tU1\tyesterday\tN1\tN3-1",
    "5\tU1\t11/12/2019 1:00:00 PM\tN3-1",
]
DEV = [
    "1\tU3\t11/15/2019 8:00:00 AM\tN2\tN1-0 N3-1",
    "2\tU1\t11/15/2019 9:00:00 AM\tN1 N2 N3\tN1-1 N2-0",
    "3\tU1\t11/15/2019 9:00:00 AM\tN1 N2\tN1 N2",
]
FIRST = datetime(2019, 11, 11, 9, 5, 58, tzinfo=UTC)


def write_mind(folder: Path) -> Path:
    for split, news, rows in (("train", NEWS, TRAIN), ("dev", NEWS[1:3], DEV)):
        part = folder / f"MINDsmall_{split}"
        part.mkdir(parents=True)
        (part / "news.tsv").write_text("\n".join(news) + "\n")
        (part / "behaviors.tsv").write_bytes("\n".join(rows).encode() + b"\n")
    return folder


def run(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    manifest = importer("mind")(str(write_mind(folder / "mind")), str(folder / "out"))
    return manifest, read_table(str(folder / "out" / "events")).to_pylist()


def test_an_impression_is_a_page_with_what_was_shown_and_clicked(tmp_path: Path) -> None:
    manifest, pages = run(tmp_path)
    assert pages[0]["timestamp"] == FIRST
    assert pages[0]["exposed_item_ids"] == ["N3", "N2", "N1"]
    assert pages[0]["clicked_item_ids"] == ["N2"] and pages[0]["query"] is None
    assert manifest["negative_source"] == "exposed" and manifest["query_source"] == "none"
    assert manifest["counts"]["pages_with_negatives"] == 5
    assert manifest["quarantined"] == {
        "item without id or title": 1, "unparsable timestamp": 1, "not 5 tab-separated fields": 1,
        "impressions without labels, as in the test files": 1,
    }  # fmt: skip
    assert any(note.startswith("2 news are in several files") for note in manifest["notes"])
    (first, *_) = read_table(str(tmp_path / "out" / "items")).to_pylist()
    assert first["title"] == 'The "Brands" Queen' and first["category"] == "sports > soccer"


def test_a_user_s_first_history_is_read_once_and_lies_before_the_log(tmp_path: Path) -> None:
    manifest, pages = run(tmp_path)
    before = [page for page in pages if page["timestamp"] < FIRST]
    assert [(p["user_id"], p["clicked_item_ids"]) for p in before] == [
        ("U1", ["N1"]), ("U1", ["N2"]), ("U3", ["N2"]),
    ]  # fmt: skip
    assert [FIRST - page["timestamp"] for page in before] == [
        timedelta(seconds=s) for s in (3, 1, 1)
    ]
    assert not any(page["exposed_item_ids"] for page in before)
    assert any(note.startswith("1 clicks of histories name news") for note in manifest["notes"])


def test_the_split_counts_clicks_of_impressions_alone(tmp_path: Path) -> None:
    manifest, _ = run(tmp_path)
    assert manifest["test_start"] == "2019-11-15T09:00:00+00:00"
    facts = prepare(str(tmp_path / "out"), PrepareConfig())
    assert facts["test_start"] == manifest["test_start"]
    assert facts["counts"]["test_examples"] == 1


def test_a_missing_file_and_a_log_without_labels_are_named(tmp_path: Path) -> None:
    folder = write_mind(tmp_path / "mind")
    for part in folder.iterdir():
        (part / "behaviors.tsv").write_text(DEV[-1])
    with pytest.raises(InputError, match="no labelled impression"):
        importer("mind")(str(folder), str(tmp_path / "out"))
    for part in folder.iterdir():
        (part / "behaviors.tsv").unlink()
    with pytest.raises(InputError, match=r"expected file; choices: behaviors\.tsv"):
        importer("mind")(str(folder), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
