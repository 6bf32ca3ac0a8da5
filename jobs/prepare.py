"""Prepare events on Ray: write training sequences and evaluation examples.

python jobs/prepare.py --data DATA --set prepare.max_history=50
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from karma_ray.cli import load_config, parser, run
from karma_ray.cluster.sharding import prepare
from karma_ray.data.forgotten import read_user_ids


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


if __name__ == "__main__":
    run(main)
