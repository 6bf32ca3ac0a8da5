"""The report of all studies: tables as Markdown, and a self-contained page with pictures.

Both are generated in the folder of the records; docs/results.md discusses them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from karma_ray.artifacts import value_hash
from karma_ray.studies.comparison import Group, Variant
from karma_ray.studies.findings import Differences, differences, group_sections
from karma_ray.studies.grouping import grouped
from karma_ray.studies.intervals import Intervals
from karma_ray.studies.overview import gains, overview, picture
from karma_ray.studies.plots import curve_picture, delta_picture
from karma_ray.studies.records import read_records
from karma_ray.studies.sections import Section, html_page
from karma_ray.studies.tables import TABLES

COMMAND = "python jobs/ablate.py report"
TABLES_FILE = "tables.md"
PICTURED_GAINS = "gains.png"
_TITLE = "# Tables of all studies"


def write_report(results: str | Path) -> tuple[Path, Path]:
    """Write the report of every record in `results` there; returns (Markdown, HTML)."""
    results = Path(results)
    pictures: dict[str, bytes] = {}
    sections: list[Section] = []
    records = read_records(results)
    intervals = Intervals(results)
    groups = {name: grouped(records, intervals, table) for name, table in TABLES.items()}
    found_gains = gains([*groups["table1"], *groups["infonce"]])
    if (drawn_gains := picture(found_gains)) is not None:
        pictures[PICTURED_GAINS] = drawn_gains
    sections += overview(found_gains, groups["baselines"], PICTURED_GAINS if drawn_gains else "")
    for name, table in TABLES.items():
        for group in groups[name] if name == "table1" else _worth_telling(groups[name]):
            found = differences(group)
            drawn = _drawn(group, name, found, pictures)
            sections += group_sections(group, table, found, drawn)
    intervals.save(records)
    command = COMMAND if results == Path("docs/results") else f"{COMMAND} --results {results}"
    folder = results / "report"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png"):  # pictures of groups that were renamed
        old.unlink()
    for name, content in pictures.items():
        (folder / name).write_bytes(content)
    markdown, page = results / TABLES_FILE, folder / "report.html"
    markdown.write_text(_markdown(sections, command))
    page.write_text(html_page("Results", sections, pictures, command))
    return markdown, page


def _worth_telling(groups: Sequence[Group]) -> list[Group]:
    """Select groups that compare more than Table 1 does.

    Untrained rankers are the same under every condition. They are shown with the trained rivals of
    their data, or once if there are none.
    """
    shared = {row.name for row in TABLES["table1"].rows}

    def own(group: Group) -> list[Variant]:
        rows = [v for v in group.variants if v.row.name not in shared]
        return rows if len(group.variants) > 1 else []

    told = [group for group in groups if any(not v.is_counted for v in own(group))]
    data = {group.data for group in told}
    for group in sorted(groups, key=lambda group: len(group.condition)):
        if own(group) and group.data not in data:
            data.add(group.data)
            told.append(group)
    return told


def _drawn(
    group: Group, table: str, found: Differences, pictures: dict[str, bytes]
) -> list[tuple[str, str]]:
    """Add a group's pictures to `pictures`; returns their titles and names."""
    digest = f"-{value_hash(group.condition)[:8]}" if group.condition else ""
    stem = f"{table}-{group.data}{digest}"
    drawn = {
        f"{stem}-differences.png": (
            "Differences: mean, 95 % interval over users and seeds, a stroke per seed",
            delta_picture([variant.label for variant in group.variants], found),
        ),
        f"{stem}-curves.png": ("Validation curves", curve_picture(group)),
    }
    kept = {name: (title, png) for name, (title, png) in drawn.items() if png is not None}
    pictures.update({name: png for name, (_, png) in kept.items()})
    return [(title, name) for name, (title, _) in kept.items()]


def _markdown(sections: Sequence[Section], command: str) -> str:
    told = f"Made by `{command}`, which also draws pictures into `report/` beside this file."
    lines = [_TITLE, "", told, ""]
    for section in sections:
        heading = f"{'#' * section.level} {section.title}"
        if section.folded:
            lines += ["<details>", f"<summary>{section.title}</summary>", ""]
        else:
            lines += [heading, ""]
        if len(section.notes) > 1:
            lines += [*(f"- {note}" for note in section.notes), ""]
        else:
            lines += [line for note in section.notes for line in (note, "")]
        if section.rows:
            lines += [_line(section.header), "|" + "---|" * len(section.header)]
            lines += [*(_line(row) for row in section.rows), ""]
        if section.folded:
            lines += ["</details>", ""]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
