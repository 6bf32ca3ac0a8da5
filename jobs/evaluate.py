"""Measure a finished run again: metrics between floors, checks that it uses what it should.

Every metric, the floors, the ceilings where the truth is known, strangers' histories beside the
true ones, and the effect of items that h must not see. On the data that the run was trained on,
its metrics.json and report are replaced; what is measured on other data stands beside them.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from karma_ray.cli import parser, run
from karma_ray.report.terminal import summary
from karma_ray.runs.pipeline import evaluate_run


def main(argv: list[str] | None = None) -> None:
    flags = parser(__doc__)
    flags.add_argument("run", metavar="RUN", help="run folder of jobs/train.py")
    flags.add_argument("--data", help="prepared data (default: what the run was trained on)")
    flags.add_argument(
        "--out", help="folder of a measurement on other data (default: RUN/evaluations/NAME)"
    )
    arguments = flags.parse_args(argv)
    folder, _ = evaluate_run(arguments.run, arguments.data, out=arguments.out)
    print(summary(folder))


if __name__ == "__main__":
    run(main)
