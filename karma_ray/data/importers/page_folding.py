"""Exposures of whole users to result pages, and what the manifest tells of them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from karma_ray.data.importers.exposures import OPTIONAL, TIME_US
from karma_ray.data.validation import named_ids


@dataclass
class PageCounts:
    """Numbers of users, pages, and what advice is given on."""

    users: int = 0
    pages: int = 0
    single: int = 0
    """Pages of one item."""
    unknown: int = 0
    """Rows that are a click on an item without a row in the item table."""

    def add(self, other: PageCounts) -> None:
        """Add the numbers of other users."""
        for name, number in asdict(other).items():
            setattr(self, name, getattr(self, name) + number)


def pages_of(
    exposures: pl.DataFrame, names: Collection[str], known: pa.Array, *, by_row: bool
) -> tuple[pl.DataFrame, PageCounts]:
    """Return the pages of whole users, whose rows are in the order of the log.

    `names` are the columns that the log has, as the others are all null, and `known` the ids of
    items. With `by_row` times number the rows of each user.
    """
    exposures = exposures.drop(name for name in OPTIONAL if name not in names)
    if by_row:
        number = pl.int_range(1, pl.len() + 1).over("user_id") * 1_000_000
        exposures = exposures.with_columns(number.cast(TIME_US).alias("timestamp"))
    clicked = pl.col("clicked").fill_null(False) if "clicked" in names else pl.lit(True)
    exposures = exposures.with_columns(clicked.alias("clicked"))
    if "purchased" in names:
        exposures = exposures.with_columns(pl.col("purchased").fill_null(False))
    clicks = exposures.filter("clicked")["item_id"].to_arrow().cast(pa.string())
    among = named_ids(clicks, known)
    unknown = len(clicks) - (pc.sum(pc.is_in(clicks, value_set=among)).as_py() or 0)
    pages = fold_exposures(exposures)
    single = int((pages["exposed_item_ids"].list.len() == 1).sum())
    return pages, PageCounts(pages["user_id"].n_unique(), pages.height, single, unknown)


def fold_exposures(exposures: pl.DataFrame) -> pl.DataFrame:
    """Build EVENTS of exposures in the order of the log, one row per page, in any order.

    Items are ordered by position, or as the rows are. An item that is shown twice on a page counts
    once, as clicked if any of its rows is. `timestamp`, `position` and `order` are those of the
    first row.
    """
    names = exposures.columns
    page = ["user_id", *(c for c in ("timestamp", "query") if c in names)]
    if "impression_id" in names:
        # Rows without an impression id are grouped by time and query.
        fallback = [pl.when(pl.col("impression_id").is_null()).then(pl.col(c)) for c in page[1:]]
        keys = [f"page_{c}" for c in page[1:]]
        exposures = exposures.with_columns(
            key.alias(name) for key, name in zip(fallback, keys, strict=True)
        )
        page = ["user_id", "impression_id", *keys]
    order = ["timestamp", *(["position"] if "position" in names else []), "order"]
    ordered = exposures.sort(order, nulls_last=True)
    if "position" not in names:
        ordered = ordered.with_columns(pl.lit(None, pl.Float64).alias("position"))
    item = pl.col("item_id")
    aggregates = [
        item.unique(maintain_order=True).alias("exposed_item_ids"),
        item.filter(pl.col("clicked")).unique(maintain_order=True).alias("clicked_item_ids"),
    ]
    if "purchased" in names:
        bought = item.filter(pl.col("purchased")).unique(maintain_order=True)
        aggregates.append(bought.alias("purchased_item_ids"))
    aggregates += [
        pl.col(c).drop_nulls().first()
        for c in ("timestamp", "query", "session_id")
        if c in names and c not in page
    ]
    aggregates += [pl.col(c).first() for c in ("position", "order")]
    pages = ordered.group_by(page, maintain_order=True).agg(aggregates)
    pages = pages.drop(c for c in page if c.startswith("page_") or c == "impression_id")
    if "session_id" not in pages.columns:
        pages = pages.with_columns(pl.lit(None, pl.String).alias("session_id"))
    return pages
