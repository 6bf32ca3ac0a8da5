"""What is in a data folder, in numbers: one pass over its events, in batches.

Memory is that of the distinct users, items and queries (as 64-bit hashes), not of the log. Repeats
need pairs of user and item, which are counted for one in `every` users of a large log.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from karma_ray.artifacts import exists, join, open_filesystem, read_json, table_files
from karma_ray.data.click_times import click_times, cutoffs_of
from karma_ray.data.config import PrepareConfig
from karma_ray.data.prepared import read_data_manifest, require_data
from karma_ray.data.reading import Lost, stream_rows
from karma_ray.data.splits import Cutoffs, to_microseconds
from karma_ray.data.spreads import concentration, coverage, spread, weighted
from karma_ray.data.tally import Tally
from karma_ray.data.validation import event_columns, parse_times
from karma_ray.errors import InputError

PAIR_EVENTS = 5_000_000
"""Largest number of events of which all pairs of user and item are counted."""
NUM_TOP = 10
SPLITS = ("train", "valid", "test")
_DAY_US = 86_400_000_000


def describe(data_uri: str, prepared_uri: str | None = None) -> dict[str, Any]:
    """Return the numbers of a data folder; `prepared_uri` has its prepared.json if elsewhere.

    Raises InputError if the folder is missing or has no events.
    """
    require_data(data_uri)
    if not exists(join(data_uri, "events")):
        raise InputError("--data", data_uri, "has no events/: it came split, and has no log")
    manifest = read_data_manifest(data_uri)
    facts = _prepared(prepared_uri or data_uri)
    files = _files(join(data_uri, "events"))
    num_rows = sum(_num_rows(file) for file in files)
    cutoffs = _cutoffs(files, manifest, facts, exact=num_rows <= PAIR_EVENTS)
    counts = _Counts(cutoffs, every=max(1, -(-num_rows // PAIR_EVENTS)))
    for rows in _batches(files, counts.lost):
        counts.add(rows)
    num_items = _num_items(data_uri)
    named = {} if cutoffs is None else cutoffs.iso()
    return {
        "name": manifest.get("name") or data_uri.rstrip("/").rsplit("/", 1)[-1],
        "query_source": (facts or manifest).get("query_source"),
        "negative_source": (facts or manifest).get("negative_source"),
        "cutoffs": {**named, "of": "prepared.json" if facts else "the default shares"},
        **counts.summary(num_items),
        "queries": _queries(files, counts),
        "quarantine": {
            "import": manifest.get("quarantined") or {},
            "prepare": facts.get("quarantined") or {},
            "damaged": dict(Counter(lost.reason for lost in counts.lost)),
        },
        "notes": manifest.get("notes") or [],
    }


def _prepared(uri: str) -> dict[str, Any]:
    path = join(uri, "prepared.json")
    return dict(read_json(path)) if exists(path) else {}


def _files(folder: str) -> list[str]:
    fs, _ = open_filesystem(folder)
    remote = "://" in folder
    return [str(fs.unstrip_protocol(f)) if remote else f for f in table_files(folder)]


def _num_rows(file: str) -> int:
    fs, path = open_filesystem(file)
    try:
        with fs.open(path, "rb") as source:
            return int(pq.read_metadata(source).num_rows)
    except pa.ArrowException:
        return 0  # what is lost is told by the pass over the rows


def _num_items(data_uri: str) -> int:
    folder = join(data_uri, "items")
    return sum(_num_rows(file) for file in _files(folder)) if exists(folder) else 0


def _batches(
    files: list[str], lost: list[Lost] | None, columns: list[str] | None = None
) -> Iterator[pl.DataFrame]:
    for file in files:
        for part in stream_rows(file, columns):
            if isinstance(part, Lost):
                if lost is not None:
                    lost.append(part)
                continue
            table = part[1] if columns else event_columns(part[1], file)
            if columns and "timestamp" in columns:
                times = parse_times(table.column("timestamp"), file)
                place = table.column_names.index("timestamp")
                table = table.set_column(place, "timestamp", times)
            rows = pl.from_arrow(table)
            assert isinstance(rows, pl.DataFrame)
            yield rows


def _cutoffs(
    files: list[str], manifest: dict[str, Any], facts: dict[str, Any], *, exact: bool
) -> Cutoffs | None:
    """Return the cutoffs of the preparation, or those that a default one would take.

    Unless they are to be `exact`, times count in whole seconds, of which a log has fewer.
    """
    if facts.get("valid_start"):
        return Cutoffs(
            *(to_microseconds(facts[name], name) for name in ("valid_start", "test_start"))
        )
    times = Tally("time", pl.Int64, ("clicks",))
    step = 1 if exact else 1_000_000
    for rows in _batches(files, None, ["timestamp", "clicked_item_ids"]):
        part = pl.from_arrow(click_times(rows.drop_nulls().to_arrow()))
        assert isinstance(part, pl.DataFrame)
        times.add(part.with_columns(pl.col("time") // step * step))
    try:
        return cutoffs_of([times.table().to_arrow()], PrepareConfig(), manifest)
    except InputError:  # a log of one moment, or without a click
        return None


@dataclass
class _Counts:
    """Sums over the batches."""

    cutoffs: Cutoffs | None
    every: int
    lost: list[Lost] = field(default_factory=list)
    events: int = 0
    no_time: int = 0
    with_query: int = 0
    with_negatives: int = 0
    with_exposures: int = 0
    exposures: int = 0
    exposed_clicks: int = 0
    purchases: int = 0
    sessions: Tally = field(default_factory=lambda: Tally("key", pl.UInt64, ("n",)))
    users: Tally = field(default_factory=lambda: Tally("key", pl.UInt64, ("events", "clicks")))
    items: Tally = field(default_factory=lambda: Tally("key", pl.UInt64, SPLITS))
    pairs: Tally = field(default_factory=lambda: Tally("key", pl.UInt64, ("n",)))
    queries: Tally = field(default_factory=lambda: Tally("key", pl.UInt64, ("n",)))
    days: Tally = field(default_factory=lambda: Tally("day", pl.Int64, ("events", "clicks")))
    shown: Tally = field(default_factory=lambda: Tally("length", pl.Int64, ("n",)))
    words: Tally = field(default_factory=lambda: Tally("length", pl.Int64, ("n",)))

    def add(self, rows: pl.DataFrame) -> None:
        """Count the rows of EVENTS."""
        one = pl.lit(1).alias("n")
        clicks = pl.col("clicked_item_ids").list.len().fill_null(0).cast(pl.Int64)
        shown = pl.col("exposed_item_ids").list.len().fill_null(0).cast(pl.Int64)
        time = pl.col("timestamp").to_physical().alias("time")
        rows = rows.with_columns(
            clicks.alias("clicks"), shown.alias("shown"), time, pl.lit(1).alias("events"),
            pl.col("user_id").hash(0).alias("key"),
            pl.col("query").str.strip_chars().replace("", None),
        )  # fmt: skip
        seen = rows.filter(pl.col("shown") > 0)
        self.events += rows.height
        self.no_time += rows["time"].null_count()
        self.with_query += rows.height - rows["query"].null_count()
        self.with_exposures += seen.height
        self.exposures += int(seen["shown"].sum())
        self.exposed_clicks += int(seen["clicks"].sum())
        self.with_negatives += seen.filter((pl.col("shown") > clicks) & (clicks > 0)).height
        self.purchases += int(rows["purchased_item_ids"].list.len().sum() or 0)
        self.users.add(rows)
        self.days.add(rows.with_columns((pl.col("time") // _DAY_US).alias("day")))
        self.shown.add(seen.select(pl.col("shown").alias("length"), one))
        asked = rows.drop_nulls("query").select("query")
        self.queries.add(asked.select(pl.col("query").hash(0).alias("key"), one))
        words = pl.col("query").str.count_matches(r"\S+").cast(pl.Int64)
        self.words.add(asked.select(words.alias("length"), one))
        visits = rows.drop_nulls("session_id").select(pl.col("session_id").hash(0).alias("key"))
        self.sessions.add(visits.with_columns(one))
        self._add_clicks(rows)

    def _add_clicks(self, rows: pl.DataFrame) -> None:
        clicks = rows.select("key", "time", "clicked_item_ids").filter(
            pl.col("clicked_item_ids").list.len() > 0
        )
        clicks = clicks.explode("clicked_item_ids").with_columns(
            pl.col("clicked_item_ids").hash(0).alias("item"), *self._splits()
        )
        self.items.add(clicks.select(pl.col("item").alias("key"), *SPLITS))
        some = clicks.filter(pl.col("key") % self.every == 0)
        pair = pl.struct("key", "item").hash(0).alias("key")
        self.pairs.add(some.select(pair, pl.lit(1).alias("n")))

    def _splits(self) -> list[pl.Expr]:
        if self.cutoffs is None:
            return [pl.lit(int(name == "train")).alias(name) for name in SPLITS]
        valid = (pl.col("time") >= self.cutoffs.valid_start).fill_null(False)
        test = (pl.col("time") >= self.cutoffs.test_start).fill_null(False)
        masks = zip(SPLITS, (~valid, valid & ~test, test), strict=True)
        return [mask.cast(pl.Int64).alias(name) for name, mask in masks]

    def summary(self, num_items: int) -> dict[str, Any]:
        """Return counts, distributions, coverage and concentration."""
        users, items, pairs = self.users.table(), self.items.table(), self.pairs.table()
        per_item = items.select(pl.sum_horizontal(SPLITS)).to_series().sort(descending=True)
        total = int(per_item.sum())
        again = int(pairs["n"].sum()) - pairs.height
        return {
            "counts": {
                "users": users.height, "items": num_items, "events": self.events,
                "clicks": total, "purchases": self.purchases, "clicked_items": items.height,
                "sessions": self.sessions.table().height, "events_without_time": self.no_time,
            },
            "history": spread(users["clicks"]),
            "repeats": {
                "share": again / max(1, int(pairs["n"].sum())), "of_users": 1 / self.every,
            },
            "splits": {name: self._split(items, name) for name in SPLITS},
            "exposures": {
                "pages": self.with_exposures, "pages_with_negatives": self.with_negatives,
                "per_click": self.exposures / max(1, self.exposed_clicks),
                "per_page": weighted(self.shown.table()),
            },
            "time": coverage(self.days.table()),
            "popularity": concentration(per_item.to_numpy(), num_items),
        }  # fmt: skip

    @staticmethod
    def _split(items: pl.DataFrame, name: str) -> dict[str, Any]:
        clicks = int(items[name].sum())
        cold = int(items.filter(pl.col("train") == 0)[name].sum())
        return {"clicks": clicks, "cold_share": cold / max(1, clicks)}


def _queries(files: list[str], counts: _Counts) -> dict[str, Any]:
    table = counts.queries.table().sort("n", descending=True)
    found: dict[int, str] = {}
    if table.height:
        wanted = table["key"].head(NUM_TOP)
        for rows in _batches(files, None, ["query"]):
            text = rows.select(pl.col("query").cast(pl.String).str.strip_chars()).drop_nulls()
            text = text.with_columns(pl.col("query").hash(0).alias("key")).unique()
            found |= {k: q for q, k in text.filter(pl.col("key").is_in(wanted.implode())).rows()}
            if len(found) == len(wanted):
                break
    asked = int(table["n"].sum())
    top = [
        {"query": found.get(key, "?"), "count": n, "share": n / max(1, asked)}
        for key, n in table.head(NUM_TOP).rows()
    ]
    return {
        "events": counts.with_query,
        "share": counts.with_query / max(1, counts.events),
        "distinct": table.height,
        "asked_once_share": table.filter(pl.col("n") == 1).height / max(1, table.height),
        "words": weighted(counts.words.table()),
        "top": sorted(top, key=lambda row: (-row["count"], row["query"])),
    }
