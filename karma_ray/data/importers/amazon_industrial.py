"""Importer of one category of Amazon Reviews 2018 (5-core), which is pre-split and has no times.

The category is taken from the file names, such as `Industrial_and_Scientific.items.parquet`.
"""

from __future__ import annotations

import html
import re
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
from karma_ray.data.importers.source import find_file, find_files, read_parquet
from karma_ray.errors import InputError

_NAME = "Industrial_and_Scientific"
_ITEM_COLUMNS = ("item_id", "title", "description", "brand")
_ROW_COLUMNS = ("user_id", "history_item_id", "item_id")
_Row = tuple[list[str], str]  # history, next item
_TAG = re.compile(r"</?[a-zA-Z][^>]*>")
_SCRIPT = re.compile(r"<(script|style)\b.*?</\1\s*>", re.IGNORECASE | re.DOTALL)
_BETWEEN = re.compile(r"""['"]\s*,\s*['"]""")
_SPACED_ENTITY = re.compile(r"&\s+(amp|quot|lt|gt|nbsp);")


def import_amazon_industrial(src: str, out: str, *, seed: int = 0) -> dict[str, Any]:
    """Write sequences and examples of the pre-split files in `src`; returns the manifest.

    Nothing is drawn at random, so `seed` has no effect.
    """
    category = _category(src)
    items_file = find_file(src, f"{category}.items.parquet")
    valid_file = find_file(src, f"{category}.valid.parquet")
    test_file = find_file(src, f"{category}.test.parquet")
    products = read_parquet(items_file, _ITEM_COLUMNS, _ROW_COLUMNS).with_row_index("row")
    valid, test = (
        read_parquet(file, _ROW_COLUMNS, _ROW_COLUMNS) for file in (valid_file, test_file)
    )
    with DataFolder(out) as data:
        items = _items(products)
        untitled = items["title"].str.len_chars() == 0
        data.reject(products.filter(untitled), items_file, "title empty")
        data.add("items", items.filter(~untitled))

        known = set(items.filter(~untitled)["item_id"])
        valid_rows = _rows_by_user(data, valid, valid_file, known)
        test_rows = _rows_by_user(data, test, test_file, known)
        for split, rows in (("valid", valid_rows), ("test", test_rows)):
            data.add(f"examples/split={split}", example_table(_examples(rows, split)))
        sequences = []
        limit = max((len(past) for rows in valid_rows.values() for past, _ in rows), default=1)
        for user, user_rows in valid_rows.items():
            history = training_history(user_rows, limit)
            steps = [Step(item, f"{user}:train:{n}") for n, item in enumerate(history)]
            sequences += list(windows(user, steps))
        data.add("sequences", sequence_table(sequences))
        return data.finish(
            name="amazon_industrial" if category == _NAME else f"amazon_{category.lower()}",
            query_source="none",
            negative_source="none",
            licence="Amazon review data: research use",
            presplit=True,
            notes=[
                f"category {category.replace('_', ' ')}",
                "split upstream by global time 8:1:1, without times: timestamps are null",
                "the upstream train rows are absent. Training uses the clicks in front of each "
                "user's first valid target, at most 10; users without a valid row train nothing, "
                "and test "
                "histories are never trained on, because they hold valid targets",
                "a user's very first click has no upstream row, so a few training clicks may be "
                "younger than the start of validation",
                "no queries and no negatives: gAUC has no groups and is not reported",
            ],
        )


def _category(src: str) -> str:
    """Return the category of the files in `src`, from the name of the items file."""
    end = ".items.parquet"
    names = [path.rsplit("/", 1)[-1] for path in find_files(src, "", end)]
    found = [name.removesuffix(end) for name in names if not name.startswith((".", "_"))]
    if len(found) > 1:
        raise InputError("SRC", src, f"holds several categories: {', '.join(found)}; keep one")
    return found[0] if found else _NAME


def training_history(rows: list[_Row], max_history: int) -> list[str]:
    """Return the history of the first row of a user, which continues no other row.

    A user's rows overlap: each history is the previous one plus its target, cut upstream to the
    newest `max_history` clicks. All histories but the first therefore contain validation targets.
    """
    continued = {tuple([*history, item][-max_history:]) for history, item in rows}
    starts = [history for history, _ in rows if tuple(history) not in continued]
    if len(starts) == 1:
        return starts[0]
    # Without a unique first row the order is unclear: keep only items that are no targets.
    targets = {item for _, item in rows}
    return [item for item in rows[0][0] if item not in targets]


def clean_text(text: str | None) -> str:
    """Remove tags, entities, list brackets and repeated spaces from a text."""
    text = (text or "").strip()
    if text.startswith(("['", '["')):
        text = _BETWEEN.sub(" ", text[2:].removesuffix("]").rstrip("'\""))
    text = _SPACED_ENTITY.sub(r"&\1;", text)
    text = html.unescape(html.unescape(text))
    text = _TAG.sub(" ", _SCRIPT.sub(" ", text))
    return " ".join(text.split())


def _items(products: pl.DataFrame) -> pl.DataFrame:
    def cleaned(name: str) -> pl.Series:
        return pl.Series(name, [clean_text(value) for value in products[name]], pl.String)

    def or_null(values: pl.Series) -> pl.Series:
        return values.replace("", None)

    return pl.DataFrame(
        {
            "item_id": products["item_id"],
            "title": cleaned("title"),
            "text": or_null(cleaned("description")),
            "brand": or_null(cleaned("brand")),
        }
    )


def _rows_by_user(
    data: DataFolder, frame: pl.DataFrame, file: str, known: set[str]
) -> dict[str, list[_Row]]:
    """Return (history, next item) of every user in file order; rows with unknown items go."""
    frame = frame.with_row_index("row")
    null = pl.any_horizontal(pl.col(_ROW_COLUMNS).is_null())
    data.reject(frame.filter(null), file, "null user, history or item")
    frame = frame.filter(~null)
    unknown = ~pl.col("item_id").is_in(known)
    data.reject(frame.filter(unknown), file, "item not in the catalogue")
    grouped: dict[str, list[_Row]] = {}
    columns = ("user_id", "history_item_id", "item_id")
    for user, history, item in frame.filter(~unknown).select(columns).iter_rows():
        grouped.setdefault(user, []).append(([i for i in history if i in known], item))
    return grouped


def _examples(rows: dict[str, list[_Row]], split: str) -> list[dict[str, Any]]:
    examples: list[dict[str, Any]] = []
    for user, user_rows in rows.items():
        for number, (history, item) in enumerate(user_rows):
            past = [Step(i, f"{user}:past:{n}") for n, i in enumerate(history)]
            target = Step(item, f"{user}:{split}:{number}")
            examples += page_examples(user, past, [target])
    return examples
