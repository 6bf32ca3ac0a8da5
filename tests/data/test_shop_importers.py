"""The importers of Amazon Reviews 2023 and Retailrocket, on rows in their own layouts."""

from __future__ import annotations

import gzip
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from karma_ray.artifacts import read_table
from karma_ray.data.importers.registry import importer
from karma_ray.errors import InputError

REVIEW = {
    "rating": 5.0, "title": "Great", "text": "Works.", "images": [], "asin": "B0COLOUR",
    "parent_asin": "B01", "user_id": "AEA", "timestamp": 1588687728923, "helpful_vote": 0,
    "verified_purchase": True,
}  # fmt: skip
PRODUCT = {
    "main_category": "All Beauty", "title": "Hair brush", "average_rating": 4.8,
    "rating_number": 10, "features": ["Soft", "Red"], "description": ["A brush."], "price": None,
    "images": [{"thumb": "https://x", "large": "https://y", "variant": "MAIN", "hi_res": None}],
    "videos": [], "store": "Acme", "categories": ["Beauty", "Hair"], "details": {"Color": "Red"},
    "parent_asin": "B01", "bought_together": None,
}  # fmt: skip


def rows(out: Path, table: str) -> list[dict[str, Any]]:
    return list(read_table(str(out / table)).to_pylist())


def write_amazon(folder: Path, *, packed: bool) -> Path:
    folder.mkdir()
    reviews = [
        REVIEW, REVIEW | {"user_id": "B", "verified_purchase": False, "rating": 1.0},
        REVIEW | {"user_id": None}, REVIEW | {"parent_asin": "B09"},
    ]  # fmt: skip
    products = [
        PRODUCT,
        PRODUCT | {"title": "again"},
        PRODUCT | {"parent_asin": "B02", "title": ""},
    ]
    for name, records in (("All_Beauty", reviews), ("meta_All_Beauty", products)):
        lines = [json.dumps(record).encode() for record in records]
        content = b"\n".join([*lines, b'{"user_id": "cut', b'{"title": "\xff"}'])
        if packed:
            (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(content))
        else:
            (folder / f"{name}.jsonl").write_bytes(content)
    return folder


def test_a_review_is_a_click_on_the_parent_product(tmp_path: Path) -> None:
    hashes = set()
    for packed in (False, True):
        source, out = write_amazon(tmp_path / f"{packed}", packed=packed), tmp_path / "out"
        manifest = importer("amazon_reviews_2023")(str(source), str(out))
        hashes.add(manifest["data_hash"])
    assert len(hashes) == 1
    pages = rows(out, "events")
    assert [page["clicked_item_ids"] for page in pages] == [["B01"], ["B01"]]
    assert [page["purchased_item_ids"] for page in pages] == [["B01"], []]
    assert pages[0]["timestamp"] == datetime(2020, 5, 5, 14, 8, 48, 923000, UTC)
    (item,) = rows(out, "items")
    assert item["text"] == "Soft Red A brush." and item["category"] == "Beauty > Hair"
    assert manifest["query_source"] == manifest["negative_source"] == "none"
    assert manifest["quarantined"] == {
        "not a JSON object": 2, "not UTF-8": 2, "null user": 1, "item not in the catalogue": 1,
        "repeated item id": 1, "item without title": 1,
    }  # fmt: skip


def test_reviews_without_their_products_are_named(tmp_path: Path) -> None:
    source = write_amazon(tmp_path / "source", packed=False)
    (source / "meta_All_Beauty.jsonl").unlink()
    with pytest.raises(InputError, match=r"expected file; choices: meta_All_Beauty\.jsonl"):
        importer("amazon_reviews_2023")(str(source), str(tmp_path / "out"))


MINUTE = 60_000


def write_retailrocket(folder: Path) -> Path:
    folder.mkdir()
    start = 1433221332117
    events = [
        (start, 7, "view", 100, ""), (start + MINUTE, 7, "addtocart", 100, ""),
        (start + 2 * MINUTE, 7, "transaction", 100, 4), (start + 3 * MINUTE, 7, "view", 200, ""),
        (start + 90 * MINUTE, 7, "view", 200, ""), (start, 8, "view", 300, ""),
        (start, 8, "gaze", 100, ""), ("", 8, "view", 100, ""),
    ]  # fmt: skip
    tables = {
        "events.csv": ("timestamp,visitorid,event,itemid,transactionid", events),
        "item_properties_part1.csv": (
            "timestamp,itemid,property,value",
            [(2, 100, "categoryid", 9), (1, 100, "categoryid", 27), (1, 100, 888, "n5.000 77"),
             (1, 100, "available", 1), (1, 200, 790, "n9.000")],
        ),
        "item_properties_part2.csv": (
            "timestamp,itemid,property,value", [(3, 100, 790, "n3.000"), (3, 100, 888, "later")],
        ),
        "category_tree.csv": ("categoryid,parentid", [(27, 1), (1, ""), (9, 1)]),
    }  # fmt: skip
    for name, (header, content) in tables.items():
        lines = [",".join(map(str, row)) for row in content]
        (folder / name).write_text("\n".join([header, *lines]) + "\n")
    return folder


def test_looks_at_one_item_in_a_row_are_one_page(tmp_path: Path) -> None:
    source, out = write_retailrocket(tmp_path / "source"), tmp_path / "out"
    manifest = importer("retailrocket")(str(source), str(out))
    pages = [
        (p["user_id"], p["clicked_item_ids"], p["purchased_item_ids"], p["session_id"])
        for p in rows(out, "events")
    ]
    assert pages == [
        ("7", ["100"], ["100"], "7-1"), ("7", ["200"], [], "7-1"), ("7", ["200"], [], "7-2"),
    ]  # fmt: skip
    assert rows(out, "events")[0]["timestamp"] == datetime(2015, 6, 2, 5, 2, 12, 117000, UTC)
    assert "2 events were folded into the page before them" in manifest["notes"]
    assert manifest["quarantined"] == {
        "item not in the catalogue": 1, "unknown kind of event": 1, "unparsable timestamp": 1,
    }  # fmt: skip


def test_properties_are_the_first_ever_seen(tmp_path: Path) -> None:
    out = tmp_path / "out"
    importer("retailrocket")(str(write_retailrocket(tmp_path / "source")), str(out))
    items = [(i["item_id"], i["title"], i["text"], i["category"]) for i in rows(out, "items")]
    assert items == [
        ("100", "c1 > c27", "n3.000 n5.000 77", "c1 > c27"), ("200", "n9.000", "n9.000", None),
    ]  # fmt: skip


def test_a_file_of_retailrocket_that_is_missing_is_named(tmp_path: Path) -> None:
    source = write_retailrocket(tmp_path / "source")
    (source / "item_properties_part2.csv").unlink()
    with pytest.raises(InputError, match=r"item_properties_part2\.csv"):
        importer("retailrocket")(str(source), str(tmp_path / "out"))
