"""Give the items of RUN semantic ids: a few small numbers per item, in the table RUN/item_codes.

Codebooks are fitted on the embeddings that serve: residual k-means, and on the last level FSQ
(`res_kmeans_fsq`) or k-means (`rq_kmeans`). With --codebooks items are given codes of earlier
codebooks, so that the codes of an item whose vector is the same stay. A job that was killed goes on
where it was.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from karma_ray.artifacts import RunFolder
from karma_ray.cli import parser, run
from karma_ray.cluster.codes import code_items
from karma_ray.codes.alignment import DEPTH
from karma_ray.codes.comparison import compare, floor_of, table_of
from karma_ray.codes.config import KINDS, CodesConfig, config_of, with_assignments
from karma_ray.config import describe_fields
from karma_ray.data.vectors import mapped_vectors
from karma_ray.errors import InputError
from karma_ray.retrieval.aligned import FOLDER, METHODS, align_run
from karma_ray.retrieval.parts import served
from karma_ray.retrieval.retriever import require_part


def main(argv: list[str] | None = None) -> None:
    """Write the table, or compare both kinds, and print the numbers."""
    flags = parser(__doc__ or "")
    flags.epilog = fields_text()
    flags.add_argument("run", metavar="RUN", help="run folder with finished item_embeddings/")
    flags.add_argument("--out", metavar="URI", help="write here instead of RUN/item_codes")
    flags.add_argument("--kind", choices=KINDS, help=f"kind of the last level ({KINDS[0]})")
    flags.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", dest="assignments",
        help="override one field of the codes or of the alignment, for example "
        "codes.fsq_levels=[8,8,4] or align.steps=1000 (repeatable)",
    )  # fmt: skip
    flags.add_argument(
        "--codebooks", metavar="FOLDER",
        help="use the codebooks of these codes, of an earlier day, instead of fitting any",
    )  # fmt: skip
    flags.add_argument(
        "--actors", type=int,
        help="workers on Ray (default: this process, and one for each core for a large catalogue)",
    )  # fmt: skip
    flags.add_argument(
        "--compare", action="store_true",
        help="print the numbers of both kinds side by side, and write nothing",
    )  # fmt: skip
    flags.add_argument(
        "--seeds", type=int, help="seeds of each kind under --compare, from codes.seed on (1)"
    )
    flags.add_argument(
        "--aligned", nargs="?", const="projection", metavar="projection|llm",
        help="align the embeddings with co-clicks of the training data first, in "
        "RUN/aligned_embeddings, and make RUN/item_codes-aligned of them: by a projection over "
        "them (default), or by fine-tuning the LLM of the item encoder",
    )  # fmt: skip
    flags.add_argument("--data", help="prepared data for --aligned (default: the run's data)")
    arguments = flags.parse_args(argv)
    check_flags(arguments)
    kind = {"kind": arguments.kind} if arguments.kind else {}
    of_codes, of_alignment = divided(arguments.assignments)
    config = config_of(of_codes, **kind)
    folder = served(arguments.run)
    require_part(arguments.run, folder.item_embeddings, "jobs/embed.py RUN")
    embeddings, name = folder.item_embeddings, "item_codes"
    if arguments.aligned:
        how = with_assignments(METHODS[arguments.aligned], "align", of_alignment)
        print(said_of(align_run(arguments.run, arguments.data, how)))
        embeddings, name = RunFolder(arguments.run).path(FOLDER), "item_codes-aligned"
    if arguments.compare:
        print(comparison(embeddings, config, arguments.seeds or 1))
        return
    out = arguments.out or RunFolder(arguments.run).path(name)
    started = time.monotonic()
    facts = code_items(embeddings, out, config, arguments.codebooks, arguments.actors)
    seconds = time.monotonic() - started
    print(summary(facts, out, seconds))


def summary(facts: dict[str, Any], out: str, seconds: float) -> str:
    """Return the closing screen."""
    shown = facts["config"]
    return (
        f"{facts['num_items']} items with codes {sizes_of(facts['sizes'])} of kind "
        f"{shown['kind']}, fitted on {facts['fitted_on']} items, in {seconds:.0f} s\n"
        f"  collision rate    {facts['collision_rate']:>10.4f}   share of items whose code another "
        f"has too ({facts['items_per_code']:.3f} items per code)\n"
        f"  error             {facts['errors'][-1]:>10.4f}   of the embeddings' variance; after "
        f"each level {listed(facts['errors'])}\n"
        f"  mean cosine       {facts['mean_cosine']:>10.4f}\n"
        f"  used codes        {listed(facts['used'])}   perplexity {listed(facts['perplexity'], 1)}"
        f"\n-> {out}"
    )


def check_flags(arguments) -> None:  # type: ignore[no-untyped-def]
    """Raise InputError on flags that do not go together."""
    if arguments.codebooks and (arguments.assignments or arguments.kind or arguments.compare):
        problem = "says all about the codes; it goes with no --kind, --set and --compare"
        raise InputError("--codebooks", arguments.codebooks, problem)
    if arguments.compare and arguments.out:
        raise InputError("--out", arguments.out, "is not written by --compare")
    if arguments.aligned and arguments.aligned not in METHODS:
        raise InputError("--aligned", arguments.aligned, choices=METHODS)
    if divided(arguments.assignments)[1] and not arguments.aligned:
        raise InputError("--set", arguments.assignments, "has fields of --aligned, which is absent")
    if arguments.data and not arguments.aligned:
        raise InputError("--data", arguments.data, "is read by --aligned alone")
    if arguments.aligned and arguments.codebooks:
        problem = "are of embeddings that are not aligned anew; it goes with no --aligned"
        raise InputError("--codebooks", arguments.codebooks, problem)
    if arguments.seeds is not None and (arguments.seeds < 1 or not arguments.compare):
        raise InputError("--seeds", arguments.seeds, "is a number from 1 on, for --compare")


def comparison(embeddings: str, config: CodesConfig, num_seeds: int) -> str:
    """Return the numbers of both kinds."""
    vectors = mapped_vectors(embeddings)
    found = compare(vectors, config, num_seeds)
    seeds = "1 seed" if num_seeds == 1 else f"{num_seeds} seeds: mean ± standard deviation"
    head = f"{len(vectors)} items x {vectors.shape[1]}, codes {sizes_of(config.sizes)}, {seeds}"
    return f"{head}\n{table_of(found, config.sizes)}\n{floor_of(vectors)}"


def divided(assignments: list[str]) -> tuple[list[str], list[str]]:
    """Return the fields of the codes and those of the alignment."""
    of_alignment = [one for one in assignments if one.strip().startswith("align.")]
    return [one for one in assignments if one not in of_alignment], of_alignment


def fields_text() -> str:
    """Return the fields for --set, as text."""
    parts = [
        ("", CodesConfig, "codes."),
        *((f" of --aligned {n}", c, "align.") for n, c in METHODS.items()),
    ]
    return "\n\n".join(
        f"fields for --set{of}, with defaults:\n{describe_fields(kind, prefix)}"
        for of, kind, prefix in parts
    )


def said_of(aligned: dict[str, Any]) -> str:
    """Return what alignment found, as text."""
    told = [
        f"aligned by {aligned['method']} on {aligned['trained_on']} pairs "
        f"({aligned['related_pairs']} of {aligned['asked_pairs']} co-clicks are "
        f"{related_by(aligned['relevance'])}); of {aligned['held_out']} others "
        f"{aligned['pair_recall_after']:.4f} have the other item among {DEPTH} neighbours, "
        f"before {aligned['pair_recall_before']:.4f}"
    ]
    if aligned["method"] == "llm":
        told.append(
            f"one item's text from the other's summary: {aligned['generation_after']:.4f} nats per "
            f"token, before {aligned['generation_before']:.4f}; the mean cosine of the vectors "
            f"before tuning with the run's own is {aligned['start_cosine']:.4f}"
        )
    return "\n".join(told)


def related_by(relevance: dict[str, Any]) -> str:
    """Return who filtered the pairs, as text."""
    if relevance["by"] == "texts":
        return f"related by their texts: TF-IDF cosine {relevance['least']} or more"
    return (
        f"related by the LLM {relevance['llm']} as it was: {relevance['least']:.4f} nats per token "
        f"or more, which {relevance['chance']:.0%} of random pairs reach"
    )


def sizes_of(sizes: list[int]) -> str:
    """Return the number of codes of each level, as text."""
    return " x ".join(map(str, sizes))


def listed(values: list[float], digits: int = 4) -> str:
    """Return numbers as text."""
    return " ".join(f"{value:.{digits}f}" for value in values)


if __name__ == "__main__":
    run(main)
