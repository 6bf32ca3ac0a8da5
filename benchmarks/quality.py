"""The metrics of every recipe over seeds: mean and spread.

    python benchmarks/quality.py --recipes query_filter,action_only,karma_text --seeds 0,1,2
    python benchmarks/quality.py --data DATA --set training.steps=2000
    python benchmarks/quality.py --summary

Runs are made and kept as by `jobs/ablate.py`, which compares the rows of the paper's tables: a run
found in `docs/results` with the same configuration is not repeated. Prints a table and one JSON
line per recipe; the last line is a flat object `<data>/<recipe>/<metric>`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from karma_ray import cli, recipes
from karma_ray.artifacts import value_hash
from karma_ray.cluster.study import run_study
from karma_ray.errors import KarmaRayError
from karma_ray.runs.sources import toy_shop
from karma_ray.studies.plan import HERE, Data, parsed_seeds, planned
from karma_ray.studies.records import Record, Spread, learnt_from, read_records, spread
from karma_ray.studies.rows import Row

CACHE = str(ROOT / "runs" / "cache")

DEFAULT_RECIPES = (*recipes.FLOORS, "action_only", "karma_text")
TABLE = ("HR@10", "HR@50", "HR@200", "gAUC", "JS@50_excl_gt", "cold/HR@10", "in_query/HR@10")
HEADLINE = ("HR@10", "HR@50", "HR@200", "gAUC", "in_query/HR@10")
QUICK = (
    "pretrain.steps=40", "warmup.steps=40", "training.steps=40", "evaluation.max_examples=400",
    *HERE,
)  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Run what is missing, then print all results of the data."""
    flags = cli.parser(__doc__ or "")
    flags.add_argument("--data", metavar="URI", help="data folder (default: the toy shop)")
    flags.add_argument(
        "--recipes", help="comma-separated (default: floors, action_only, karma_text)"
    )
    flags.add_argument("--seeds", default="3", help="a count, or a list such as 0,4 (default: 3)")
    flags.add_argument(
        "--set", action="append", default=[], metavar="PATH=VALUE", dest="assignments"
    )
    flags.add_argument("--quick", action="store_true", help="floors and toy, one seed, few steps")
    flags.add_argument("--summary", action="store_true", help="run nothing, print what is there")
    flags.add_argument("--results", metavar="DIR", help="default: docs/results, with --quick runs/")
    arguments = flags.parse_args(argv)
    quick = bool(arguments.quick)
    results = Path(arguments.results or ROOT / ("runs/quality-quick" if quick else "docs/results"))
    name, failed = None, {}
    if not arguments.summary or arguments.data:
        data = Data.open(arguments.data or toy_shop(CACHE))
        name = data.name
        if not arguments.summary:
            failed = _run(arguments, data, results)
    summarise([record for record in read_records(results) if name in (None, record["data"])])
    if failed:
        raise KarmaRayError("; ".join(f"{name}: {reason}" for name, reason in failed.items()))


def _run(arguments: Any, data: Data, results: Path) -> dict[str, str]:
    """What is missing; returns what failed."""
    quick = bool(arguments.quick)
    default = (*recipes.FLOORS, "toy") if quick else DEFAULT_RECIPES
    chosen = arguments.recipes.split(",") if arguments.recipes else default
    trials = planned(
        [Row(name, name) for name in chosen], [0] if quick else parsed_seeds(arguments.seeds),
        data, arguments.assignments, study=QUICK if quick else None,
    )  # fmt: skip
    return run_study(trials, data, results, runs=str(ROOT / "runs" / "study"), cache=CACHE).failed


def groups(records: Sequence[Record]) -> dict[tuple[str, str], list[Record]]:
    """(data, row) -> its seeds; `row[field=value]` where settings of a row differ."""
    variants: dict[tuple[str, str], dict[str, list[Record]]] = {}
    for record in records:
        of_row = variants.setdefault((record["data"], record.get("row", record["recipe"])), {})
        of_row.setdefault(value_hash(settings_of(record)), []).append(record)
    result: dict[tuple[str, str], list[Record]] = {}
    for (data, row), found in variants.items():
        settings = [settings_of(members[0]) for members in found.values()]
        names = dict.fromkeys(name for setting in settings for name in setting)
        names = [name for name in names if len({str(s.get(name)) for s in settings}) > 1]
        for setting, members in zip(settings, found.values(), strict=True):
            told = ",".join(f"{name.rsplit('.', 1)[-1]}={setting.get(name)}" for name in names)
            result[data, f"{row}[{told}]" if told else row] = members
    return result


def settings_of(record: Record) -> Record:
    """What tells one run of a row from another but for the seed: dotted path -> value."""
    return {**learnt_from(record["config"]), "data_hash": record.get("data_hash")}


def summarise(records: Sequence[Record]) -> None:
    """Print the table, a JSON line per row and the flat headline."""
    found = sorted(groups(records).items())
    table = {key: spread(members) for key, members in found}
    print(f"{'data':<18}{'recipe':<56}" + "".join(f"{name:>16}" for name in TABLE))
    for (data, row), values in table.items():
        cells = "".join(f"{cell(values.get(name)):>16}" for name in TABLE)
        print(f"{data:<18}{row:<56}{cells}")
    headline: dict[str, float | None] = {}
    for (data, row), members in found:
        values = table[data, row]
        seeds = sorted(record["seed"] for record in members)
        print(json.dumps({"data": data, "recipe": row, "seeds": seeds, "metrics": values}))
        for name in HEADLINE:
            if name in values:
                headline[f"{data}/{row}/{name}"] = values[name]["mean"]
                headline[f"{data}/{row}/{name}_std"] = values[name]["std"]
    print(json.dumps(headline))


def cell(value: Spread | None) -> str:
    """`12.3 ± 0.4`, without the spread for one seed, `-` where the metric is absent."""
    if value is None:
        return "-"
    deviation = value["std"]
    return f"{value['mean']:.1f}" + ("" if deviation is None else f" ± {deviation:.1f}")


if __name__ == "__main__":
    cli.run(main)
