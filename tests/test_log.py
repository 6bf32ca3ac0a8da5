"""docs/log.md is cited by the ids of its entries, and every id that is cited is there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IDS = re.findall(r"^## (\S+) · ", (ROOT / "docs" / "log.md").read_text(), flags=re.MULTILINE)
CITED = re.compile(r"log(?:\.md\)?)?,\s+(L\d+(?:(?:,| and)\s+L\d+)*)")


def test_every_entry_has_the_next_id() -> None:
    assert [f"L{number}" for number in range(1, len(IDS) + 1)] == IDS
    headings = re.findall(r"^## ", (ROOT / "docs" / "log.md").read_text(), flags=re.MULTILINE)
    assert len(headings) == len(IDS)


def test_code_cites_entries_of_the_log_that_are_there() -> None:
    code = [p for f in ("karma_ray", "jobs", "benchmarks") for p in (ROOT / f).rglob("*.py")]
    for path in [*code, *(ROOT / "docs").glob("*.md"), ROOT / "README.md"]:
        text = path.read_text()
        cited = [one for many in CITED.findall(text) for one in re.findall(r"L\d+", many)]
        assert set(cited) <= set(IDS), path
        if path.suffix == ".py":
            assert text.count("docs/log.md") == len(CITED.findall(text)), path
