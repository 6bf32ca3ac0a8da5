"""Evaluate a finished run again: its metrics, floors and ceilings, and checks of the model.

The checks compare true histories with those of other users, and measure the effect of items that
the attention mask hides from h. On the data that the run was trained on, its metrics.json and
report are replaced; an evaluation on other data is written beside them. On a cluster it takes a
GPU if there is one, and if it takes minutes it is divided between GPUs or CPUs that are up; if it
takes twenty, it waits up to five for as many as the run was trained on.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from karma_ray.cli import cache_flag, parser, run


def main(argv: list[str] | None = None) -> None:
    flags = parser(__doc__)
    flags.add_argument("run", metavar="RUN", help="run folder of jobs/train.py")
    flags.add_argument("--data", help="prepared data (default: the data the run was trained on)")
    flags.add_argument(
        "--out", help="folder of an evaluation on other data (default: RUN/evaluations/NAME)"
    )
    cache_flag(flags)
    arguments = flags.parse_args(argv)
    from karma_ray.cluster.executor import ON_RAY
    from karma_ray.report.terminal import summary
    from karma_ray.runs.pipeline import evaluate_run

    folder, _ = evaluate_run(
        arguments.run, arguments.data, arguments.cache, arguments.out, executor=ON_RAY
    )
    print(summary(folder))


if __name__ == "__main__":
    run(main)
