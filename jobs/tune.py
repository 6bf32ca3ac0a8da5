"""Search configuration fields with Ray Tune, with early stopping by a validation metric.

A space file names dotted paths with Ray Tune domains, the metric and the recipe; see
tune_spaces/lambdas.py. Without --data the built-in toy shop is used. At the end the best trial is
measured on test beside the default. The job prints both and a table of trials; OUT/report.html
shows them, also while the search runs, and OUT/best.json is the best trial for jobs/train.py
--config. The same command with the same --out goes on with an interrupted search, or adds trials
to a finished one.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from karma_ray.artifacts import join
from karma_ray.cli import cache_flag, default_out, parser, run


def main(argv: list[str] | None = None) -> None:
    flags = parser(__doc__)
    flags.add_argument("space", metavar="SPACE", help="for example tune_spaces/lambdas.py")
    flags.add_argument("--trials", type=int, default=8, help="settings to try (default 8)")
    flags.add_argument("--concurrent", type=int, default=2, help="trials at a time (default 2)")
    flags.add_argument(
        "--gpus-per-trial", type=float, metavar="SHARE",
        help="share of a GPU for each trial, up to 1 (default: trials share the GPUs there are)",
    )  # fmt: skip
    flags.add_argument("--data", help="data folder or URI (default: the toy shop)")
    flags.add_argument("--out", help="folder or URI of the search (default: runs/tune-<time>)")
    flags.add_argument("--seed", type=int, default=0, help="seed of the draws and of every trial")
    flags.add_argument(
        "--measure-seeds", type=int, default=3, metavar="N",
        help="seeds with which the best trial and the default are trained anew and measured on "
        "test at the end (default 3; 0: they are not)",
    )  # fmt: skip
    flags.add_argument(
        "--set", action="append", default=[], metavar="PATH=VALUE", dest="assignments",
        help="fix another field, for example training.steps=500 (repeatable)",
    )  # fmt: skip
    cache_flag(flags)
    arguments = flags.parse_args(argv)
    from karma_ray.cluster.occupancy import kinds_up
    from karma_ray.cluster.search_space import load_space
    from karma_ray.cluster.tuning import search
    from karma_ray.runs.node_hours import NodeHours
    from karma_ray.studies.ledger import describe

    space = load_space(arguments.space)
    out = arguments.out or default_out("tune")
    if arguments.data:  # the toy shop has visual features
        space = space.suited(arguments.data)
    base = space.base([f"seed={arguments.seed}", *arguments.assignments])
    with NodeHours(out, kinds_up):
        result = search(
            space, base, data=arguments.data, trials=arguments.trials, out=out,
            max_concurrent=arguments.concurrent, gpus_per_trial=arguments.gpus_per_trial,
            measure_seeds=arguments.measure_seeds, cache=arguments.cache,
        )  # fmt: skip
    print(describe(result))
    print(f"folder  {out}")
    print(f"report  {join(out, 'report.html')}")
    data = f" --data {shlex.quote(arguments.data)}" if arguments.data else ""
    print(f"next  python jobs/train.py --config {shlex.quote(join(out, 'best.json'))}{data}")


if __name__ == "__main__":
    run(main)
