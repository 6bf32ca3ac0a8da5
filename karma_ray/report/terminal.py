"""The closing screen of a job: the standing of the run, some cases, and the next command."""

from __future__ import annotations

import shlex
import textwrap
from typing import Any

from karma_ray.artifacts import RunFolder, exists
from karma_ray.evaluation.alarm import messages
from karma_ray.report.account import (
    cost_sentences,
    knowledge_sentences,
    llm_sentences,
    size_sentences,
)
from karma_ray.report.bars import bars
from karma_ray.report.channel_table import screen_lines, verdict_of_lists
from karma_ray.report.record import RunRecord, read_run
from karma_ray.report.standing import check_sentences, format_count, verdict

LINE = 100
NUM_SHOWN = 3
"""Number of items shown of a history, and of a recalled list, in each case."""


def summary(run: str) -> str:
    """Return the closing screen of a run, at most 40 lines; an LLM or lists of recall add ten each.

    Raises InputError without a run.
    """
    record = read_run(run)
    if record.is_ctr:
        return _ctr_summary(record)
    notes = [*check_sentences(record), *record.labels(), *_quarantine(record), *_alarms(record)]
    blocks = [
        [
            f"{record.recipe} on {record.data_name}: "
            f"{format_count(record.metrics.get('num_test'))} test clicks, "
            f"seed {record.config.get('seed', '–')} (rates in percent)"
        ],
        _wrapped(verdict(record)),
        bars(record),
        [*screen_lines(record), *_wrapped(verdict_of_lists(record))],
        *(_case(name, case) for name, case in _two_cases(record)),
        _wrapped(notes),
        _wrapped(_account(record)),
        _places(record),
    ]
    return "\n\n".join("\n".join(block) for block in blocks if block)


def _ctr_summary(record: RunRecord) -> str:
    """Return the closing screen of a CTR model."""
    from karma_ray.report.ctr_page import ctr_bars, ctr_sentences, ctr_title

    blocks = [
        _wrapped([ctr_title(record)]), _wrapped(ctr_sentences(record)), ctr_bars(record),
        _wrapped([*record.labels(), *_quarantine(record)]), _wrapped(cost_sentences(record)),
        _places(record),
    ]  # fmt: skip
    return "\n\n".join("\n".join(block) for block in blocks if block)


def _account(record: RunRecord) -> list[str]:
    """Say of a run with an LLM which it is, how much of it learns, what it cost and forgot."""
    llm = llm_sentences(record)
    if not llm:
        return knowledge_sentences(record)
    size, cost = size_sentences(record), cost_sentences(record)
    return [" ".join([*llm, *size[:1]]), *cost, *knowledge_sentences(record)]


def _two_cases(record: RunRecord) -> list[tuple[str, dict[str, Any]]]:
    """The first hit and the first miss among the cases, which are drawn at random."""
    found: dict[str, dict[str, Any]] = {}
    for case in record.cases:
        hit = any(item["is_truth"] for item in case.get("recalled") or [])
        found.setdefault("a hit" if hit else "a miss", case)
    return sorted(found.items())


def _case(name: str, case: dict[str, Any]) -> list[str]:
    """Query, history, the first recalled titles with the clicked one marked, decoded text."""
    rank = case.get("rank")
    history = [step["title"] for step in (case.get("history") or [])[-NUM_SHOWN:]]
    parts = [
        (name, f"query: {case.get('query') or '(none)'}"),
        ("history", " | ".join(history) or "(empty)"),
        ("clicked", f"{case['truth']} (rank {rank if rank is not None else '–'})"),
    ]
    for place, item in enumerate((case.get("recalled") or [])[:NUM_SHOWN]):
        mark = "* " if item["is_truth"] else "  "
        parts.append(("recalled" if not place else "", mark + item["title"]))
    if case.get("decoded"):
        parts.append(("h_t says", case["decoded"]))
    return [f"{label:<10}{_cut(text, LINE - 10)}" for label, text in parts]


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 4].rstrip() + " ..."


def _places(record: RunRecord) -> list[str]:
    lines = [f"run folder  {record.run}"]
    report = RunFolder(record.run).path("report", "report.html")
    if exists(report):
        lines.append(f"report      {report}")
    return [*lines, f"next        {_next_command(record)}"]


def _wrapped(sentences: list[str]) -> list[str]:
    return [
        line
        for sentence in sentences
        for line in textwrap.wrap(sentence, LINE, subsequent_indent="  ")
    ]


def _quarantine(record: RunRecord) -> list[str]:
    reasons = record.data.get("quarantined") or {}
    if not isinstance(reasons, dict) or not reasons:
        return []
    counts = ", ".join(f"{reason} {format_count(count)}" for reason, count in reasons.items())
    return [f"Quarantined rows: {counts}."]


def _alarms(record: RunRecord) -> list[str]:
    """Return the alarms without advice, which the log and the report contain."""
    found = (told for line in record.lines for told in messages(line, with_help=False))
    return [told[0].upper() + told[1:] for told in found]


def _next_command(record: RunRecord) -> str:
    if not record.is_trained:
        return "python jobs/train.py --recipe karma_text (and the same --data)"
    if record.is_ctr:
        recalls = record.config.get("ranking", {}).get("vectors") or "RUN"
        return shlex.join(["python", "jobs/serve.py", recalls, "--ranker", record.run])
    return f"python jobs/serve.py {shlex.quote(record.run)}"
