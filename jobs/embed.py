"""Embed the catalogue with the model in RUN/bundle, for the next index of the run.

Earlier embeddings and their index go on serving until jobs/index.py has made an index of the new
ones. Only items whose text changed since the newest embeddings are encoded, and a job that was
killed goes on where it was. With --new only items that the index lacks are encoded; they can be
found at once, and items that left the catalogue cannot be found any more.
"""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from karma_ray.artifacts import RunFolder, exists, read_manifest
from karma_ray.cli import parser, run
from karma_ray.cluster.embedding import embed_items
from karma_ray.cluster.occupancy import kinds_up
from karma_ray.errors import InputError
from karma_ray.retrieval.delta import update_run
from karma_ray.retrieval.parts import embedded, offer, to_embed
from karma_ray.retrieval.retriever import check_run, require_part
from karma_ray.runs.node_hours import NodeHours


def data_of(run_uri: str) -> str:
    """Return the data folder that the run's manifest names."""
    manifest = RunFolder(run_uri).path("manifest.json")
    facts = read_manifest(run_uri) if exists(manifest) else {}
    data = facts.get("items") or facts.get("data")
    if not data:
        raise InputError("--data", data, f"is needed: {run_uri} does not name its data")
    return str(data)


def main(argv: list[str] | None = None) -> None:
    flags = parser(__doc__)
    flags.add_argument("run", metavar="RUN", help="run folder with a finished bundle/")
    flags.add_argument("--data", help="data folder (default: the one the run was trained on)")
    flags.add_argument(
        "--actors", type=int,
        help="encoders in parallel (default: one for each GPU that is up or may be added, or else "
        "each core, if the catalogue is large enough)",
    )  # fmt: skip
    flags.add_argument(
        "--items", metavar="URI",
        help="embed the items of this folder, local or s3://, instead of those of the data",
    )  # fmt: skip
    flags.add_argument(
        "--precision", choices=["auto", "float32", "bfloat16"], default="auto",
        help="compute type (default auto: that of the newest embeddings of this bundle, or else "
        "bfloat16 on GPUs and on CPUs with instructions for it, and float32 on others)",
    )  # fmt: skip
    flags.add_argument(
        "--new", action="store_true",
        help="encode new items only, in this process, and hide items that left the catalogue",
    )  # fmt: skip
    arguments = flags.parse_args(argv)
    if arguments.items and arguments.data:
        raise InputError("--items", arguments.items, "cannot be combined with --data")
    require_part(arguments.run, RunFolder(arguments.run).bundle, "jobs/train.py --out RUN")
    data = arguments.items or arguments.data or data_of(arguments.run)
    started = time.monotonic()
    if arguments.new:
        check_run(arguments.run)
        precision = None if arguments.precision == "auto" else arguments.precision
        changes = update_run(arguments.run, data, precision)
        following = f"next: python jobs/publish.py {shlex.quote(arguments.run)}"
        print(
            f"{changes.added} items beside the index ({changes.encoded} encoded now), "
            f"{changes.hidden} hidden, in {time.monotonic() - started:.0f} s\n"
            f"{following if changes.is_new else 'nothing changed since the last time'}"
        )
        return
    folder = to_embed(arguments.run)
    with NodeHours(arguments.run, kinds_up):
        manifest = embed_items(
            folder.bundle, data, folder.item_embeddings, arguments.actors, arguments.precision,
            reuse=embedded(arguments.run),
        )  # fmt: skip
    offer(folder)
    print(
        f"{manifest['num_items']} items x {manifest['width']} ({manifest['encoded']} encoded, "
        f"{manifest['reused']} reused, {manifest['dropped']} dropped) in "
        f"{time.monotonic() - started:.0f} s -> {folder.item_embeddings}\n"
        f"next: python jobs/index.py {shlex.quote(arguments.run)}"
    )


if __name__ == "__main__":
    run(main)
