"""Importers: tiny source folders in each dataset's shape, and what must hold of the output."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from jobs import import_data
from karma_ray.artifacts import read_json, read_manifest, read_table
from karma_ray.data.importers.amazon_industrial import clean_text, training_history
from karma_ray.data.importers.derive import POOL_DAYS, shared_queries
from karma_ray.data.importers.log_files import TextFormat
from karma_ray.data.importers.long import import_long, parse_mapping
from karma_ray.data.importers.long_parsing import timestamp
from karma_ray.data.importers.presplit import Step, windows
from karma_ray.data.importers.registry import importer
from karma_ray.data.prepared import PreparedData
from karma_ray.errors import InputError

DAY = timedelta(days=1)
START = datetime(2020, 1, 1)


def rows(out: Path, table: str) -> list[dict[str, Any]]:
    return list(read_table(str(out / table)).to_pylist())


def write_hm(folder: Path) -> Path:
    """Four articles of one query, one of its own, one of unknown type; sales over 40 days."""
    folder.mkdir()
    kinds = ["Dress"] * 4 + ["Hat", "Unknown"]
    names = [f"article {n}" for n in range(6)]
    articles = pl.DataFrame({"article_id": [f"00{n}" for n in range(6)], "prod_name": names})
    constant = {
        "index_group_name": "Ladieswear", "garment_group_name": "Jersey",
        "colour_group_name": "Black", "department_name": "Basic", "section_name": "Women",
        "graphical_appearance_name": "Solid", "detail_desc": "Soft.", "product_code": 1,
    }  # fmt: skip
    articles = articles.with_columns(
        pl.Series("product_type_name", kinds), **{k: pl.lit(v) for k, v in constant.items()}
    )
    articles.write_parquet(folder / "articles.parquet")
    sales = [
        (0, "ann", "000"), (0, "ann", "000"), (0, "bob", "001"), (3, "bob", "002"),
        (4, "ann", "001"), (4, "ann", "004"), (5, "ann", "005"), (6, "cy", "003"),
        (30, "bob", "000"), (31, "ann", "002"),
    ]  # fmt: skip
    pl.DataFrame(
        {
            "t_dat": [START + day * DAY for day, _, _ in sales],
            "customer_id": [user for _, user, _ in sales],
            "article_id": [item for _, _, item in sales],
        }
    ).write_parquet(folder / "transactions.parquet")
    for shard, ids in enumerate((["000", "001"], ["002"])):
        pictures = {"article_id": ids, "jpeg": [f"jpeg {i}".encode() for i in ids]}
        pl.DataFrame(pictures).write_parquet(folder / f"images-0000{shard}.parquet")
    return folder


def write_retail(folder: Path) -> Path:
    folder.mkdir()
    names = ["RED MUG", "BLUE MUG", "BIG  MUG", "TEA MUG", "OLD MUG", "WOODEN CLOCK"]
    sales: list[tuple[str, str, str | None, int, int, int | None]] = [
        (f"10{n}", f"2222{n}", name, 1, n, 1 + n % 2) for n, name in enumerate(names)
    ]
    sales += [
        ("C200", "22220", "RED MUG", -1, 7, 1), ("201", "22220", "RED MUG", 1, 7, None),
        ("202", "POST", "POSTAGE", 1, 7, 1), ("203", "22220", "damaged", -5, 7, 2),
        ("204", "22220", "RED MUG", 2, 8, 2), ("204", "22220", "RED MUG", 3, 8, 2),
        ("204", "22225", "clock, wooden", 1, 8, 2), ("205", "22225", "WOODEN CLOCK", 1, 9, 1),
    ]  # fmt: skip
    columns = ("InvoiceNo", "StockCode", "Description", "Quantity", "InvoiceDate", "CustomerID")
    frame = pl.DataFrame(sales, schema=list(columns), orient="row")
    days = START + pl.col("InvoiceDate") * pl.lit(DAY)
    frame.with_columns(days.alias("InvoiceDate")).write_parquet(folder / "online_retail.parquet")
    return folder


def write_movielens(folder: Path) -> Path:
    folder.mkdir()
    pl.DataFrame(
        {
            "item_id": [1, 2, 3, 4],
            "movie_title": ["One", "Two", "Three", "unkonwn"],
            "release_year": ["1990", "1991", "1992", "unkonwn"],
            "class": ["Drama War", "Drama", "Comedy", "unknown"],
            "ml1m_id": [11, 12, None, None],
        }
    ).write_parquet(folder / "ml100k_items.parquet")
    pl.DataFrame({"ml1m_id": [11], "jpeg": [b"poster"]}).write_parquet(folder / "posters.parquet")
    ratings = [(7, 1, 5, 100), (7, 2, 2, 100), (7, 3, 4, 100), (8, 1, 1, 200), (8, 4, 5, 300)]
    schema = ["user_id", "item_id", "rating", "timestamp"]
    frame = pl.DataFrame(ratings, schema=schema, orient="row")
    frame.write_parquet(folder / "ml100k_interactions.parquet")
    return folder


def write_amazon(folder: Path) -> Path:
    folder.mkdir()
    stem = "Industrial_and_Scientific"
    pl.DataFrame(
        {
            "item_id": list(range(6)),
            "title": [f"bolt &amp; nut {n}" for n in range(6)],
            "description": ["<b>Steel</b>", "", "['a', 'b']", None, "x", "y"],
            "brand": ["Acme", "", None, "B", "B", "B"],
        }
    ).write_parquet(folder / f"{stem}.items.parquet")
    valid = [("u", [0, 1], 2), ("u", [0, 1, 2], 3), ("v", [1], 1)]
    test = [("u", [1, 2, 3], 4), ("w", [5], 0)]
    for split, content in (("valid", valid), ("test", test)):
        schema = ["user_id", "history_item_id", "item_id"]
        frame = pl.DataFrame(content, schema=schema, orient="row")
        frame.write_parquet(folder / f"{stem}.{split}.parquet")
    return folder


def write_kuaisearch(folder: Path) -> Path:
    folder.mkdir()
    items = [
        {"item_id": 1, "item_title": "红色连衣裙", "brand_name": "无品牌",
         "category_level1_name": "女装", "category_level2_name": "UNKNOWN"},
        {"item_id": 2, "item_title": "蓝色连衣裙", "brand_name": "B",
         "category_level1_name": "女装", "category_level2_name": "裙"},
        {"item_id": 2, "item_title": "again", "brand_name": "B", "category_level1_name": "女装"},
    ]  # fmt: skip
    page = {"user_id": 5, "session_id": 9, "query": "连衣裙", "time_index": 10}
    pages = [
        page | {"impressed_item_ids": [1, 2, 3], "clicked_item_ids": [1, 3],
                "purchased_item_ids": [1]},
        page | {"impressed_item_ids": [3], "clicked_item_ids": [3], "purchased_item_ids": []},
        page | {"user_id": None, "impressed_item_ids": [1], "clicked_item_ids": [],
                "purchased_item_ids": []},
    ]  # fmt: skip
    for name, content in (("items", items), ("recall", pages)):
        lines = [json.dumps(record, ensure_ascii=False) for record in content]
        content = "\n".join([*lines, '{"item_title": "cut in the midd']).encode()
        (folder / f"{name}.jsonl").write_bytes(content + b'\n{"title": "\xff"}')
    return folder


def write_jdsearch(folder: Path) -> Path:
    folder.mkdir()
    header = "wid name brand_id brand_name cate_id_1 cate_name_1 cate_id_2 cate_name_2 cate_id_3"
    names = [*header.split(), "cate_name_3", "cate_id_4", "cate_name_4", "shop_id"]
    products = [[str(n), f"7\x18{n}", *["8"] * 11] for n in range(6)]
    lines = ["\t".join(values) for values in [names, *products]]
    (folder / "product_meta_data_sample.txt").write_text("\n".join(lines), encoding="utf-8")
    behaviour = [
        ["query", "candidate_wid_list", "candidate_label_list", "history_qry_list",
         "history_wid_list", "history_type_list", "history_time_list"],
        ["3\x184", "4_5_0_9", "2.0_0.0_0.0_1.0", "-1_5_5_-1_-1", "0_1_2_2_3",
         "ORD_CLICK_CLICK_CART_CLICK", "0_60_5_7_9_99"],
        ["3", "1_2", "0.0_0.0", "-1", "0", "CLICK", "0_5"],
        ["3", "1_2", "0.0", "-1", "0", "CLICK", "0_5"],
    ]  # fmt: skip
    lines = ["\t".join(values) for values in behaviour]
    (folder / "user_behavior_data_sample.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


WRITERS: dict[str, Callable[[Path], Path]] = {
    "hm": write_hm,
    "online_retail": write_retail,
    "movielens": write_movielens,
    "amazon_industrial": write_amazon,
    "kuaisearch": write_kuaisearch,
    "jdsearch": write_jdsearch,
}


def run(name: str, folder: Path, seed: int = 0) -> tuple[dict[str, Any], Path]:
    out = folder / f"out-{seed}"
    source = folder / "source"
    if not source.exists():
        WRITERS[name](source)
    return importer(name)(str(source), str(out), seed=seed), out


# What holds for every dataset


@pytest.mark.parametrize("name", WRITERS)
def test_every_import_is_a_labelled_data_folder(name: str, tmp_path: Path) -> None:
    manifest, out = run(name, tmp_path)
    assert manifest == read_manifest(str(out), "data")
    assert manifest["query_source"] in ("real", "derived", "none")
    assert manifest["negative_source"] in ("exposed", "proxy", "feedback", "none")
    assert manifest["notes"] and manifest["licence"]
    assert manifest["counts"]["items"] == len(rows(out, "items"))
    assert manifest["counts"]["users"] > 0
    if manifest["quarantined"]:
        quarantined = Counter(row["reason"] for row in rows(out, "quarantine_import"))
        assert quarantined == manifest["quarantined"]


@pytest.mark.parametrize("name", WRITERS)
def test_an_import_depends_on_nothing_but_source_and_seed(name: str, tmp_path: Path) -> None:
    first, out = run(name, tmp_path)
    assert importer(name)(str(tmp_path / "source"), str(out), seed=0) == first


@pytest.mark.parametrize("name", WRITERS)
def test_the_hash_of_the_data_is_the_same_wherever_they_lie(name: str, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    here, there = run(name, tmp_path)[0], run(name, tmp_path / "elsewhere")[0]
    assert here["data_hash"] == there["data_hash"]


@pytest.mark.parametrize("name", WRITERS)
def test_a_missing_file_is_named(name: str, tmp_path: Path) -> None:
    source = WRITERS[name](tmp_path / "source")
    gone = sorted(p for p in source.iterdir() if not p.name.startswith("images"))[0]
    gone.unlink()
    with pytest.raises(InputError, match=gone.name):
        importer(name)(str(source), str(tmp_path / "out"))


@pytest.mark.parametrize("name", ["hm", "online_retail", "movielens", "amazon_industrial"])
def test_a_missing_column_is_named_and_nothing_is_overwritten(name: str, tmp_path: Path) -> None:
    manifest, out = run(name, tmp_path)
    for file in sorted((tmp_path / "source").glob("*.parquet")):
        if not file.name.startswith("images"):
            pl.read_parquet(file).select(pl.lit(1).alias("other")).write_parquet(file)
    with pytest.raises(InputError, match=r"is missing in .*choices: other"):
        importer(name)(str(tmp_path / "source"), str(out))
    assert read_manifest(str(out)) == manifest


def test_a_folder_of_something_else_is_not_emptied(tmp_path: Path) -> None:
    source, out = write_movielens(tmp_path / "source"), tmp_path / "precious"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="is not empty"):
        importer("movielens")(str(source), str(out))
    assert (out / "thesis.txt").exists()


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_a_failed_import_leaves_what_was_there_and_can_be_repaired(tmp_path: Path) -> None:
    _, out = fold(tmp_path)
    (out / "visual_features").mkdir()
    (out / "visual_features" / "mine.txt").write_text("not of the import")
    before = contents(out)
    (tmp_path / "untitled.csv").write_text("sku,name\n0001,\n")
    for where in (out, tmp_path / "new"):
        with pytest.raises(InputError, match="the catalogue is empty"):
            import_long(
                str(tmp_path / "log.csv"), str(where), items=str(tmp_path / "untitled.csv"),
                columns=parse_mapping(COLUMNS, "--columns"),
                item_columns={"item_id": "sku", "title": "name"},
            )  # fmt: skip
    assert contents(out) == before and not (tmp_path / "new").exists()
    manifest, out = fold(tmp_path, LOG + "u3,2024-05-03,lamp,0001,1,1\n")
    assert manifest["counts"]["users"] == 3 and (out / "visual_features" / "mine.txt").exists()


def test_what_a_killed_import_left_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "out" / "import-work" / "items").mkdir(parents=True)
    (tmp_path / "out" / "items").mkdir()
    _, out = fold(tmp_path)
    assert not (out / "import-work").exists() and read_manifest(str(out), "data")


def test_an_unknown_format_lists_the_choices() -> None:
    with pytest.raises(InputError, match=r"FORMAT: 'h-m'.*choices: hm, .*long"):
        importer("h-m")


# Derived queries and proxy negatives


@pytest.mark.parametrize("name", ["hm", "online_retail", "movielens"])
def test_at_least_two_items_share_every_derived_query(name: str, tmp_path: Path) -> None:
    _, out = run(name, tmp_path)
    matches = {row["query"]: row["item_ids"] for row in rows(out, "query_matches")}
    assert matches and all(len(items) >= 2 for items in matches.values())
    asked = {row["query"] for row in rows(out, "events")} - {None}
    assert asked <= set(matches)
    for page in rows(out, "events"):
        if page["query"]:
            assert set(page["clicked_item_ids"]) <= set(matches[page["query"]])


def test_a_query_of_one_item_is_no_query() -> None:
    items = pl.DataFrame({"item_id": ["a", "b", "c"], "query": ["x", "x", "y"]})
    assert shared_queries(items)["query"].to_list() == ["x", "x", None]
    assert shared_queries(items, 3)["query"].to_list() == [None] * 3


@pytest.mark.parametrize("name", ["hm", "online_retail"])
def test_proxies_match_the_query_and_were_on_sale_and_not_bought(name: str, tmp_path: Path) -> None:
    _, out = run(name, tmp_path)
    pages = rows(out, "events")
    matches = {row["query"]: set(row["item_ids"]) for row in rows(out, "query_matches")}
    num_proxies = 0
    for page in pages:
        time, proxies = page["timestamp"], set(page["exposed_item_ids"])
        if proxies:
            assert set(page["clicked_item_ids"]) <= proxies
        proxies -= set(page["clicked_item_ids"])
        num_proxies += len(proxies)
        earlier = [other for other in pages if other["timestamp"] <= time]
        on_sale = {
            item
            for other in earlier
            if other["timestamp"] >= time - POOL_DAYS * DAY
            for item in other["clicked_item_ids"]
        }
        own = [other for other in earlier if other["user_id"] == page["user_id"]]
        assert proxies <= matches.get(page["query"], set())
        assert proxies <= on_sale, "sold in the window, and never only in the future"
        assert not proxies & {item for other in own for item in other["clicked_item_ids"]}
    assert num_proxies > 0


def test_later_sales_do_not_change_earlier_pages(tmp_path: Path) -> None:
    _, out = run("hm", tmp_path)
    before = rows(out, "events")
    file = tmp_path / "source" / "transactions.parquet"
    sales = pl.read_parquet(file)
    later = sales.tail(3).with_columns(
        pl.col("t_dat") + pl.lit(DAY), pl.lit("dan").alias("customer_id")
    )
    pl.concat([sales, later]).write_parquet(file)
    run("hm", tmp_path)
    last = max(page["timestamp"] for page in before)
    kept = [p for p in rows(out, "events") if p["timestamp"] < last and p["user_id"] != "dan"]
    assert kept == [page for page in before if page["timestamp"] < last]


# One dataset each


def test_hm_units_are_one_purchase_and_pictures_stay_with_their_article(tmp_path: Path) -> None:
    manifest, out = run("hm", tmp_path)
    assert manifest["counts"]["clicks"] == 9 and manifest["counts"]["with_image"] == 3
    assert any(note.startswith("1 rows were further units") for note in manifest["notes"])
    for item in rows(out, "items"):
        expected = f"jpeg {item['item_id']}".encode() if item["item_id"] < "003" else None
        assert item["image"] == expected
    first = rows(out, "items")[0]
    assert first["category"] == "Ladieswear > Jersey > Dress"
    assert first["text"] == "Black, Solid, Basic, Women. Soft."
    queries = {page["query"] for page in rows(out, "events")}
    assert queries == {"ladieswear dress", None}  # one hat and the unknown type name nothing


def test_hm_s_full_catalogue_gives_texts_that_are_no_items(tmp_path: Path) -> None:
    source = write_hm(tmp_path / "source")
    plain = import_data.main(["hm", str(source), str(tmp_path / "plain")])
    assert not (tmp_path / "plain" / "other_items").exists()
    articles = pl.read_parquet(source / "articles.parquet")
    more = articles.with_columns(article_id=pl.format("9{}", "article_id"))
    pl.concat([articles, more]).write_parquet(source / "articles_all_12.parquet")
    manifest = import_data.main(["hm", str(source), str(tmp_path / "out")])
    others = rows(tmp_path / "out", "other_items")
    assert [item["item_id"] for item in others] == [f"900{n}" for n in range(6)]
    assert others[0]["text"] == "Black, Solid, Basic, Women. Soft."
    assert manifest["counts"].pop("other_items") == 6
    assert manifest["counts"] == plain["counts"]
    assert manifest["data_hash"] == plain["data_hash"]  # records name the same data


def test_retail_rows_that_are_no_purchase_are_quarantined_by_reason(tmp_path: Path) -> None:
    manifest, out = run("online_retail", tmp_path)
    assert manifest["quarantined"] == {
        "cancellation": 1,
        "quantity not positive": 1,
        "code is no product (not five digits)": 1,
        "no customer": 1,
    }
    titles = {item["item_id"]: item["title"] for item in rows(out, "items")}
    assert titles["22225"] == "WOODEN CLOCK" and titles["22222"] == "BIG MUG"
    last = [page for page in rows(out, "events") if page["session_id"] == "204"]
    assert [(page["query"], page["clicked_item_ids"]) for page in last] == [
        ("mug", ["22220"]),
        (None, ["22225"]),
    ]


def test_low_ratings_of_the_same_page_are_the_negatives(tmp_path: Path) -> None:
    manifest, out = run("movielens", tmp_path)
    assert manifest["negative_source"] == "feedback"
    pages = [
        (p["query"], p["exposed_item_ids"], p["clicked_item_ids"]) for p in rows(out, "events")
    ]
    assert pages == [("drama", ["1", "2"], ["1"]), (None, ["3"], ["3"])]
    assert rows(out, "events")[0]["timestamp"] == datetime(1970, 1, 1, 0, 1, 40, tzinfo=UTC)
    assert manifest["quarantined"] == {"title unknown": 1, "item not in the catalogue": 1}
    assert [item["image"] for item in rows(out, "items")] == [b"poster", None, None]


def test_amazon_trains_on_no_target_and_on_each_click_once(tmp_path: Path) -> None:
    manifest, out = run("amazon_industrial", tmp_path)
    data = PreparedData.load(str(out))
    trained = {row["user_id"]: row["item_ids"] for row in data.sequences().to_pylist()}
    assert trained == {"u": ["0", "1"], "v": ["1"]}
    assert all(all(row["loss_mask"]) for row in data.sequences().to_pylist())
    assert data.facts["presplit"] and data.facts["valid_start"] is None
    test = data.examples("test").to_pylist()
    assert [(row["history_item_ids"], row["positive_item_id"]) for row in test] == [
        (["1", "2", "3"], "4"),
        (["5"], "0"),
    ]
    assert all(row["timestamp"] is None and row["hard_negative_ids"] == [] for row in test)
    first = data.catalog().texts()[0]
    assert first == "bolt & nut 0 | Acme | Steel"
    assert manifest["counts"]["training_clicks"] == 3


def test_amazon_takes_the_category_from_the_names_of_the_files(tmp_path: Path) -> None:
    source = write_amazon(tmp_path / "source")
    for file in source.iterdir():
        file.rename(source / file.name.replace("Industrial_and_Scientific", "Office_Products"))
    manifest, _ = run("amazon_industrial", tmp_path)
    assert manifest["name"] == "amazon_office_products"
    assert manifest["notes"][0] == "category Office Products"
    (source / "Toys.items.parquet").write_bytes(b"")
    with pytest.raises(InputError, match="several categories: Office_Products, Toys"):
        run("amazon_industrial", tmp_path)


def test_the_training_history_is_the_one_no_other_row_leads_to() -> None:
    chain = [([f"{i}" for i in range(max(0, n - 3), n)], f"{n}") for n in range(1, 7)]
    assert training_history(chain[::-1], 3) == ["0"]
    # a gap: two rows start a chain, so nothing that is a target may be trained on
    assert training_history([(["a", "b"], "c"), (["d"], "b")], 3) == ["a"]


def test_descriptions_lose_markup_and_keep_comparisons() -> None:
    assert clean_text("['5 &lt; 6 mm', 'it's <br/>good']") == "5 < 6 mm it's good"
    assert clean_text("primers & amp; paint<script>x()</script>") == "primers & paint"
    assert clean_text(None) == ""


def test_kuaisearch_keeps_what_has_a_title_and_counts_the_rest(tmp_path: Path) -> None:
    manifest, out = run("kuaisearch", tmp_path)
    (page,) = rows(out, "events")
    assert page["exposed_item_ids"] == ["1", "2"] and page["clicked_item_ids"] == ["1"]
    assert page["query"] == "连衣裙" and page["session_id"] == "9"
    assert any("2 impressions and 2 clicks" in note for note in manifest["notes"])
    assert manifest["quarantined"] == {
        "repeated item id": 1,
        "not a JSON object": 4,
        "null user": 1,
    }
    brands = [item["brand"] for item in rows(out, "items")]
    assert brands == [None, "B"]


def test_jdsearch_pages_follow_queries_and_zero_intervals(tmp_path: Path) -> None:
    manifest, out = run("jdsearch", tmp_path)
    data = PreparedData.load(str(out))
    first = data.sequences().to_pylist()[0]
    assert first["item_ids"] == ["0", "1", "2"]  # the second 2 repeats it; 3 is held out
    assert first["queries"] == [None, "t5", "t5"] and first["timestamps"] is None
    assert first["page_ids"][1] == first["page_ids"][2] != first["page_ids"][0]
    (valid,) = data.examples("valid").to_pylist()
    assert valid["positive_item_id"] == "3" and valid["history_item_ids"] == ["0", "1", "2"]
    (test,) = data.examples("test").to_pylist()
    assert test["positive_item_id"] == "4" and test["hard_negative_ids"] == ["5", "0"]
    assert test["query"] == "t3 t4" and test["timestamp"] is None
    assert manifest["quarantined"] == {"candidate lists of unequal length": 1}


@pytest.mark.parametrize("length", [1, 7, 8, 9, 30])
def test_windows_overlap_in_context_and_never_in_loss(length: int) -> None:
    steps = [Step(f"i{n}", f"p{n}") for n in range(length)]
    made = list(windows("u", steps, max_steps=8))
    pairs = [pair for row in made for pair in zip(row["item_ids"], row["loss_mask"], strict=True)]
    assert [item for item, loss in pairs if loss] == [step.item_id for step in steps]
    assert all(len(row["item_ids"]) <= 8 for row in made)
    assert all(row["loss_mask"].index(True) >= 4 for row in made[1:])


# Row-per-exposure logs

LOG = """uid,ts,q,sku,click,pos
u1,2024-05-01T10:00:00Z,red shoe,0001,0,2
u1,2024-05-01T10:00:00Z,red shoe,0002,true,1
u1,2024-05-01T12:00:00+02:00,red shoe,0003,no,3
u2,1714557600,,0001,1,1
u2,1714557600000,,0002,,2
,2024-05-01,q,0001,1,1
u2,yesterday,q,0001,1,1
u2,2024-05-02,q,0001,perhaps,1
u2,2024-05-02,q,,1,1
"""
COLUMNS = "user_id=uid,item_id=sku,timestamp=ts,query=q,clicked=click,position=pos"
ITEM_TABLE = "sku,name,shade\n0001,red shoe,red\n0002,blue shoe,blue\n0003,,red\n0001,again,red\n"


def write_long(folder: Path, log: str = LOG) -> tuple[str, str]:
    (folder / "log.csv").write_text(log)
    (folder / "items.csv").write_text(ITEM_TABLE)
    return str(folder / "log.csv"), str(folder / "items.csv")


def fold(folder: Path, log: str = LOG, columns: str = COLUMNS) -> tuple[dict[str, Any], Path]:
    source, items = write_long(folder, log)
    out = folder / "out"
    mapping = parse_mapping(columns, "--columns")
    item_mapping = {"item_id": "sku", "title": "name"}
    manifest = import_long(
        source, str(out), items=items, columns=mapping, item_columns=item_mapping
    )
    return manifest, out


def test_exposures_of_one_user_time_and_query_are_one_page_in_order_of_position(
    tmp_path: Path,
) -> None:
    manifest, out = fold(tmp_path)
    pages = rows(out, "events")
    assert [page["user_id"] for page in pages] == ["u1", "u2"]
    assert pages[0]["exposed_item_ids"] == ["0002", "0001", "0003"]
    assert pages[0]["clicked_item_ids"] == ["0002"] and pages[0]["query"] == "red shoe"
    assert pages[1]["exposed_item_ids"] == ["0001", "0002"] and pages[1]["query"] is None
    ten = datetime(2024, 5, 1, 10, tzinfo=UTC)
    assert {page["timestamp"] for page in pages} == {ten}  # all four ways of writing it
    assert manifest["query_source"] == "real" and manifest["negative_source"] == "exposed"


def test_bad_rows_are_quarantined_with_their_reason_and_place(tmp_path: Path) -> None:
    manifest, out = fold(tmp_path)
    expected = {
        "null user": 5, "unparsable timestamp": 6, "unparsable clicked": 7, "null item": 8,
        "item without title": 2, "repeated item id": 3,
    }  # fmt: skip
    assert manifest["quarantined"] == dict.fromkeys(expected, 1)
    found = {row["reason"]: row for row in rows(out, "quarantine_import")}
    assert {reason: row["row"] for reason, row in found.items()} == expected
    assert found["null user"]["source_file"].endswith("log.csv")
    assert json.loads(found["unparsable timestamp"]["record"])["timestamp"] == "yesterday"
    assert [item["shade"] for item in rows(out, "items")] == ["red", "blue"]  # rides along


def test_odd_quotes_and_broken_lines_cost_no_other_row(tmp_path: Path) -> None:
    log = "user_id\ttimestamp\tquery\titem_id\tclicked\n" + "\n".join(
        ['u1\t1\t"big lamp\t0001\t1', "u2\t2\tlamp\t0002\t1", 'u3\t3\t15" tv\t0001\t1',
         "u4\t4\t0001", 'u5\t5\t"tv"\t0001\t1']
    )  # fmt: skip
    (tmp_path / "log.tsv").write_text(log)
    (tmp_path / "items.csv").write_text('item_id,title\n0001,"Lamp 12\n0002,15" tv\n0003\n')
    out = tmp_path / "out"
    source, items = str(tmp_path / "log.tsv"), str(tmp_path / "items.csv")
    manifest = import_long(source, str(out), items=items)
    queries = {page["user_id"]: page["query"] for page in rows(out, "events")}
    assert queries == {"u1": '"big lamp', "u2": "lamp", "u3": '15" tv', "u5": '"tv"'}
    assert [item["title"] for item in rows(out, "items")] == ['"Lamp 12', '15" tv']
    assert manifest["quarantined"] == {"not as many fields as the header": 2}
    assert any("2 rows of" in note and "--quotes" in note for note in manifest["notes"])
    import_long(source, str(out), items=items, form=TextFormat("csv"))
    assert {page["user_id"]: page["query"] for page in rows(out, "events")}["u5"] == "tv"


def test_a_broken_json_line_stops_nothing_and_digits_are_kept(tmp_path: Path) -> None:
    rest = '"item_id": "a", "clicked": true}'
    lines = [
        '{"user_id": 1234567890123456789, "timestamp": 1, ' + rest, "{broken", "[1]",
        '{"user_id": 1234567890123456790, "timestamp": 2.5, ' + rest,
    ]  # fmt: skip
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    (tmp_path / "items.jsonl").write_text('{"item_id": "a", "title": "A"}')
    out = tmp_path / "out"
    manifest = import_long(
        str(tmp_path / "log.jsonl"), str(out), items=str(tmp_path / "items.jsonl")
    )
    assert manifest["quarantined"] == {"not a JSON object": 2}
    assert [row["row"] for row in rows(out, "quarantine_import")] == [1, 2]
    users = [page["user_id"] for page in rows(out, "events")]
    assert users == ["1234567890123456789", "1234567890123456790"]


def test_files_of_different_id_types_name_the_same_people_and_items(tmp_path: Path) -> None:
    source = tmp_path / "log"
    source.mkdir()
    times = [1, 2]
    pl.DataFrame(
        {"user_id": [1234567890123456789, 1234567890123456790], "timestamp": times,
         "item_id": ["7", "8"], "clicked": [True, False]}
    ).write_parquet(source / "a.parquet")  # fmt: skip
    pl.DataFrame(
        {"user_id": [5.0, float("nan")], "timestamp": times, "item_id": ["7", "8"],
         "clicked": [True, True]}
    ).write_parquet(source / "b.parquet")  # fmt: skip
    pl.DataFrame({"item_id": [7.0, 8.0], "title": ["a", "b"]}).write_parquet(
        tmp_path / "items.parquet"
    )
    out = tmp_path / "out"
    manifest = import_long(str(source), str(out), items=str(tmp_path / "items.parquet"))
    users = {page["user_id"] for page in rows(out, "events")}
    assert users == {"1234567890123456789", "1234567890123456790", "5"}
    assert manifest["quarantined"] == {"null user": 1} and manifest["counts"]["clicks"] == 2
    assert [item["item_id"] for item in rows(out, "items")] == ["7", "8"]
    pl.DataFrame(
        {"user_id": [1234567890123456789.0], "timestamp": [1], "item_id": ["7"], "clicked": [True]}
    ).write_parquet(source / "b.parquet")
    with pytest.raises(InputError, match=r"b\.parquet: column user_id: 1\.23.*rounded"):
        import_long(str(source), str(out), items=str(tmp_path / "items.parquet"))


def test_what_editors_and_clusters_leave_beside_a_log_is_not_imported(tmp_path: Path) -> None:
    line = "user_id,timestamp,item_id\nu,1,7\n"
    for name in ("log/a.csv", "log/.ipynb_checkpoints/a.csv", "log/_temporary/a.csv", "log/.a.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(line)
    (tmp_path / "log" / ".a.csv.crc").write_bytes(b"\x00")
    (tmp_path / "log" / "empty.csv").write_bytes(b"")
    (tmp_path / "items.csv").write_text("item_id,title\n7,a\n")
    manifest = import_long(
        str(tmp_path / "log"), str(tmp_path / "out"), items=str(tmp_path / "items.csv")
    )
    assert manifest["counts"]["clicks"] == 1


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_missing_label_is_no_click_and_a_missing_user_nobody(ending: str, tmp_path: Path) -> None:
    nan = float("nan")
    log = pl.DataFrame(
        {"user_id": ["u", "u", "nan", "NULL", "None", "\\N", "NaN"], "timestamp": [1] * 7,
         "item_id": ["7", "8", *["7"] * 5], "clicked": [1.0, nan, *[1.0] * 5],
         "purchased": [nan, 1.0, *[nan] * 5]}
    )  # fmt: skip
    source = tmp_path / f"log.{ending}"
    log.write_csv(source) if ending == "csv" else log.write_parquet(source)
    (tmp_path / "items.csv").write_text("item_id,title\n7,a\n8,b\n9,nan\n")
    manifest = import_long(str(source), str(tmp_path / "out"), items=str(tmp_path / "items.csv"))
    (page,) = rows(tmp_path / "out", "events")
    assert page["clicked_item_ids"] == ["7"] and page["purchased_item_ids"] == ["8"]
    assert page["exposed_item_ids"] == ["7", "8"]
    assert manifest["quarantined"] == {"item without title": 1, "null user": 5}


@pytest.mark.parametrize("kind", [pl.Int32, pl.Float64])
@pytest.mark.parametrize("name", ["hm", "movielens", "online_retail", "amazon_industrial"])
def test_numbers_as_ids_import_as_their_text(name: str, kind: type, tmp_path: Path) -> None:
    source = WRITERS[name](tmp_path / "source")
    texts = {"article_id", "customer_id", "InvoiceNo", "StockCode", "CustomerID"}
    people = {"ann": "1", "bob": "2", "cy": "3", "u": "1", "v": "2", "w": "3", "C200": "9"}
    people |= {"POST": "9"}
    plain = pl.col(pl.String).replace(people)
    frames = {file: pl.read_parquet(file) for file in source.glob("*.parquet")}
    for cast in (pl.String, kind):
        for file, frame in frames.items():
            names = {c for c in frame.columns if c in texts or c.endswith("_id")}
            new = frame.with_columns(plain)
            for c in names - {"history_item_id"}:
                new = new.with_columns(pl.col(c).cast(pl.Int64).cast(cast))
            if "history_item_id" in names:
                ids = pl.col("history_item_id").cast(pl.List(pl.Int64)).cast(pl.List(cast))
                new = new.with_columns(ids)
            new.write_parquet(file)
        if cast == pl.String:
            expected, _ = run(name, tmp_path)
    assert run(name, tmp_path)[0]["data_hash"] == expected["data_hash"]


def test_an_impression_id_makes_the_page_and_its_absence_falls_back(tmp_path: Path) -> None:
    log = "user_id,timestamp,item_id,clicked,imp\n" + "\n".join(
        ["a,100,0001,0,x", "a,101,0002,1,x", "a,100,0001,1,", "a,101,0002,0,", "b,100,0001,1,x"]
    )
    _, out = fold(tmp_path, log, "impression_id=imp")
    pages = [(p["user_id"], p["exposed_item_ids"]) for p in rows(out, "events")]
    expected = [("a", ["0001", "0002"]), ("a", ["0001"]), ("a", ["0002"]), ("b", ["0001"])]
    assert sorted(pages) == sorted(expected)


def test_a_purchase_log_without_clicks_has_no_negatives(tmp_path: Path) -> None:
    manifest, out = fold(tmp_path, "user_id,timestamp,item_id\na,100,0001\na,200,0009\n", "")
    assert manifest["negative_source"] == "none" and manifest["query_source"] == "none"
    assert [page["clicked_item_ids"] for page in rows(out, "events")] == [["0001"], ["0009"]]
    assert any(note.startswith("1 clicks name items without a row") for note in manifest["notes"])
    assert not any("--columns impression_id" in note for note in manifest["notes"])


def test_pages_of_one_row_are_told_with_the_column_that_helps(tmp_path: Path) -> None:
    log = "user_id,timestamp,item_id,clicked,page\n" + "".join(
        f"u,{n},000{1 + n % 2},{n % 2},{n // 2}\n" for n in range(40)
    )
    manifest, _ = fold(tmp_path, log, "")
    assert manifest["negative_source"] == "none" and not manifest["counts"]["pages_with_negatives"]
    assert [note for note in manifest["notes"] if "pages have" in note] == [
        "40 of 40 pages have one item, so nothing was shown beside it: name the column of the "
        "result page with --columns impression_id=COLUMN"
    ]
    manifest, _ = fold(tmp_path, log, "impression_id=page")
    assert manifest["negative_source"] == "exposed"
    assert manifest["counts"]["pages_with_negatives"] == 20
    assert not any("pages have" in note for note in manifest["notes"])


@pytest.mark.parametrize("ending", ["parquet", "jsonl", "folder"])
def test_the_kind_of_file_does_not_change_the_events(ending: str, tmp_path: Path) -> None:
    exposures = pl.DataFrame(
        {
            "user_id": [1, 1, 2],
            "timestamp": [1714557600000000, 1714557600000000, 1714557601],
            "item_id": ["0001", "0002", "0001"],
            "clicked": [True, False, True],
        }
    )
    source = tmp_path / f"log.{ending}"
    if ending == "parquet":
        exposures.write_parquet(source)
    elif ending == "jsonl":
        exposures.write_ndjson(source)
    else:
        source.mkdir()
        exposures.head(1).write_csv(source / "a.csv")
        exposures.tail(2).write_csv(source / "b.csv")
    (tmp_path / "items.csv").write_text("item_id,title\n0001,one\n0002,two\n")
    out = tmp_path / "out"
    import_long(str(source), str(out), items=str(tmp_path / "items.csv"))
    pages = [
        (p["user_id"], p["timestamp"].second, p["clicked_item_ids"]) for p in rows(out, "events")
    ]
    assert pages == [("1", 0, ["0001"]), ("2", 1, ["0001"])]


@pytest.mark.parametrize(
    "values",
    [
        pl.Series([1714521600], dtype=pl.Int32),
        pl.Series([1714521600.0]),
        pl.Series([1714521600_000_000_000]),
        pl.Series([datetime(2024, 5, 1)]),
        pl.Series([datetime(2024, 5, 1, tzinfo=UTC)]).dt.convert_time_zone("Asia/Tokyo"),
        pl.Series([datetime(2024, 5, 1).date()]),
        pl.Series(["2024-05-01"]),
        pl.Series([" 2024-05-01T00:00 "]),
        pl.Series(["2024-04-30 19:00:00.000-05:00"]),
        pl.Series(["2024-05-01 00:00:00+00"]),
        pl.Series(["2024-05-01 02:00:00 +02"]),
        pl.Series(["2024-05-01 00:00:00 UTC"]),
        pl.Series(["1.7145216e9"]),
        pl.Series(["1714521600.0"]),
    ],
    ids=lambda values: str(values.dtype),
)
def test_every_way_to_write_a_time_means_the_same_moment(values: pl.Series) -> None:
    parsed = pl.DataFrame({"ts": values}).select(timestamp("ts", values.dtype))
    assert parsed.item() == datetime(2024, 5, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("written", "stated"),
    [
        ("05/01/2024", "%m/%d/%Y"),
        ("01.05.2024 00:00", "%d.%m.%Y %H:%M"),
        ("20240501", "%Y%m%d"),
        (20240501, "%Y%m%d"),
        ("05/01/2024 02:00 +0200", "%m/%d/%Y %H:%M %z"),
        ("2024-05-01", "%m/%d/%Y"),  # what is known anyway stays known
    ],
)
def test_a_stated_format_says_what_a_time_means(written: object, stated: str) -> None:
    values = pl.Series("ts", [written])
    parsed = pl.DataFrame([values]).select(timestamp("ts", values.dtype, stated))
    assert parsed.item() == datetime(2024, 5, 1, tzinfo=UTC)


def test_times_that_cannot_be_read_name_the_flag_that_helps(tmp_path: Path) -> None:
    log = "user_id,timestamp,item_id\nu,05/01/2024,0001\n"
    with pytest.raises(InputError, match=r"'unparsable timestamp': 1.*--time-format"):
        fold(tmp_path, log, "")
    manifest, _ = fold(tmp_path, log + "u,20240501,0001\n", "")
    assert [note for note in manifest["notes"] if "--time-format" in note] == [
        "1 timestamps cannot be read; --time-format states how times are written, for example "
        "%m/%d/%Y or %Y%m%d",
        "all times lie before 1980, as row numbers do; --time-format states how times are written, "
        "for example %m/%d/%Y or %Y%m%d",
    ]


@pytest.mark.parametrize("kind", ["csv.gz", "semicolons", "utf-16", "utf-16-le", "latin-1", "bom"])
def test_however_a_table_was_exported_it_says_the_same(kind: str, tmp_path: Path) -> None:
    log = "user_id,timestamp,query,item_id\nu,1,größe 4,7\nv,2,größe 5,7\n"
    if kind == "semicolons":
        log = log.replace("4,", "4;").replace(",", ";")
    source = tmp_path / ("log.csv.gz" if kind == "csv.gz" else "log.csv")
    encoding = kind if kind in ("utf-16", "utf-16-le", "latin-1") else "utf-8"
    content = log.encode("utf-8-sig" if kind == "bom" else encoding)
    source.write_bytes(gzip.compress(content) if kind == "csv.gz" else content)
    (tmp_path / "items.csv").write_text("item_id,title\n7,a\n")
    arguments = (str(source), str(tmp_path / "out"))
    form = None
    if kind == "latin-1":
        with pytest.raises(InputError, match=r"log\.csv.*--encoding names another one"):
            import_long(*arguments, items=str(tmp_path / "items.csv"))
        form = TextFormat(encoding="latin-1")
    if kind == "latin-1":
        (tmp_path / "items.csv").write_text("item_id,title\n7,a\n", encoding="latin-1")
    import_long(*arguments, items=str(tmp_path / "items.csv"), form=form)
    assert [page["query"] for page in rows(tmp_path / "out", "events")] == ["größe 4", "größe 5"]


def test_a_damaged_archive_and_an_unknown_encoding_are_named(tmp_path: Path) -> None:
    _, items = write_long(tmp_path)
    (tmp_path / "log.csv.gz").write_bytes(gzip.compress(LOG.encode())[:40])
    with pytest.raises(InputError, match=r"log\.csv\.gz' cannot be read"):
        import_long(
            str(tmp_path / "log.csv.gz"), str(tmp_path / "out"), items=items,
            item_columns={"item_id": "sku", "title": "name"},
        )  # fmt: skip
    with pytest.raises(InputError, match="--encoding: 'utf-9' is not a known encoding"):
        import_long(items, str(tmp_path / "out"), items=items, form=TextFormat(encoding="utf-9"))


def test_files_of_a_folder_may_order_their_columns_and_be_named_by_folders(tmp_path: Path) -> None:
    (tmp_path / "items.csv").write_text("item_id,title\n7,a\n")
    texts = {"dt=2024-05-01": "user_id,item_id,clicked\nu,7,1\n",
             "dt=2024-05-02": "clicked,item_id,extra,user_id\n1,7,x,v\n"}  # fmt: skip
    for folder, text in texts.items():
        (tmp_path / "log" / folder).mkdir(parents=True)
        (tmp_path / "log" / folder / "part.csv").write_text(text)

    def pages() -> list[tuple[str, int]]:
        import_long(
            str(tmp_path / "log"), str(tmp_path / "out"), items=str(tmp_path / "items.csv"),
            columns={"timestamp": "dt"},
        )  # fmt: skip
        return [(p["user_id"], p["timestamp"].day) for p in rows(tmp_path / "out", "events")]

    assert pages() == [("u", 1), ("v", 2)]
    (tmp_path / "log" / "dt=2024-05-02" / "part.csv").write_text("item_id,user_id\n7,v\n")
    with pytest.raises(InputError, match=r"dt=2024-05-02/part\.csv' lacks the column 'clicked'"):
        pages()


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ("user_id=uid,item_id=sku,timestamp=when", "timestamp: 'when'.*choices: uid, ts, q, sku"),
        ("user_id=uid,item_id=sku", "--columns timestamp is needed.*choices: uid, ts"),
        (COLUMNS + ",clicks=click", "'clicks' is not one of our column names.*choices: user_id"),
        ("user_id", "'user_id' does not have the form"),
    ],
)
def test_a_wrong_mapping_names_the_column_and_the_choices(
    columns: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        fold(tmp_path, columns=columns)


def test_a_column_of_lists_is_named_with_its_type(tmp_path: Path) -> None:
    log = pl.DataFrame({"user_id": ["u"], "timestamp": [1], "item_id": ["7"], "q": [["red"]]})
    log.write_parquet(tmp_path / "log.parquet")
    (tmp_path / "items.csv").write_text("item_id,title\n7,a\n")
    with pytest.raises(
        InputError, match=r"--columns query: 'List\(String\)' is not a single value"
    ):
        import_long(
            str(tmp_path / "log.parquet"), str(tmp_path / "out"), columns={"query": "q"},
            items=str(tmp_path / "items.csv"),
        )  # fmt: skip


def test_a_log_without_a_readable_row_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no row that can be read"):
        fold(tmp_path, "user_id,timestamp,item_id\n,1,0001\n", "")


# The job, and the real files where they are


def test_the_job_prints_counts_and_the_next_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = write_hm(tmp_path / "source"), tmp_path / "out"
    import_data.main(["hm", str(source), str(out)])
    printed = capsys.readouterr().out
    assert "DERIVED" in printed and "PROXY" in printed
    assert printed.rstrip().endswith(f"next: python jobs/train.py --data {out} --recipe karma_text")


@pytest.mark.parametrize(
    ("unknown", "end"),
    [
        (1, "next: python jobs/train.py --data '{out}' --recipe karma_text"),
        (3, "  python jobs/train.py --data '{out}' --recipe karma_text "
            "--set prepare.max_bad_share=0.3"),
        (10, "no click names a known item, so nothing can be trained on this folder"),
    ],
)  # fmt: skip
def test_the_next_command_is_none_that_preparing_refuses(
    unknown: int, end: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [f"u{n},{n},{'gone' if n < unknown else '7'}" for n in range(10)]
    (tmp_path / "log.csv").write_text("\n".join(["user_id,timestamp,item_id", *lines]))
    (tmp_path / "items.csv").write_text("item_id,title\n7,a\n")
    out = str(tmp_path / "my data")
    items = ["--items", str(tmp_path / "items.csv")]
    import_data.main(["long", str(tmp_path / "log.csv"), out, *items])
    printed = capsys.readouterr().out.rstrip().splitlines()
    assert printed[-1] == end.format(out=out)
    assert any("3 of 10 pages have clicks" in line for line in printed) == (unknown == 3)
    with pytest.raises(InputError, match=r"^--items is needed: name the table of item ids"):
        import_data.main(["long", str(tmp_path / "log.csv"), out])


def test_the_job_refuses_mappings_for_a_public_dataset(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="only for the format long"):
        import_data.main(["hm", str(tmp_path), str(tmp_path / "out"), "--columns", "a=b"])


@pytest.mark.parametrize(
    ("name", "folder", "counts"),
    [
        ("movielens", "movielens", {"users": 942, "items": 1681, "clicks": 55_370}),
        ("kuaisearch", "kuaisearch_demo", {"items": 200, "clicks": 0}),
        ("jdsearch", "jdsearch_sample", {"users": 3, "items": 409, "test_examples": 5}),
    ],
)
def test_real_files_import(
    name: str, folder: str, counts: dict[str, int], shared_data: Path, tmp_path: Path
) -> None:
    manifest = importer(name)(str(shared_data / folder), str(tmp_path / "out"))
    assert counts.items() <= manifest["counts"].items()
    if manifest["presplit"]:
        prepared = read_json(str(tmp_path / "out" / "prepared.json"))
        assert prepared["negative_source"] == manifest["negative_source"]
