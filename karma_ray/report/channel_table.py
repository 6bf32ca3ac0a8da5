"""The table of the lists of recall: what each finds alone, what it adds, and their blend."""

from __future__ import annotations

from typing import Any, NamedTuple

from karma_ray.report.record import RunRecord, number

DEPTHS = (10, 50, 200)
SHOWN = 50
"""The depth of the differences on the closing screen."""


class ListRow(NamedTuple):
    """One list, or one floor."""

    name: str
    role: str
    """`blend`, `channel` or `floor`."""
    rates: list[str]
    """HR@K at each depth."""
    adds: list[str]
    """What the blend has more than one fitted without this list; empty for a floor."""
    gains: list[str]
    """What the blend has more than this list, with its interval; empty for the blend."""


def list_rows(record: RunRecord) -> list[ListRow]:
    """Return the rows of the table; none for a run without channels."""
    return [
        ListRow(
            _name(row), row["role"], [_plain(row.get(f"HR@{k}")) for k in DEPTHS],
            [_signed(row.get(f"increment@{k}")) for k in DEPTHS],
            [_interval(row.get(f"gain@{k}")) for k in DEPTHS],
        )
        for row in record.channels.get("rows", [])
    ]  # fmt: skip


def verdict_of_lists(record: RunRecord) -> list[str]:
    """Say what serves by default, and where the blend is not above a list or floor for certain."""
    facts = record.channels
    if not facts.get("rows"):
        return []
    answers = "the blend answers" if facts.get("is_served") else "the model alone answers"
    reason = _reason(facts)
    behind = [
        f"{_name(row)} at {k}"
        for row in facts["rows"]
        for k in DEPTHS
        if (gain := row.get(f"gain@{k}")) and gain[1] <= 0
    ]
    level = (
        f"not above for certain: {', '.join(behind)}" if behind else "above every list and floor"
    )
    return [f"Recall by lists: {answers} unless --channels says otherwise{reason}; {level}."]


def screen_lines(record: RunRecord) -> list[str]:
    """Return the table for the closing screen: lists, and the best floor."""
    rows = list_rows(record)
    if not rows:
        return []
    floors = [row for row in record.channels["rows"] if row["role"] == "floor"]
    best = max(floors, key=lambda row: row[f"HR@{SHOWN}"], default=None)
    kept = [row for row in rows if row.role != "floor" or (best and row.name == _name(best))]
    count, place = record.channels["num_test"], DEPTHS.index(SHOWN)
    head = f"{f'lists ({count:,} test clicks)':<28}" + "".join(f"{f'HR@{k}':>8}" for k in DEPTHS)
    lines = [f"{head}{f'adds@{SHOWN}':>9}  blend above it, HR@{SHOWN}"]
    for row in kept:
        rates = "".join(f"{rate:>8}" for rate in row.rates)
        lines.append(f"{row.name:<28}{rates}{row.adds[place]:>9}  {row.gains[place]}".rstrip())
    return lines


def _name(row: dict[str, Any]) -> str:
    names = {"dense": "dense (the model)", "popularity": "popularity in the query"}
    if row["role"] == "channel":
        return names.get(row["name"], str(row["name"]))
    return "blend" if row["role"] == "blend" else f"floor {row['name']}"


def _reason(facts: dict[str, Any]) -> str:
    low, high = (number(facts.get("measured", {}).get(name)) for name in ("low", "high"))
    if low is None or high is None:
        return " (too few validation clicks to fit weights)"
    depth = facts["measured"].get("depth", SHOWN)
    return f" (validation HR@{depth} {low:+.1f} to {high:+.1f})"


def _plain(value: object) -> str:
    found = number(value)
    return "" if found is None else f"{found:.1f}"


def _signed(value: object) -> str:
    found = number(value)
    return "" if found is None else f"{found:+.1f}"


def _interval(gain: list[float] | None) -> str:
    return "" if gain is None else f"{gain[0]:+.1f} [{gain[1]:+.1f}, {gain[2]:+.1f}]"
