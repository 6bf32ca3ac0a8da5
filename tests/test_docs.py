"""What README, CONTRIBUTING and docs/ name is there: links, files, fields, flags and requests.

docs/log.md is left out: it says what was run when it was written.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

from karma_ray.config import SHORT, Config

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md", ROOT / "CONTRIBUTING.md",
    *sorted(page for page in (ROOT / "docs").glob("*.md") if page.name != "log.md"),
]  # fmt: skip
METHOD = ROOT / "docs/method.md"
by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def paths_of(config: Any, prefix: str = "") -> Iterator[str]:
    """Every dotted path that `--set` takes, and the parts that hold them."""
    for field in fields(config):
        yield prefix + field.name
        value = getattr(config, field.name)
        if is_dataclass(value):
            yield from paths_of(value, f"{prefix}{field.name}.")


def commands(text: str) -> list[str]:
    """Lines of the code blocks, continued ones as one."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


@by_page
def test_links_lead_to_files_that_are_there(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


@by_page
def test_modules_that_are_named_are_there(page: Path) -> None:
    """From the repository's root, from the package or from the tests, or by name alone."""
    named = set(re.findall(r"(?<![\w./])([\w/]+\.py)\b", page.read_text()))
    folders = ("karma_ray", "jobs", "benchmarks", "tests", "tune_spaces")
    everywhere = {path.name for folder in folders for path in (ROOT / folder).rglob("*.py")}
    roots = (ROOT, ROOT / "karma_ray", ROOT / "tests")
    missing = [
        name
        for name in named
        if not any((root / name).exists() for root in roots)
        and ("/" in name or name not in everywhere)
    ]
    assert not missing


@by_page
def test_fields_that_are_named_can_be_set(page: Path) -> None:
    known = {*paths_of(Config()), *SHORT}
    sections = "|".join(sorted({path.split(".")[0] for path in known if "." in path}))
    named = re.findall(rf"(?:`|--set )((?:{sections})\.[a-z_.]+)(?=[=`\s])", page.read_text())
    assert not {name for name in named if name not in known and not name.endswith(".py")}


@by_page
def test_jobs_have_the_flags_that_commands_give_them(page: Path) -> None:
    shared = (ROOT / "karma_ray/cli.py").read_text()
    for line in commands(page.read_text()):
        for script in re.findall(r"python ((?:jobs|benchmarks)/\w+\.py)", line):
            known = (ROOT / script).read_text() + shared
            command = line.split(script, 1)[1].split("#", 1)[0]
            for flag in re.findall(r"(?<=\s)--[a-z-]+", command):
                assert f'"{flag}"' in known, f"{script} has no {flag}"


@by_page
def test_requests_that_can_be_pasted_are_requests(page: Path) -> None:
    from karma_ray.serving.schemas import RecallRequest

    for command in re.findall(r"^curl .*?'$", page.read_text(), flags=re.MULTILINE | re.DOTALL):
        words = shlex.split(command)
        # What curl says of `-d` when it is not told: a form, which the endpoint refuses.
        assert "content-type: application/json" in words
        RecallRequest.model_validate(json.loads(words[words.index("-d") + 1]))


def citations() -> Iterator[tuple[str, str]]:
    """Every (file, section) that the repository cites of docs/method.md, as "method 1.5"."""
    folders = ("karma_ray", "jobs", "benchmarks", "tests", "tune_spaces")
    code = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    for path in [*code, *PAGES, ROOT / "docs/log.md"]:
        pattern = r"\bmethod[\s#]+(\d(?:\.\d+)?(?:(?:,| and| to) \d\.\d+)*)\b"
        for cited in re.findall(pattern, path.read_text(), flags=re.IGNORECASE):
            for section in re.findall(r"\d(?:\.\d+)?", cited):
                yield str(path.relative_to(ROOT)), section


def test_sections_of_the_method_that_are_cited_are_there() -> None:
    headings = re.findall(r"^#+ (\d(?:\.\d+)?)\.? ", METHOD.read_text(), flags=re.MULTILINE)
    cited = list(citations())
    assert len(cited) > 40
    assert not [(path, section) for path, section in cited if section not in headings]


def test_the_method_explains_every_equation_of_the_paper() -> None:
    named = re.findall(r"\*\*Equations? (\d)(?: and (\d))?\*\*", METHOD.read_text())
    assert sorted("".join(numbers for pair in named for numbers in pair)) == list("123456789")


@pytest.mark.parametrize(
    ("named", "file"), [("toy shop", "toy_shop"), ("film ratings", "movielens")]
)
def test_the_tables_of_the_funnel_are_those_of_the_reports(named: str, file: str) -> None:
    text = (ROOT / "docs/funnel.md").read_text().split("## What it showed")[1]
    table = text.split(named)[1].split("\n\n|")[1]
    rows = re.findall(r"^\| [\w -]*\|.*\|$", table, flags=re.MULTILINE)
    printed = set(re.findall(r"[+−]?\d+\.\d\d", "\n".join(rows)))
    found = json.loads((ROOT / f"docs/results/funnel/{file}.json").read_text())
    values = [value for value in found.values() if isinstance(value, float)]
    rounded = {f"{value:{sign}.2f}".replace("-", "−") for value in values for sign in ("", "+")}
    assert len(rows) >= 9 and len(printed) > 30
    assert not printed - rounded


def test_the_pages_name_what_is_looked_for() -> None:
    """The patterns above find something, so that they cannot pass by finding nothing."""
    text = "\n".join(page.read_text() for page in PAGES)
    assert len(commands(text)) > 40 and text.count("\ncurl ") == 3
    assert "`training.micro_tokens" in text and "--set objective.logq" in text
