"""Importer of UCI Online Retail: invoices of a wholesaler, with short descriptions and minutes."""

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
from karma_ray.data.importers.source import find_file, read_parquet

_COLUMNS = ("InvoiceNo", "StockCode", "Description", "Quantity", "InvoiceDate", "CustomerID")
_MIN_ITEMS = 5


def import_online_retail(src: str, out: str, *, seed: int = 0) -> dict[str, Any]:
    """Write the data folder of `online_retail.parquet` in `src`; returns its manifest."""
    file = find_file(src, "online_retail.parquet")
    rows = read_parquet(file, _COLUMNS, ("InvoiceNo", "StockCode", "CustomerID")).with_row_index(
        "row"
    )
    with DataFolder(out) as data:
        sales = _keep_sales(data, rows, file)
        titles = retail_titles(sales)
        untitled = ~pl.col("item_id").is_in(titles["item_id"].implode())
        data.reject(sales.filter(untitled), file, "item without any description")
        items = shared_queries(titles.with_columns(_last_word().alias("query")), _MIN_ITEMS)
        data.add("items", items.drop("query"))
        data.add("query_matches", query_matches(items))

        invoices = pl.col("timestamp").min().over("InvoiceNo")
        purchases = (
            sales.with_columns(invoices)
            .select("InvoiceNo", "user_id", "timestamp", "item_id")
            .join(
                items.select("item_id", "query"), on="item_id", how="inner", maintain_order="left"
            )
        )
        pages = fold_purchases(purchases, ["InvoiceNo", "user_id", "query"])
        pages = add_proxy_negatives(pages, purchases, seed)
        data.add("events", pages.rename({"InvoiceNo": "session_id"}))
        lines = purchases.height - pages["clicked_item_ids"].list.len().sum()
        return data.finish(
            name="online_retail",
            query_source="derived",
            negative_source="proxy",
            licence="CC BY 4.0 as far as known",
            notes=[
                "queries are DERIVED: the last word of the bought item's description, null where "
                f"fewer than {_MIN_ITEMS} items share it",
                PROXY_NOTE,
                "one page per (invoice, query); the invoice's first minute is its time, read as "
                "UTC",
                f"{lines} rows repeated an item of the same invoice and are counted once",
                "about 44 % of next purchases are repeats: read first/ and repeat/ metrics apart",
            ],
        )


def retail_titles(sales: pl.DataFrame) -> pl.DataFrame:
    """Return item_id and title: the most frequent description, with ties in alphabetical order."""
    wording = pl.col("Description").str.replace_all(r"\s+", " ").str.strip_chars()
    counted = (
        sales.select("item_id", wording.alias("title"))
        .filter(pl.col("title").str.len_chars() > 0)
        .group_by("item_id", "title")
        .len()
        .sort("item_id", "len", "title", descending=[False, True, False])
    )
    return counted.group_by("item_id", maintain_order=True).agg(pl.col("title").first())


def _last_word() -> pl.Expr:
    word = pl.col("title").str.to_lowercase().str.extract(r"([a-z][a-z'-]+)[^a-z0-9]*$", 1)
    return pl.when(word.str.len_chars() >= 3).then(word)


def _keep_sales(data: DataFolder, rows: pl.DataFrame, file: str) -> pl.DataFrame:
    """Quarantine rows that are not a product bought by a known customer, by the first reason."""
    reasons = {
        "cancellation": pl.col("InvoiceNo").str.starts_with("C"),
        "quantity not positive": pl.col("Quantity") <= 0,
        "code is no product (not five digits)": ~pl.col("StockCode").str.contains(r"^\d{5}"),
        "no customer": pl.col("CustomerID").is_null(),
        "null item, invoice, quantity or time": pl.any_horizontal(
            pl.col("InvoiceNo", "StockCode", "Quantity", "InvoiceDate").is_null()
        ),
    }
    for reason, bad in reasons.items():
        bad = bad.fill_null(False)
        data.reject(rows.filter(bad), file, reason)
        rows = rows.filter(~bad)
    return rows.with_columns(
        pl.col("CustomerID").alias("user_id"),
        # 85123a and 85123A are the same product.
        pl.col("StockCode").str.to_uppercase().alias("item_id"),
        pl.col("InvoiceDate")
        .cast(pl.Datetime("us"))
        .dt.replace_time_zone("UTC")
        .alias("timestamp"),
    )
