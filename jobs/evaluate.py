"""Measure a finished run again: metrics between floors, checks that it uses what it should.

Every metric, the floors, the ceilings where the truth is known, strangers' histories beside the
true ones, and the effect of items that h must not see. Replaces metrics.json and the report.
"""

from __future__ import annotations

from karma_ray.cli import parser, run
from karma_ray.report.terminal import summary
from karma_ray.runs.pipeline import evaluate_run


def main(argv: list[str] | None = None) -> None:
    flags = parser(__doc__)
    flags.add_argument("run", metavar="RUN", help="run folder of jobs/train.py")
    flags.add_argument("--data", help="prepared data (default: what the run was trained on)")
    arguments = flags.parse_args(argv)
    evaluate_run(arguments.run, arguments.data)
    print(summary(arguments.run))


if __name__ == "__main__":
    run(main)
