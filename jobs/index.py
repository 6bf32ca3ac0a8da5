"""Build the index of a run's newest embeddings; both then serve together."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from karma_ray.cli import parser, run
from karma_ray.retrieval.index import KINDS, RECALL_AT, index_kind
from karma_ray.retrieval.parts import served
from karma_ray.retrieval.retriever import index_run


def main(argv: list[str] | None = None) -> None:
    flags = parser(__doc__)
    flags.add_argument("run", metavar="RUN", help="run folder with finished item_embeddings/")
    flags.add_argument(
        "--kind", default="flat",
        help=f"one of: {', '.join(KINDS)} (default flat, which is exact)",
    )  # fmt: skip
    arguments = flags.parse_args(argv)
    kind = index_kind(arguments.kind)
    started = time.monotonic()
    index = index_run(arguments.run, kind)
    print(
        f"{index.kind} index of {index.num_items} items, recall@{RECALL_AT} {index.recall:.3f}, "
        f"in {time.monotonic() - started:.1f} s -> {served(arguments.run).index}\n"
        f"next: python jobs/serve.py {shlex.quote(arguments.run)}"
    )


if __name__ == "__main__":
    run(main)
