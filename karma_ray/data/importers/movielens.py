"""Importer of MovieLens-100K: long histories, explicit dislikes and posters; not e-commerce."""

from __future__ import annotations

from typing import Any

import polars as pl

from karma_ray.data.importers.derive import query_matches, shared_queries
from karma_ray.data.importers.output import DataFolder
from karma_ray.data.importers.source import find_file, read_parquet

_RATING_COLUMNS = ("user_id", "item_id", "rating", "timestamp")
_MOVIE_COLUMNS = ("item_id", "movie_title", "release_year", "class", "ml1m_id")
_IDS = ("user_id", "item_id", "ml1m_id")
LIKED = 4


def import_movielens(src: str, out: str, *, seed: int = 0) -> dict[str, Any]:
    """Write the data folder of the MovieLens files in `src`; returns its manifest.

    Nothing is drawn at random, so `seed` has no effect.
    """
    ratings_file = find_file(src, "ml100k_interactions.parquet")
    movies_file = find_file(src, "ml100k_items.parquet")
    posters_file = find_file(src, "posters.parquet")
    ratings = read_parquet(ratings_file, _RATING_COLUMNS, _IDS).with_row_index("row")
    movies = read_parquet(movies_file, _MOVIE_COLUMNS, _IDS).with_row_index("row")
    posters = read_parquet(posters_file, ("ml1m_id", "jpeg"), _IDS).unique("ml1m_id", keep="first")
    with DataFolder(out) as data:
        untitled = pl.col("movie_title").str.to_lowercase().is_in(["unkonwn", "unknown", ""])
        untitled = untitled.fill_null(True)
        data.reject(movies.filter(untitled), movies_file, "title unknown")
        items = movie_items(movies.filter(~untitled), posters)
        queries = items.select("item_id", "query")
        data.add("items", items.drop("query"))
        data.add("query_matches", query_matches(queries))

        bad = pl.any_horizontal(pl.col(_RATING_COLUMNS).is_null())
        data.reject(ratings.filter(bad), ratings_file, "null user, item, rating or time")
        rated = ratings.filter(~bad)
        known = pl.col("item_id").is_in(items["item_id"].implode())
        data.reject(rated.filter(~known), ratings_file, "item not in the catalogue")
        pages = rating_pages(rated.filter(known), queries)
        liked = pages.filter(pl.col("clicked_item_ids").list.len() > 0)
        data.add("events", liked)
        return data.finish(
            name="movielens",
            query_source="derived",
            negative_source="feedback",
            licence="research use; posters are copyrighted: look, never publish",
            notes=[
                "queries are DERIVED: the movie's first genre, null where unknown",
                f"clicks are ratings of {LIKED} and more; negatives are true FEEDBACK: ratings of "
                f"{LIKED - 1} and less on the same page",
                "one page per (user, timestamp, query): ratings with tied times do not see each "
                "other",
                f"{pages.height - liked.height} pages without any liked movie were left out",
                "protocol: global time. Few users span the split (many rated all on one day), so "
                "most "
                "test users have little or no history; do not judge recency here",
            ],
        )


def movie_items(movies: pl.DataFrame, posters: pl.DataFrame) -> pl.DataFrame:
    """Return the ITEMS columns and the derived `query`."""
    genres = pl.col("class").str.split(" ").list.eval(pl.element().filter(pl.element() != ""))
    first = genres.list.first().str.to_lowercase()
    year = pl.concat_str(pl.lit(" ("), pl.col("release_year"), pl.lit(")"))
    items = movies.join(posters, on="ml1m_id", how="left", maintain_order="left").select(
        pl.col("item_id"),
        pl.concat_str(pl.col("movie_title"), year.fill_null("")).alias("title"),
        pl.lit(None, pl.String).alias("text"),
        pl.lit(None, pl.String).alias("brand"),
        genres.list.join(", ").alias("category"),
        pl.col("jpeg").alias("image"),
        pl.when(first != "unknown").then(first).alias("query"),
    )
    return shared_queries(items)


def rating_pages(ratings: pl.DataFrame, queries: pl.DataFrame) -> pl.DataFrame:
    """Build EVENTS: one row per (user, timestamp, query), in time order."""
    liked = pl.col("rating") >= LIKED
    seconds = pl.from_epoch(pl.col("timestamp"), "s").cast(pl.Datetime("us"))
    return (
        ratings.join(queries, on="item_id", how="left", maintain_order="left")
        .with_columns(seconds.dt.replace_time_zone("UTC").alias("timestamp"))
        .sort("timestamp", maintain_order=True)
        .group_by(["user_id", "timestamp", "query"], maintain_order=True)
        .agg(
            pl.col("item_id").unique(maintain_order=True).alias("exposed_item_ids"),
            pl.col("item_id").filter(liked).unique(maintain_order=True).alias("clicked_item_ids"),
        )
    )
