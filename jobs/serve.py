"""Serve a finished run over HTTP until Ctrl-C.

A live folder, which jobs/publish.py makes, is followed: what is published there answers within
seconds, and no request fails meanwhile.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from karma_ray.artifacts import absolute, join, read_table
from karma_ray.cli import parser, run
from karma_ray.errors import InputError
from karma_ray.retrieval.blended import MODES
from karma_ray.serving.host import Options, curl_example, serve_here
from karma_ray.serving.live import check_source
from karma_ray.serving.precision import PRECISIONS
from karma_ray.serving.request_log import LogSettings


def main(argv: list[str] | None = None) -> None:
    flags = parser(__doc__)
    _add_flags(flags)
    arguments = flags.parse_args(argv)
    if arguments.log_raw and not arguments.log_requests:
        raise InputError("--log-raw", True, "needs --log-requests")
    log = None
    if path := arguments.log_requests:
        log = LogSettings(path if path == "-" else absolute(path), arguments.log_raw)

    def announce(url: str) -> None:
        source = join(check_source(arguments.run).index, "item_ids.parquet")
        ids = read_table(source, columns=["item_id"]).column("item_id")[:2].to_pylist()
        print(
            f"ready: {url}/docs; stop with Ctrl-C. Search page: {url}/\n"
            f"Try:\n{curl_example(url, ids)}", flush=True,
        )  # fmt: skip

    options = Options(
        arguments.compare, arguments.precision, log, arguments.ranker, arguments.channels
    )
    if arguments.without_ray:
        serve_here(arguments.run, arguments.host, arguments.port, announce, options)
        return
    from karma_ray.cluster.serving import Replicas, serve_run  # not needed without Ray

    serve_run(
        arguments.run, arguments.host, arguments.port, Replicas.parse(arguments.replicas),
        blocking=True, on_ready=announce, options=options,
    )  # fmt: skip


def _add_flags(flags: ArgumentParser) -> None:
    flags.add_argument(
        "run", metavar="RUN|LIVE",
        help="run folder with bundle/, embeddings and index/, or a live folder",
    )  # fmt: skip
    flags.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    flags.add_argument("--port", type=int, default=8000, help="port to listen on (8000)")
    flags.add_argument(
        "--replicas", default="1", metavar="N[-M]",
        help="copies of decoder and index, one core each; N-M: by load between N and M (1)",
    )  # fmt: skip
    flags.add_argument(
        "--without-ray", action="store_true",
        help="answer from this process, behind uvicorn: one machine, no cluster",
    )  # fmt: skip
    flags.add_argument(
        "--precision", choices=PRECISIONS, default="auto",
        help="compute type of the decoder (auto: bfloat16 on a GPU, float32 on a CPU)",
    )  # fmt: skip
    flags.add_argument(
        "--channels", choices=MODES, default="auto",
        help="lists that recall answers with: dense (the model alone), blend (words, tastes and "
        "popularity too), or auto, whichever validation prefers (auto)",
    )  # fmt: skip
    flags.add_argument(
        "--compare", metavar="RUN",
        help="a second run that the search page shows beside it",
    )  # fmt: skip
    flags.add_argument(
        "--ranker", metavar="RUN",
        help="a finished run of a ctr_ recipe, which orders candidates at /v1/rank",
    )  # fmt: skip
    flags.add_argument(
        "--log-requests", metavar="PATH|-", help="append a JSON line per request (- is the screen)"
    )
    flags.add_argument(
        "--log-raw", action="store_true", help="log user ids and queries as they are, not hashed"
    )


if __name__ == "__main__":
    run(main)
