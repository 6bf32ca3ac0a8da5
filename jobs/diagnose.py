"""Diagnose collapse: attention sinks, rank and decodable text, beside the starting weights.

python jobs/diagnose.py runs/latest                          one run and what it started from
python jobs/diagnose.py ACTION KARMA --out OUT               the paper's Figure 2
python jobs/diagnose.py RUN --layers 9:1,11:1,3              heads to show: LAYER:HEAD or LAYER

Writes diagnosis.html, diagnosis.json and the pictures. Layers and heads are counted from 0.
Default heads: the paper's (9:1 and 11:1) where they exist, else head 1 of two layers.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from karma_ray.cli import parser, run


def main(argv: list[str] | None = None) -> None:
    flags = parser(__doc__)
    flags.add_argument("runs", metavar="RUN", nargs="+", help="run folders of jobs/train.py")
    flags.add_argument("--data", help="prepared data (default: the data the runs were trained on)")
    flags.add_argument("--out", help="folder of the report (default: that of the last run)")
    flags.add_argument("--layers", help="heads to show, for example 9:1,11:1")
    flags.add_argument(
        "--items", type=int, default=512, metavar="N", help="items and requests (default 512)"
    )
    arguments = flags.parse_args(argv)
    from karma_ray.report.diagnosis_page import screen
    from karma_ray.runs.model_comparison import diagnose_runs, parse_heads

    comparison, page = diagnose_runs(
        arguments.runs,
        data=arguments.data,
        out=arguments.out,
        wanted=parse_heads(arguments.layers) if arguments.layers else None,
        num_items=arguments.items,
    )
    print(f"{screen(comparison)}\n\nreport  {page}")


if __name__ == "__main__":
    run(main)
