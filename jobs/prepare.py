"""Prepare events on Ray Data: write training sequences and evaluation examples.

python jobs/prepare.py --data DATA --set prepare.max_history=50
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from karma_ray.cli import load_config, parser, run
from karma_ray.cluster.sharding import prepare


def main(argv: list[str] | None = None) -> None:
    """Prepare a data folder and print its counts."""
    flags = parser(__doc__ or "", config=True)
    flags.add_argument("--data", required=True, metavar="URI", help="folder with events/, items/")
    flags.add_argument("--out", metavar="URI", help="write here instead of into the data folder")
    arguments = flags.parse_args(argv)
    config = load_config(arguments, "karma_text").prepare
    facts = prepare(arguments.data, config, arguments.out)
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
