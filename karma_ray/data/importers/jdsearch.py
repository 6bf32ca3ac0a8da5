"""Importer of JDsearch: real queries and labelled candidates, anonymised terms, no times.

Lists are joined by `_` and term ids by the control character 0x18; a query of -1 means none.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import polars as pl

from karma_ray.data.importers.output import DataFolder
from karma_ray.data.importers.presplit import (
    Step,
    example_table,
    page_examples,
    sequence_table,
    windows,
)
from karma_ray.data.importers.source import check_names, find_file, stream_lines

_TERM = "\x18"
_PRODUCT_COLUMNS = (
    "wid", "name", "brand_id", "brand_name", "cate_id_1", "cate_name_1", "cate_id_2",
    "cate_name_2", "cate_id_3", "cate_name_3", "cate_id_4", "cate_name_4", "shop_id",
)  # fmt: skip
_BEHAVIOUR_COLUMNS = (
    "query", "candidate_wid_list", "candidate_label_list", "history_qry_list",
    "history_wid_list", "history_type_list", "history_time_list",
)  # fmt: skip
_ROWS_PER_PART = 50_000


def import_jdsearch(src: str, out: str, *, seed: int = 0) -> dict[str, Any]:
    """Write sequences and examples of the JDsearch files in `src`; returns the manifest.

    Nothing is drawn at random, so `seed` has no effect.
    """
    products = find_file(src, "product_meta_data_sample.txt", "product_data.txt")
    behaviour = find_file(src, "user_behavior_data_sample.txt", "release_data.txt")
    _check_header(products, _PRODUCT_COLUMNS)
    _check_header(behaviour, _BEHAVIOUR_COLUMNS)
    with DataFolder(out) as data:
        known = _write_items(data, products)
        left_out = _write_users(data, behaviour, known)
        return data.finish(
            name="jdsearch",
            query_source="real",
            negative_source="exposed",
            licence="repository Apache-2.0; its README puts the full dataset under CC BY-NC-SA 4.0",
            presplit=True,
            notes=[
                "text is anonymised term ids, written t<id>: no pretrained language model can "
                "read it",
                "only intervals are known: timestamps are null, and no global split in time "
                "exists. Protocol: per user; test is the labelled query, valid the history's last "
                "page (without negatives), training all pages before it",
                "clicks, carts, follows and purchases all count as clicks; history steps of one "
                "query in a row, or with interval 0, are one page",
                "hard negatives are the candidates of the test query with label 0; histories have "
                "none",
                *(f"{count} {what}" for what, count in left_out.items()),
            ],
        )


def _check_header(file: str, columns: tuple[str, ...]) -> None:
    """Check the columns: samples begin with a header, full files have the documented order."""
    _, first = next(stream_lines(file), (0, ""))
    names = first.split("\t")
    if len(names) != len(columns) or columns[0] in names:
        check_names(names, columns, file)


def _records(
    data: DataFolder, file: str, columns: tuple[str, ...]
) -> Iterator[tuple[int, dict[str, str]]]:
    names: list[str] = list(columns)
    for row, line in stream_lines(file):
        values = line.split("\t")
        if row == 0 and columns[0] in values:
            names = values
        elif len(values) != len(names):
            bad = pl.DataFrame({"row": [row], "line": [line]})
            data.reject(bad, file, f"not {len(names)} tab-separated fields")
        else:
            yield row, dict(zip(names, values, strict=True))


def _terms(text: str) -> str | None:
    """Convert `12<0x18>32` to `t12 t32`, and `-1` or an empty text to None."""
    terms = [term for term in text.split(_TERM) if term not in ("", "-1")]
    return " ".join(f"t{term}" for term in terms) or None


def _write_items(data: DataFolder, file: str) -> set[str]:
    known: set[str] = set()
    part: list[dict[str, str | None]] = []
    schema = ("item_id", "title", "text", "brand", "category")

    def flush() -> None:
        data.add("items", pl.DataFrame(part, schema=dict.fromkeys(schema, pl.String)))
        part.clear()

    for row, record in _records(data, file, _PRODUCT_COLUMNS):
        title, item_id = _terms(record["name"]), record["wid"]
        if title is None or not item_id or item_id in known:
            reason = "repeated item id" if item_id in known else "item without id or title"
            data.reject(pl.DataFrame({"row": [row], **record}), file, reason)
            continue
        known.add(item_id)
        # Levels 3 and 4 are often equal; the path contains each only once.
        path = dict.fromkeys(_terms(record[f"cate_name_{level}"]) for level in range(1, 5))
        category = " > ".join(step for step in path if step) or None
        brand = _terms(record["brand_name"])
        part.append(
            {"item_id": item_id, "title": title, "text": None, "brand": brand, "category": category}
        )
        if len(part) == _ROWS_PER_PART:
            flush()
    flush()
    return known


def _write_users(data: DataFolder, file: str, known: set[str]) -> dict[str, int]:
    """Write all users; returns descriptions and counts of what was left out."""
    sequences: list[dict[str, Any]] = []
    examples: dict[str, list[dict[str, Any]]] = {"valid": [], "test": []}
    left_out = {
        "history steps repeated the item before them and are one step with it": 0,
        "history steps name a product without metadata and were left out": 0,
        "test queries have no labelled product of the catalogue and no test example": 0,
    }
    repeated, unknown, unlabelled = left_out

    def flush() -> None:
        data.add("sequences", sequence_table(sequences))
        sequences.clear()
        for split, rows in examples.items():
            data.add(f"examples/split={split}", example_table(rows))
            rows.clear()

    for row, record in _records(data, file, _BEHAVIOUR_COLUMNS):
        user = f"user-{row:07d}"
        try:
            steps = _history(user, record)
            page = _test_page(user, record, known)
        except ValueError as error:
            data.reject(pl.DataFrame({"row": [row], **record}), file, str(error))
            continue
        kept = [step for step in steps if step.item_id in known]
        left_out[unknown] += len(steps) - len(kept)
        history = [s for n, s in enumerate(kept) if n == 0 or s.item_id != kept[n - 1].item_id]
        left_out[repeated] += len(kept) - len(history)
        left_out[unlabelled] += not page
        examples["test"] += page_examples(user, history, page)
        train, last = _split_last_page(history)
        examples["valid"] += page_examples(user, train, last)
        sequences += windows(user, train)
        if len(sequences) >= _ROWS_PER_PART:
            flush()
    flush()
    return {what: count for what, count in left_out.items() if count}


def _history(user: str, record: dict[str, str]) -> list[Step]:
    """Convert the parallel history lists to steps; raises ValueError if their lengths differ."""
    columns = ("history_qry_list", "history_wid_list", "history_type_list", "history_time_list")
    queries, items, kinds, times = (record[c].split("_") if record[c] else [] for c in columns)
    # There is one more interval than steps: the last one precedes the test query.
    if not len(queries) == len(items) == len(kinds) == len(times) - 1:
        raise ValueError("history lists of unequal length")
    steps: list[Step] = []
    page = 0
    for number, (terms, item) in enumerate(zip(queries, items, strict=True)):
        query = _terms(terms)
        tied = number > 0 and float(times[number]) == 0
        same_query = number > 0 and query is not None and query == steps[-1].query
        page += not (tied or same_query)
        steps.append(Step(item, f"{user}:{page}", query))
    return steps


def _test_page(user: str, record: dict[str, str], known: set[str]) -> list[Step]:
    """Return the clicked candidates of the test query; raises ValueError on unequal lists."""
    items, labels = (record[f"candidate_{c}_list"].split("_") for c in ("wid", "label"))
    if len(items) != len(labels):
        raise ValueError("candidate lists of unequal length")
    positive = {i: float(label) > 0 for i, label in zip(items, labels, strict=True) if i in known}
    negatives = [item for item, liked in positive.items() if not liked]
    query = _terms(record["query"])
    liked = [item for item, label in positive.items() if label]
    return [Step(item, f"{user}:test", query, negatives) for item in liked]


def _split_last_page(history: list[Step]) -> tuple[list[Step], list[Step]]:
    """Split off the last page; it is empty if there is only one page."""
    if not history or history[0].page_id == history[-1].page_id:
        return history, []
    first = next(n for n, step in enumerate(history) if step.page_id == history[-1].page_id)
    return history[:first], history[first:]
