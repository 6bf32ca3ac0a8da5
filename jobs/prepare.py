"""Prepare events on Ray: write training sequences and evaluation examples.

python jobs/prepare.py --data DATA --set prepare.max_history=50

Up to a million events are also described, as `python jobs/describe.py DATA` does for any number.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from karma_ray.cli import load_config, parser, run
from karma_ray.cluster.sharding import prepare
from karma_ray.data.description import describe
from karma_ray.data.forgotten import read_user_ids
from karma_ray.report.data_page import data_screen, render_data_page

DESCRIBED_ROWS = 1_000_000
"""Events that this process describes within seconds. More would show: reading them again took a
seventh of what preparing takes in one process, and preparing may be divided between many."""


def main(argv: list[str] | None = None) -> None:
    """Prepare a data folder and print its counts."""
    flags = parser(__doc__ or "", config=True)
    flags.add_argument("--data", required=True, metavar="URI", help="folder with events/, items/")
    flags.add_argument("--out", metavar="URI", help="write here instead of into the data folder")
    flags.add_argument(
        "--since", metavar="DAY",
        help="in events/day=YYYY-MM-DD/, check the files of this day and later ones only",
    )  # fmt: skip
    flags.add_argument(
        "--forget-users", metavar="FILE",
        help="a text file of user ids, one a line, whose rows leave all prepared tables for good",
    )  # fmt: skip
    arguments = flags.parse_args(argv)
    config = load_config(arguments, "karma_text").prepare
    forget = read_user_ids(arguments.forget_users) if arguments.forget_users else []
    facts = prepare(arguments.data, config, arguments.out, arguments.since, forget)
    print(f"prepared {arguments.out or arguments.data}")
    for name, count in facts["counts"].items():
        print(f"  {name.replace('_', ' '):<28} {count:>12,}")
    print(f"  training ends before         {facts['valid_start']}")
    print(f"  test starts at               {facts['test_start']}")
    query, negative = facts["query_source"].upper(), facts["negative_source"].upper()
    print(f"  queries {query}, negatives {negative}")
    rejected = sum(facts["quarantined"].values())
    print(f"  quarantined rows             {rejected:>12,}")
    for reason, count in facts["quarantined"].items():
        print(f"    {reason:<40} {count:>8,}")
    _describe(arguments.data, arguments.out or arguments.data, facts)


def _describe(data: str, out: str, facts: dict[str, Any]) -> None:
    """Print what is in the data, and write the page, unless reading them again would take long."""
    if facts["counts"]["event_rows"] > DESCRIBED_ROWS:
        print(f"\nto see what is in them: python jobs/describe.py {shlex.quote(data)}")
        return
    numbers = describe(data, out)
    page = render_data_page(numbers, out)
    print(f"\n{data_screen(numbers)}\n\npage  {page}")


if __name__ == "__main__":
    run(main)
