"""The page of a data folder: `description.html` (self-contained), and a one-screen summary."""

from __future__ import annotations

import base64
from typing import Any

from karma_ray.artifacts import join, write_json
from karma_ray.report.rendering import environment, write_bytes

PAGE = "description.html"
NUMBERS = "description.json"
_LABELS = {"derived": "DERIVED", "proxy": "PROXY"}
_PARTS = (("0.1", "10 %"), ("0.5", "half"), ("0.9", "90 %"), ("0.99", "99 %"))


def render_data_page(numbers: dict[str, Any], folder: str) -> str:
    """Write the numbers as JSON and the page to `folder`; returns the path of the page."""
    from karma_ray.report.data_plots import DATA_PLOTS  # here, so that no job waits for matplotlib

    write_json(numbers, join(folder, NUMBERS))
    pictures = [
        {"title": title, "caption": caption, "base64": base64.b64encode(content).decode()}
        for title, caption, plot in DATA_PLOTS
        if (content := plot(numbers)) is not None
    ]
    facts = {
        "numbers": numbers,
        "labels": labels(numbers),
        "tables": tables(numbers),
        "queries": numbers["queries"]["top"],
        "quarantine": quarantine_rows(numbers),
        "pictures": pictures,
    }
    page = join(folder, PAGE)
    text = environment(True).get_template("data.html.jinja").render(facts)
    write_bytes(page, text.encode())
    return page


def labels(numbers: dict[str, Any]) -> list[str]:
    """Return what must be said beside every number of derived queries and proxy negatives."""
    found = []
    if numbers["query_source"] == "derived":
        found.append("Queries are DERIVED from the items that were clicked.")
    if numbers["negative_source"] == "proxy":
        found.append("Exposures are PROXIES: nobody logged what was shown.")
    return found


def tables(numbers: dict[str, Any]) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """Return titled tables of (what, value, meaning)."""
    counts, time = numbers["counts"], numbers["time"]
    exposures, popular = numbers["exposures"], numbers["popularity"]
    queries = numbers["queries"]
    size = [(name.replace("_", " "), f"{n:,}", "") for name, n in counts.items() if n]
    never = popular["never_clicked"] / max(1, counts["items"])
    return [
        ("Size", size),
        ("Time", [
            ("first to last day", f"{time['first']} to {time['last']}", "UTC"),
            ("days", f"{time['days']:,}", f"{time['empty_days']:,} of them without an event"),
        ]),
        ("People", [
            ("clicks per user", *_quantiles(numbers["history"])),
            ("repeats", _percent(numbers["repeats"]["share"]),
             "of the clicks are on an item that the user clicked before" + _sampled(numbers)),
        ]),
        ("Splits", _splits(numbers)),
        ("Exposures", [
            ("pages with exposures", _of(exposures["pages"], counts["events"]), ""),
            ("pages with negatives", _of(exposures["pages_with_negatives"], counts["events"]),
             "gAUC is measured on these alone"),
            ("exposures per click", f"{exposures['per_click']:.1f}", "on pages with exposures"),
            ("exposures per page", *_quantiles(exposures["per_page"])),
        ]),
        ("Popularity", [
            ("clicks on the top 1 % of items", _percent(popular["top_shares"]["0.01"]), ""),
            ("clicks on the top 10 %", _percent(popular["top_shares"]["0.1"]), ""),
            ("Gini coefficient", f"{popular['gini']:.2f}", "0: all alike, 1: one item has all"),
            ("items never clicked", _percent(never), f"{popular['never_clicked']:,} items"),
        ]),
        ("Queries", [
            ("events with a query", _percent(queries["share"]), f"{queries['events']:,} events"),
            ("different queries", f"{queries['distinct']:,}", ""),
            ("asked once", _percent(queries["asked_once_share"]), "of the different queries"),
            ("words per query", *_quantiles(queries["words"])),
        ]),
    ]  # fmt: skip


def quarantine_rows(numbers: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return (when, reason, rows) of all that was set aside."""
    return [
        (when, reason, f"{count:,}")
        for when, reasons in numbers["quarantine"].items()
        for reason, count in reasons.items()
    ]


def data_screen(numbers: dict[str, Any]) -> str:
    """Return the summary that a job prints; at most 40 lines."""
    lines = [f"{numbers['name']}: queries {_shout(numbers['query_source'])}, "
             f"negatives {_shout(numbers['negative_source'])}"]  # fmt: skip
    for title, rows in tables(numbers):
        if title == "Size":
            named = [f"{value} {name}" for name, value, _ in rows]
            lines += [f"  {', '.join(named[:4])}", f"  {', '.join(named[4:])}"]
            continue
        lines += [f"  {what:<32}{value:>14}  {meaning}".rstrip() for what, value, meaning in rows]
    set_aside = quarantine_rows(numbers)
    lines += [f"  set aside ({when}): {reason}: {count}" for when, reason, count in set_aside[:8]]
    if len(set_aside) > 8:
        lines.append(f"  and for {len(set_aside) - 8} further reasons")
    return "\n".join(line for line in lines if line.strip())


def _splits(numbers: dict[str, Any]) -> list[tuple[str, str, str]]:
    cutoffs, rows = numbers["cutoffs"], []
    for name, split in numbers["splits"].items():
        start = cutoffs.get(f"{'valid' if name == 'train' else name}_start", "")
        when = start[:16].replace("T", " ")
        cold = f"{_percent(split['cold_share'])} on items without a training click, from {when}"
        told = f"before {when}" if name == "train" else cold
        rows.append((f"{name} clicks", f"{split['clicks']:,}", told if start else ""))
    return rows


def _sampled(numbers: dict[str, Any]) -> str:
    share = numbers["repeats"]["of_users"]
    return "" if share == 1 else f" (counted for 1 user in {round(1 / share)})"


def _quantiles(values: dict[str, Any]) -> tuple[str, str]:
    """Return the mean, and the quantiles as a sentence."""
    found = values["quantiles"]
    listed = [f"{found[place]:,} for {name}" for place, name in _PARTS if place in found]
    if not listed:
        return "0", ""
    return f"{values['mean']:.1f}", f"at most {', '.join(listed)}; largest {values['max']:,}"


def _of(part: int, whole: int) -> str:
    return _percent(part / max(1, whole))


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _shout(source: str | None) -> str:
    return _LABELS.get(source or "none", source or "unknown")
