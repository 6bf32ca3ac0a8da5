"""Preparation of one partition of users, or of whole tables in memory, without Ray.

items  -> check_items  -> ids --+
events -> check_events ---------+-> choose_cutoffs -> build_partition -> check_no_leak
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from karma_ray.artifacts import SCHEMA_VERSION
from karma_ray.data.click_times import click_times, cutoffs_of
from karma_ray.data.config import PrepareConfig
from karma_ray.data.held_out import held_out_categories, held_out_rows
from karma_ray.data.leakage import check_no_leak
from karma_ray.data.schema import ITEMS, check_columns
from karma_ray.data.sessions import build_examples, build_pages, build_sequences
from karma_ray.data.splits import Cutoffs
from karma_ray.data.user_rows import newest
from karma_ray.data.validation import check_events, check_items, check_share, count_reasons
from karma_ray.errors import InputError


@dataclass(frozen=True)
class Partition:
    """Sequences and examples of some users, with counts."""

    sequences: pa.Table
    examples: dict[str, pa.Table]
    counts: dict[str, int]


@dataclass(frozen=True)
class Prepared:
    """Everything that `prepare` writes, in memory; `facts` is the content of prepared.json."""

    sequences: pa.Table
    examples: dict[str, pa.Table]
    quarantine: pa.Table
    facts: dict[str, Any]


def prepare_tables(
    events: pa.Table,
    items: pa.Table,
    config: PrepareConfig,
    manifest: Mapping[str, Any] | None = None,
) -> Prepared:
    """Prepare tables in memory; `manifest` is the data folder's, with planned cutoffs.

    Raises InputError, TooManyBadRows and LeakError as the job does.
    """
    config.check()
    checked_items = check_items(check_columns(items, ITEMS, "items"))
    item_ids = catalogue_ids(checked_items.table)
    checked = check_events(events, item_ids)
    reasons = []
    for result, rows in ((checked_items, items.num_rows), (checked, events.num_rows)):
        reasons.append(count_reasons(result.quarantine))
        source = "items" if result is checked_items else "events"
        check_share(reasons[-1], rows, config.max_bad_share, source)
    times = click_times(checked.table)
    cutoffs = cutoffs_of([times], config, manifest)
    held_out, of_held_out = held_out_ids(checked_items.table, config)
    partition = build_partition(checked.table, cutoffs, config, held_out)
    of_items = {**checked_items.counts, "items": len(item_ids), **of_held_out}
    counts = [of_items, checked.counts, partition.counts]
    facts = make_facts(config, cutoffs, add_up(counts), add_up(reasons), manifest)
    quarantine = pa.concat_tables([checked_items.quarantine, checked.quarantine])
    return Prepared(partition.sequences, partition.examples, quarantine, facts)


def catalogue_ids(items: pa.Table) -> pa.Array:
    """Return the ids of validated items; raises InputError when there are none."""
    if items.num_rows == 0:
        raise InputError("items", 0, "rows: the catalogue is empty")
    return pa.concat_arrays([pa.array([], pa.string()), *items.column("item_id").chunks])


def held_out_ids(items: pa.Table, config: PrepareConfig) -> tuple[pa.Array | None, dict[str, int]]:
    """Return the ids of validated items in held-out categories, and counts of both.

    None and no counts if nothing is held out. Raises InputError as `held_out_categories` does.
    """
    if config.hold_out == 0:
        return None, {}
    categories = items.column("category").to_pylist()
    chosen = held_out_categories(categories, config.hold_out, config.seed)
    ids = catalogue_ids(items).filter(pa.array(held_out_rows(categories, chosen)))
    return ids, {"held_out_categories": len(chosen), "held_out_items": len(ids)}


def build_partition(
    clean: pa.Table, cutoffs: Cutoffs, config: PrepareConfig, held_out: pa.Array | None = None
) -> Partition:
    """Build sequences and examples of a partition of whole users, and check them for leaks.

    The items `held_out` (ids) are in examples alone.
    """
    rows = newest(clean, config.max_user_events)
    pages = build_pages(rows)
    sequences = build_sequences(pages, cutoffs, config, held_out)
    examples = {
        "valid": build_examples(pages, cutoffs.valid_start, cutoffs.test_start, config),
        "test": build_examples(pages, cutoffs.test_start, None, config),
    }
    check_no_leak(sequences, examples, cutoffs)
    unclicked = pages["exposed"].list.set_difference(pages["clicked"])
    trained = int(pc.sum(sequences["loss_mask"].combine_chunks().flatten()).as_py() or 0)
    counts = {
        "users": pages["user_id"].n_unique(),
        "pages": pages.height,
        "repeated_pages": rows.num_rows - pages.height,
        "pages_with_query": int((pages["query"].fill_null("") != "").sum()),
        "pages_with_negatives": int((unclicked.list.len() > 0).sum()),
        "clicks": int(pages["clicked"].list.len().sum()),
        "training_clicks": trained,
        "windows": sequences.num_rows,
        "valid_examples": examples["valid"].num_rows,
        "test_examples": examples["test"].num_rows,
    }
    return Partition(sequences, examples, {**counts, **beyond_cap(clean, rows)})


def beyond_cap(clean: pa.Table, kept: pa.Table) -> dict[str, int]:
    """Return the count of rows beyond `prepare.max_user_events`, if there are any."""
    lost = clean.num_rows - kept.num_rows
    return {"events_beyond_cap": lost} if lost else {}


def make_facts(
    config: PrepareConfig,
    cutoffs: Cutoffs,
    counts: Mapping[str, int],
    quarantined: Mapping[str, int],
    manifest: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return the content of prepared.json.

    Without a manifest the sources of queries and negatives are inferred from the events: real
    queries, and items that were shown but not clicked, or none.
    """
    known = manifest or {}
    query = "real" if counts["pages_with_query"] else "none"
    negative = "exposed" if counts["pages_with_negatives"] else "none"
    return {
        "schema_version": SCHEMA_VERSION,
        "prepare": dataclasses.asdict(config),
        **cutoffs.iso(),
        "counts": dict(counts),
        "quarantined": dict(quarantined),
        "query_source": known.get("query_source", query),
        "negative_source": known.get("negative_source", negative),
    }


def add_up(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Return the sum per name, with names in order of first appearance."""
    total: Counter[str] = Counter()
    for part in counts:
        for name, count in part.items():
            total[name] += count
    return dict(total)
