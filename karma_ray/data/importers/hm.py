"""Importer of H&M: two years of purchases by day, 25 text columns and a picture per article."""

from __future__ import annotations

from typing import Any

import polars as pl

from karma_ray.data.importers.derive import (
    PROXY_NOTE,
    add_proxy_negatives,
    fold_purchases,
    query_matches,
    shared_queries,
)
from karma_ray.data.importers.output import DataFolder
from karma_ray.data.importers.source import find_file, find_files, read_parquet, stream_parquet
from karma_ray.data.schema import ITEMS

_ATTRIBUTES = (
    "product_type_name", "index_group_name", "garment_group_name", "colour_group_name",
    "department_name", "section_name", "graphical_appearance_name",
)  # fmt: skip
_ARTICLE_COLUMNS = ("article_id", "product_code", "prod_name", "detail_desc", *_ATTRIBUTES)
_SALE_COLUMNS = ("t_dat", "customer_id", "article_id")
_IDS = ("article_id", "customer_id")
_IMAGES_PER_PART = 1000


def import_hm(src: str, out: str, *, seed: int = 0) -> dict[str, Any]:
    """Write the data folder of the H&M files in `src`; returns its manifest."""
    articles = read_parquet(find_file(src, "articles.parquet"), _ARTICLE_COLUMNS, _IDS)
    sales_file = find_file(src, "transactions.parquet")
    sales = read_parquet(sales_file, _SALE_COLUMNS, _IDS).with_row_index("row")
    with DataFolder(out) as data:
        items = hm_items(articles)
        queries = items.select("item_id", "query")
        _write_items(data, items.drop("query"), find_files(src, "images-", ".parquet"))
        data.add("query_matches", query_matches(queries))
        for file in find_files(src, "articles_all_", ".parquet"):
            _write_others(data, read_parquet(file, _ARTICLE_COLUMNS, _IDS), items)

        bad = pl.any_horizontal(pl.col(_SALE_COLUMNS).is_null())
        data.reject(sales.filter(bad), sales_file, "null user, item or day")
        known = pl.col("article_id").is_in(items["item_id"].implode())
        data.reject(sales.filter(~bad & ~known), sales_file, "item not in the catalogue")
        purchases = (
            sales.filter(~bad & known)
            .select(
                pl.col("customer_id").alias("user_id"),
                pl.col("t_dat")
                .cast(pl.Datetime("us"))
                .dt.replace_time_zone("UTC")
                .alias("timestamp"),
                pl.col("article_id").alias("item_id"),
            )
            .join(queries, on="item_id", how="left", maintain_order="left")
        )
        pages = fold_purchases(purchases, ["user_id", "timestamp", "query"])
        data.add("events", add_proxy_negatives(pages, purchases, seed))
        units = purchases.height - pages["clicked_item_ids"].list.len().sum()
        return data.finish(
            name="hm",
            query_source="derived",
            negative_source="proxy",
            licence="believed non-commercial, no redistribution",
            notes=[
                'queries are DERIVED: "index group + product type" of the bought item, null where '
                "fewer than 2 items share it or the type is unknown",
                PROXY_NOTE,
                f"{units} rows were further units of one purchase (same customer, day, article)",
                "times are days: the order inside a day is the row order and means nothing",
            ],
        )


def hm_items(articles: pl.DataFrame) -> pl.DataFrame:
    """Return the ITEMS columns without images, further attributes, and the derived `query`."""
    described = pl.concat_str(
        [
            pl.concat_str(
                "colour_group_name", "graphical_appearance_name", "department_name",
                "section_name", separator=", ", ignore_nulls=True,
            ),
            pl.col("detail_desc"),
        ],
        separator=". ",
        ignore_nulls=True,
    )  # fmt: skip
    path = ["index_group_name", "garment_group_name", "product_type_name"]
    known_type = pl.col("product_type_name").str.to_lowercase() != "unknown"
    query = pl.concat_str("index_group_name", "product_type_name", separator=" ")
    return shared_queries(
        articles.select(
            pl.col("article_id").alias("item_id"),
            pl.col("prod_name").alias("title"),
            described.alias("text"),
            pl.lit(None, pl.String).alias("brand"),
            pl.concat_str(path, separator=" > ", ignore_nulls=True).alias("category"),
            pl.when(known_type).then(query.str.to_lowercase()).alias("query"),
            "product_code",
            *_ATTRIBUTES,
        )
    )


def _write_others(data: DataFolder, articles: pl.DataFrame, items: pl.DataFrame) -> None:
    """Write the articles of the full catalogue that are not items, as texts nobody searches."""
    others = hm_items(articles).filter(~pl.col("item_id").is_in(items["item_id"].implode()))
    names = [name for name in ITEMS.names if name != "image"]
    data.add("other_items", others.select(*names, pl.lit(None, pl.Binary).alias("image")))


def _write_items(data: DataFolder, items: pl.DataFrame, image_files: list[str]) -> None:
    """Write items with a picture file by file, then the rest, with one batch in memory."""
    pictured: set[str] = set()
    for file in image_files:
        for images in stream_parquet(file, ("article_id", "jpeg"), _IDS, _IMAGES_PER_PART):
            fresh = images.rename({"article_id": "item_id", "jpeg": "image"}).filter(
                ~pl.col("item_id").is_in(pictured)
            )
            part = items.join(fresh, on="item_id", how="inner", maintain_order="left")
            pictured.update(part["item_id"])
            data.add("items", part)
    rest = items.filter(~pl.col("item_id").is_in(pictured))
    data.add("items", rest.with_columns(pl.lit(None, pl.Binary).alias("image")))
