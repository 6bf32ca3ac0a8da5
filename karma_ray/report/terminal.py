"""The one screen a job ends with: where this run stands, where it lies, what to type next."""

from __future__ import annotations

import shlex
import textwrap

from karma_ray.artifacts import RunFolder, exists
from karma_ray.evaluation.alarm import messages
from karma_ray.report.record import Ranked, RunRecord, number, read_run
from karma_ray.report.standing import format_count, format_metric, headline

COLUMNS = ("HR@10", "HR@50", "NDCG@10", "MRR", "gAUC", "JS@50")
PARTS = {"in_query/": "inside the query", "warm/": "warm items", "cold/": "cold items"}


def summary(run: str) -> str:
    """The closing screen of a run, at most 40 lines; raises InputError when there is no run."""
    record = read_run(run)
    lines = [
        f"{record.recipe} on {record.data_name}: "
        f"{format_count(record.metrics.get('num_test'))} test clicks, "
        f"seed {record.config.get('seed', '–')} (rates in percent)",
        "",
        *_table(record),
        "",
        *_wrapped([*headline(record), *record.labels(), *_quarantine(record), *_alarms(record)]),
        "",
        f"run folder  {record.run}",
    ]
    report = RunFolder(record.run).path("report", "report.html")
    if exists(report):
        lines.append(f"report      {report}")
    lines.append(f"next        {_next_command(record)}")
    return "\n".join(lines)


def _table(record: RunRecord) -> list[str]:
    rankers = record.rankers()
    names = [*(_label(ranker) for ranker in rankers), *(f"    {part}" for part in PARTS.values())]
    width = max(map(len, names))
    lines = [" " * width + "".join(f"{column:>9}" for column in COLUMNS)]
    for ranker in rankers:
        lines.append(_row(_label(ranker), width, ranker, ""))
        if ranker.role == "run":
            lines += [
                _row(f"    {part}", width, ranker, prefix)
                for prefix, part in PARTS.items()
                if number(ranker.metrics.get(f"{prefix}num_test"))
            ]
    return lines


def _row(label: str, width: int, ranker: Ranked, prefix: str) -> str:
    cells = (format_metric(ranker.value(prefix + column)) for column in COLUMNS)
    return f"{label:<{width}}" + "".join(f"{cell:>9}" for cell in cells)


def _label(ranker: Ranked) -> str:
    mark = {"floor": "  ", "run": "> ", "ceiling": "  "}[ranker.role]
    note = {"floor": "", "run": " (this run)", "ceiling": " (ceiling)"}[ranker.role]
    return mark + ranker.name + note


def _wrapped(sentences: list[str]) -> list[str]:
    return [
        line
        for sentence in sentences
        for line in textwrap.wrap(sentence, 100, subsequent_indent="  ")
    ]


def _quarantine(record: RunRecord) -> list[str]:
    reasons = record.data.get("quarantined") or {}
    if not isinstance(reasons, dict) or not reasons:
        return []
    counts = ", ".join(f"{reason} {format_count(count)}" for reason, count in reasons.items())
    return [f"Quarantined rows: {counts}."]


def _alarms(record: RunRecord) -> list[str]:
    """What usually helps stands in the log and in the report."""
    found = (told for line in record.lines for told in messages(line, with_help=False))
    return [told[0].upper() + told[1:] for told in found]


def _next_command(record: RunRecord) -> str:
    if not record.is_trained:
        return "python jobs/train.py --recipe karma_text (and the same --data)"
    return f"python jobs/serve.py {shlex.quote(record.run)}"
