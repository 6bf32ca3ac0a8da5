"""Measure the funnel of finished runs: recall, pre-ranking and ranking, as the paper does.

python jobs/funnel.py RUN --data DATA                                     one run beside none
python jobs/funnel.py RUN RUN2 RUN3 --data DATA --beside A1 A2 A3         and beside action-only

Several RUNs are the seeds of one recipe. Weights are chosen on validation and measured on test.
Ranking trains CTR models on exposures, which takes longest; --stages recall,prerank leaves it out.
A cluster of several machines trains them on its workers; all else is measured by this process.
Writes funnel.json, outcomes.parquet (sums per user), pictures and report.html. What is finished in
OUT is not measured again.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from karma_ray.cli import cache_flag, parser, run

NUM_CLICKS = 20_000


def main(argv: list[str] | None = None) -> None:
    flags = parser(__doc__)
    flags.add_argument("runs", metavar="RUN", nargs="+", help="run folders of jobs/train.py")
    flags.add_argument("--data", help="prepared data (default: the data the runs were trained on)")
    flags.add_argument(
        "--beside", metavar="RUN", nargs="+", default=[],
        help="runs without decodability (action-only) that they are compared with, by seed",
    )  # fmt: skip
    flags.add_argument("--out", help="folder of the report (default: RUN/funnel of the first RUN)")
    flags.add_argument(
        "--clicks", type=int, default=NUM_CLICKS, metavar="N",
        help=f"most clicks of each split, a seeded sample (default {NUM_CLICKS})",
    )  # fmt: skip
    flags.add_argument(
        "--stages", default="recall,prerank,ranking", metavar="A,B",
        help="stages to measure (default: recall,prerank,ranking)",
    )  # fmt: skip
    flags.add_argument(
        "--set", action="append", default=[], metavar="PATH=VALUE", dest="assignments",
        help="a field of the CTR models' configuration, for example ranking.epochs=2 (repeatable)",
    )  # fmt: skip
    cache_flag(flags)
    arguments = flags.parse_args(argv)
    from karma_ray.cluster.executor import on_other_machines
    from karma_ray.funnel.measure import measure_funnel
    from karma_ray.report.funnel_page import screen

    funnel, page = measure_funnel(
        arguments.runs, arguments.data, beside=arguments.beside, out=arguments.out,
        num_clicks=arguments.clicks, stages=arguments.stages.split(","), cache=arguments.cache,
        ctr=arguments.assignments, executor=on_other_machines(),
    )  # fmt: skip
    print(f"{screen(funnel)}\n\nreport  {page}")


if __name__ == "__main__":
    run(main)
