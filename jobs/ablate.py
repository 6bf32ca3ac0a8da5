"""Run the paper's tables, rows and seeds, with a committed record per run, and a report.

    python jobs/ablate.py table1 --data DATA --seeds 3
    python jobs/ablate.py table2 --data DATA --seeds 3 --rows karma_text,ar_mse_add
    python jobs/ablate.py baselines --data DATA --set model.user_decoder.query_mode=none
    python jobs/ablate.py baselines --data DATA --search 4
    python jobs/ablate.py table1 --data DATA --without-ray --max-minutes 50
    python jobs/ablate.py report

Trials are tasks on Ray, or with --without-ray children of this process. A run that has a record in
--results with the same configuration and data is not repeated, so a study can be stopped and
continued, also on another machine. docs/ablations.md lists the rows.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from karma_ray.cli import cache_flag, parser, run
from karma_ray.errors import InputError, KarmaRayError
from karma_ray.runs.node_hours import NodeHours
from karma_ray.runs.sources import CACHE, toy_shop
from karma_ray.studies.here import ThisMachine
from karma_ray.studies.machine import Machine
from karma_ray.studies.page import write_report
from karma_ray.studies.plan import (
    Data,
    check_settings,
    named_rows,
    parsed_seeds,
    planned,
    possible_rows,
)
from karma_ray.studies.search import chosen_trials, search_trials
from karma_ray.studies.study import Outcome, run_study
from karma_ray.studies.tables import TABLES
from karma_ray.studies.tracking import send_study
from karma_ray.studies.trial import Trial

CHOICES = [*TABLES, "report"]
RUNS = "runs/study"


def main(argv: list[str] | None = None) -> None:
    arguments = _arguments(argv)
    failed: dict[str, str] = {}
    if arguments.table not in CHOICES:
        raise InputError("TABLE", arguments.table, choices=CHOICES)
    if arguments.table != "report" and not arguments.report_only:
        named = named_rows(arguments.table, arguments.rows)
        seeds, assignments = parsed_seeds(arguments.seeds), arguments.assignments
        check_settings(named, assignments)
        data = Data.open(arguments.data or toy_shop(arguments.cache or CACHE))
        rows, skipped = possible_rows(named, data, assignments)
        for name, reason in skipped.items():
            print(f"skipped  {name}: {reason}")
        begun = time.monotonic()
        if arguments.search is None:
            outcomes = [_run(planned(rows, seeds, data, assignments), data, arguments, begun)]
        else:
            number = arguments.search
            trials = search_trials(rows, seeds[0], data, assignments, number)
            outcomes = [_run(trials, data, arguments, begun)]
            if not outcomes[0].left:  # choose only after all candidates have run
                results = Path(arguments.results)
                trials = chosen_trials(rows, seeds, data, assignments, number, results)
                outcomes.append(_run(trials, data, arguments, begun))
        failed = {name: reason for o in outcomes for name, reason in o.failed.items()}
    markdown, page = write_report(arguments.results)
    send_study(arguments.results)
    print(f"report   {markdown} {page}")
    if failed:
        raise KarmaRayError("; ".join(f"{name}: {reason}" for name, reason in failed.items()))


def _run(trials: Sequence[Trial], data: Data, flags: argparse.Namespace, begun: float) -> Outcome:
    """Run what is missing in the rest of --max-minutes, and print how it ended."""
    minutes = flags.max_minutes
    if minutes and minutes > 0:
        minutes = max(1e-3, minutes - (time.monotonic() - begun) / 60)
    machine = _machine(flags.without_ray)
    with NodeHours(RUNS, machine.executor.count_nodes):
        outcome = run_study(
            trials,
            data,
            flags.results,
            machine,
            runs=RUNS,
            cache=flags.cache or CACHE,
            concurrent=flags.concurrent,
            max_minutes=minutes,
        )
    print(f"runs     {outcome.told()}")
    return outcome


def _machine(without_ray: bool) -> Machine:
    if without_ray:
        return ThisMachine()
    from karma_ray.cluster.study import RayMachine

    return RayMachine()


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    flags = parser(__doc__ or "")
    flags.add_argument("table", metavar="TABLE", help="one of: " + ", ".join(CHOICES))
    flags.add_argument("--data", metavar="URI", help="data folder (default: the toy shop)")
    flags.add_argument("--seeds", default="3", help="a count, or a list such as 0,4 (default: 3)")
    flags.add_argument("--rows", metavar="A,B", help="only these rows of the table")
    flags.add_argument(
        "--search", type=int, metavar="N",
        help="give every trained row its best of N settings (learning rate and weight of hard "
        "negatives around the study's own), chosen with the first seed by HR@50 on validation",
    )  # fmt: skip
    flags.add_argument(
        "--concurrent", type=int, metavar="N",
        help="trials at a time (default: one per core, within the available memory)",
    )  # fmt: skip
    flags.add_argument(
        "--without-ray", action="store_true",
        help="run trials as children of this process, one at a time if there is a GPU",
    )  # fmt: skip
    flags.add_argument(
        "--set", action="append", default=[], metavar="PATH=VALUE", dest="assignments",
        help="set a field in every row, for example training.steps=500 (repeatable)",
    )  # fmt: skip
    flags.add_argument(
        "--results", default="docs/results", metavar="DIR",
        help="folder of the records (default: docs/results); the report is written there too",
    )  # fmt: skip
    flags.add_argument("--report-only", action="store_true", help="only write the report")
    flags.add_argument(
        "--max-minutes", type=float, metavar="M", help="stop after M minutes, also running trials"
    )
    cache_flag(flags)
    return flags.parse_args(argv)


if __name__ == "__main__":
    run(main)
