"""Derived queries and proxy negatives for purchase logs, which are labelled as such everywhere.

A purchase log has neither queries nor the other items that were shown. By convention
(method 1.14) the query is made from category-level attributes of the target, and negatives are
items with all attributes in the query that were on sale then and not bought by that user.
"""

from __future__ import annotations

from datetime import timedelta

import numpy as np
import polars as pl

POOL_DAYS = 14
NUM_PROXIES = 10

PROXY_NOTE = (
    f"negatives are PROXIES: up to {NUM_PROXIES} items a page that match the whole derived query, "
    f"were sold by anyone in the {POOL_DAYS} days up to the page (never after it, so no split can "
    "leak into them), and were not bought by that user up to then"
)


def shared_queries(items: pl.DataFrame, min_items: int = 2) -> pl.DataFrame:
    """Set `query` to null if fewer than `min_items` of `items` (item_id, query) have it.

    A query that names only the target would measure string matching instead of retrieval.
    """
    count = pl.len().over("query")
    kept = pl.when((count >= min_items) & (pl.col("query") != "")).then(pl.col("query"))
    return items.with_columns(kept.alias("query"))


def query_matches(items: pl.DataFrame) -> pl.DataFrame:
    """Return QUERY_MATCHES of `items` (item_id, query): the items of each query, both sorted."""
    named = items.filter(pl.col("query").is_not_null()).sort("query", "item_id")
    return named.group_by("query", maintain_order=True).agg(pl.col("item_id").alias("item_ids"))


def fold_purchases(purchases: pl.DataFrame, page: list[str]) -> pl.DataFrame:
    """Group purchases into one row per page, in time order; `page` names the grouping columns.

    `purchases` has user_id, timestamp, item_id, query, in row order within a time. Several units
    of one item on a page count once. Clicked and purchased items are the same.
    """
    ordered = purchases.sort("timestamp", maintain_order=True)
    first = [pl.col(c).first() for c in ("user_id", "timestamp", "query") if c not in page]
    folded = ordered.group_by(page, maintain_order=True).agg(
        *first, pl.col("item_id").unique(maintain_order=True).alias("clicked_item_ids")
    )
    return folded.with_columns(pl.col("clicked_item_ids").alias("purchased_item_ids"))


def add_proxy_negatives(pages: pl.DataFrame, purchases: pl.DataFrame, seed: int) -> pl.DataFrame:
    """Add `exposed_item_ids`: the clicked items and up to NUM_PROXIES proxies, shuffled.

    The candidates of a page at time t are the items that any user bought for the same query in
    [t - 14 days, t], without those this user bought up to t. They depend only on the past, so
    they know nothing of the later split. A page without a query or candidates gets an empty list,
    which means unknown. `pages` must be in time order.
    """
    item_ids = purchases["item_id"].unique().sort()
    code_of = {item_id: code for code, item_id in enumerate(item_ids)}
    sales = purchases.sort("timestamp", maintain_order=True)
    codes = np.array([code_of[i] for i in sales["item_id"]], np.int64)
    times = sales["timestamp"].to_numpy().astype("datetime64[us]").astype(np.int64)
    pools = _by_query(sales["query"].to_list(), times, codes)
    users = sales["user_id"].to_list()
    bought: dict[str, set[int]] = {}
    seen = 0
    window = int(timedelta(days=POOL_DAYS).total_seconds() * 1e6)
    generator = np.random.default_rng(seed)
    exposed: list[list[str]] = []
    page_times = pages["timestamp"].to_numpy().astype("datetime64[us]").astype(np.int64)
    columns = (pages["user_id"], pages["query"], pages["clicked_item_ids"])
    for time, user, query, clicked in zip(page_times, *columns, strict=True):
        while seen < len(times) and times[seen] <= time:
            bought.setdefault(users[seen], set()).add(int(codes[seen]))
            seen += 1
        if query is None:
            exposed.append([])
            continue
        when, what = pools[query]
        start = np.searchsorted(when, time - window, side="left")
        stop = np.searchsorted(when, time, side="right")
        own = bought.get(user, set())
        pool = np.array([c for c in np.unique(what[start:stop]) if int(c) not in own], np.int64)
        drawn = generator.permutation(pool)[:NUM_PROXIES]
        shown = [*clicked, *(item_ids[int(code)] for code in drawn)]
        exposed.append([shown[i] for i in generator.permutation(len(shown))] if len(drawn) else [])
    return pages.with_columns(pl.Series("exposed_item_ids", exposed, pl.List(pl.String)))


def _by_query(
    queries: list[str | None], times: np.ndarray, codes: np.ndarray
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return the sale times and item codes of each query, in time order."""
    rows: dict[str, list[int]] = {}
    for row, query in enumerate(queries):
        if query is not None:
            rows.setdefault(query, []).append(row)
    return {query: (times[which], codes[which]) for query, which in rows.items()}
