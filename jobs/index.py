"""Build the index of a run's newest embeddings; both then serve together.

Recall against exact search is measured on validation requests of the run's data. An index below
--min-recall is not written, and the earlier one goes on serving.
"""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from karma_ray.cli import parser, run
from karma_ray.retrieval.index_build import MIN_RECALL, index_run
from karma_ray.retrieval.index_recall import RECALL_AT
from karma_ray.retrieval.kinds import AUTO, KINDS, describe_kinds, index_kind
from karma_ray.retrieval.parts import served


def main(argv: list[str] | None = None) -> None:
    flags = parser(__doc__)
    flags.epilog = f"kinds, with their knobs:\n{describe_kinds()}"
    flags.add_argument("run", metavar="RUN", help="run folder with finished item_embeddings/")
    flags.add_argument(
        "--kind", default=AUTO,
        help=f"one of: {', '.join(KINDS)} (default {AUTO}: exact while a search costs less than "
        "the model, else ivf)",
    )  # fmt: skip
    flags.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", dest="assignments",
        help="a knob of the kind, for example num_probes=32 (repeatable)",
    )  # fmt: skip
    flags.add_argument(
        "--min-recall", type=float, default=MIN_RECALL,
        help=f"recall@{RECALL_AT} below which the build fails ({MIN_RECALL})",
    )  # fmt: skip
    flags.add_argument("--shards", type=int, default=1, help="parts of the index (1)")
    flags.add_argument(
        "--data", help="prepared data with validation requests (default: the run's data)"
    )
    arguments = flags.parse_args(argv)
    kind = index_kind(arguments.kind, arguments.assignments)
    started = time.monotonic()
    index = index_run(
        arguments.run, kind, data=arguments.data, min_recall=arguments.min_recall,
        num_shards=arguments.shards,
    )  # fmt: skip
    print(
        f"{index.kind} index of {index.num_items} items, recall@{RECALL_AT} {index.recall:.3f} "
        f"({index.recall_measured_on}), in {time.monotonic() - started:.1f} s -> "
        f"{served(arguments.run).index}\n"
        f"next: python jobs/serve.py {shlex.quote(arguments.run)}"
    )


if __name__ == "__main__":
    run(main)
