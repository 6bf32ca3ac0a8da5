"""Grouping of a table's records into sets that can be compared.

Records are compared only if they were made under the same settings on the same data. Rankers that
are not trained are compared with all records of the same data.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import replace

from karma_ray import recipes
from karma_ray.studies.comparison import Group, Variant
from karma_ray.studies.intervals import Intervals
from karma_ray.studies.records import Record, baseline_key, chosen, record_key
from karma_ray.studies.rows import Row, Table
from karma_ray.training.config import EXECUTION

SEARCHED = "each row at its best setting"
"""Condition of a group whose trained rows were searched."""


def grouped(records: Iterable[Record], intervals: Intervals, table: Table) -> list[Group]:
    """Group the table's records by data and condition, with rows in the table's order.

    Rankers that are not trained appear in every condition, because training settings do not
    affect them.
    """
    rows, records = {row.name: row for row in table.rows}, list(records)
    recipe = rows[table.baseline].built_from
    found: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        if record.get("row") in rows and (key := baseline_key(record, recipe)):
            found.setdefault((record["data"], key), []).append(record)
    result = []
    for (data, key), members in sorted(found.items()):
        condition = _condition(members, recipe)
        members += _counted(records, members, rows)
        plain = [record for record in members if not record.get("searched")]
        if plain:
            variants = _variants(plain, rows, recipe, intervals)
            base = [v for v in variants if v.row.name == table.baseline and v.key == key]
            result.append(Group(data, condition, base[0] if base else None, variants))
        if len(plain) < len(members):
            best, tried = chosen(members)
            variants = tuple(
                replace(v, tried=tried.get(v.row.name, 1))
                for v in _variants(best, rows, recipe, intervals)
            )
            base = [v for v in variants if v.row.name == table.baseline]
            told = ", ".join(part for part in (condition, SEARCHED) if part)
            result.append(Group(data, told, base[0] if base else None, variants))
    return _told_apart(result)


def _counted(records: list[Record], members: list[Record], rows: Mapping[str, Row]) -> list[Record]:
    """Return records of untrained rows that were made under other settings, but would be the same
    under those of `members`."""
    there, first = {record["row"] for record in members}, members[0]
    made_under = tuple(first.get("assignments", [])), first.get("data_hash")
    wanted = {
        name: _key(*made_under, row.built_from)
        for name, row in rows.items()
        if row.built_from not in recipes.TRAINED and name not in there
    }
    return [
        record
        for record in records
        if record["data"] == first["data"]
        and record.get("row") in wanted
        and record_key(record) == wanted[record["row"]]
    ]


def _variants(
    members: list[Record], rows: Mapping[str, Row], recipe: str, intervals: Intervals
) -> tuple[Variant, ...]:
    by_run: dict[tuple[str, str], list[Record]] = {}
    for record in members:
        by_run.setdefault((record["row"], record_key(record)), []).append(record)
    found = []
    for name, row in rows.items():
        of_row = {key: found for (row_name, key), found in by_run.items() if row_name == name}
        for key, records in of_row.items():
            records.sort(key=lambda record: record["seed"])
            told = [a for a in _settings(records[0]) if not _matters(records[0], recipe, a)]
            label = ", ".join([row.title, *(told if len(of_row) > 1 else [])])
            found.append(Variant(row, label, key, {r["seed"]: r for r in records}, intervals))
    return tuple(found)


def _settings(record: Record) -> list[str]:
    """Return the --set assignments of a record without execution settings."""
    return [a for a in record.get("set", []) if a.split("=")[0].strip() not in EXECUTION]


@functools.lru_cache(maxsize=4096)
def _key(assignments: tuple[str, ...], data_hash: str | None, recipe: str) -> str:
    return baseline_key({"assignments": assignments, "data_hash": data_hash}, recipe)


def _matters(record: Record, recipe: str, assignment: str) -> bool:
    """Whether the baseline would differ without this assignment."""
    all_of_them = tuple(record.get("assignments", []))
    rest = tuple(a for a in all_of_them if a != assignment)
    data = record.get("data_hash")
    return _key(all_of_them, data, recipe) != _key(rest, data, recipe)


def _condition(members: list[Record], recipe: str) -> str:
    """Describe the assignments on which the baseline depends."""
    told = dict.fromkeys(
        assignment
        for record in members
        for assignment in _settings(record)
        if _matters(record, recipe, assignment)
    )
    return ", ".join(told)


def _told_apart(groups: list[Group]) -> list[Group]:
    """Number groups of a data set with equal conditions, which differ in settings that are not in
    --set (the study's own)."""
    seen: dict[tuple[str, str], int] = {}
    result = []
    for group in groups:
        place = (group.data, group.condition)
        seen[place] = seen.get(place, 0) + 1
        number_of = seen[place]
        told = f"{group.condition or 'study settings'} ({number_of})"
        condition = group.condition if number_of == 1 else told
        result.append(Group(group.data, condition, group.baseline, group.variants))
    return result
