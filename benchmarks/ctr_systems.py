"""The ranking systems side by side: CTR models on the same pages, over seeds, in one table.

python benchmarks/ctr_systems.py --vectors RUN                            the toy shop, every arm
python benchmarks/ctr_systems.py DATA --vectors RUN --arms din,qarm_rq,qarm_fsq --seeds 3
python benchmarks/ctr_systems.py DATA --vectors RUN --arms din,wide=ctr_din:ranking.width=32

An arm is a name of ARMS, or NAME=RECIPE[:FIELD=VALUE...]. Every arm is trained once for each seed
in OUT/ARM-SEED; runs that are finished are read, and interrupted ones go on. Floors and ceilings
are not measured: `python jobs/evaluate.py OUT/ARM-SEED` does. With several --vectors
the seeds take turns, so that the table is over seeds of the vectors as well. A difference to the
first arm is a mean over seeds; its interval draws users, with all their seeds, and is over the
same shown items. Cold items are those that no training page showed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from karma_ray import recipes
from karma_ray.artifacts import absolute, exists, join, read_json
from karma_ray.cli import cache_flag, run
from karma_ray.cluster.codes import code_items
from karma_ray.codes.config import Kind, config_of
from karma_ray.config import Config, override, to_dict
from karma_ray.errors import InputError
from karma_ray.metrics.clicks import mean_auc_difference
from karma_ray.ranking.families import family_of
from karma_ray.ranking.floors import ItemRates
from karma_ray.ranking.judged import Judged
from karma_ray.ranking.load import load_ranker
from karma_ray.retrieval.aligned import FOLDER as ALIGNED
from karma_ray.retrieval.aligned import METHODS, Method, align_run
from karma_ray.retrieval.parts import served
from karma_ray.runs.ctr import exposures_of, predictor
from karma_ray.runs.pipeline import train_run
from karma_ray.runs.preparation import ensure_prepared
from karma_ray.runs.sources import toy_shop

WITHOUT = ("ranking.gsu_items=0",)


@dataclass(frozen=True)
class Arm:
    """A row of the table."""

    recipe: str
    changes: tuple[str, ...] = ()
    kind: Kind | None = None
    """Kind of the semantic ids that it reads, if it does."""
    aligned: Method | None = None
    """How the embeddings that these are of were aligned, if they were."""


ARMS: Mapping[str, Arm] = {
    "din": Arm("ctr_din"),
    "simtier": Arm("ctr_simtier"),
    "vectors": Arm("ctr_din", ("ranking.family=vectors",)),
    "sarm": Arm("ctr_sarm"),
    "sarm_words": Arm("ctr_sarm", ("ranking.anchors=words",)),
    "untaught": Arm("ctr_ocarm", ("ranking.distillation=0",)),
    "ocarm": Arm("ctr_ocarm"),
    "gsu": Arm("ctr_qarm", ("ranking.codes=none",)),
    "rq": Arm("ctr_qarm", WITHOUT, "rq_kmeans"),
    "fsq": Arm("ctr_qarm", WITHOUT, "res_kmeans_fsq"),
    "fsq_aligned": Arm("ctr_qarm", WITHOUT, "res_kmeans_fsq", "projection"),
    "fsq_llm": Arm("ctr_qarm", WITHOUT, "res_kmeans_fsq", "llm"),
    "qarm_rq": Arm("ctr_qarm", (), "rq_kmeans"),
    "qarm_fsq": Arm("ctr_qarm", (), "res_kmeans_fsq"),
    "qarm_fsq_aligned": Arm("ctr_qarm", (), "res_kmeans_fsq", "projection"),
}
"""`vectors` adds a projection of the item's frozen vector, `untaught` is `ocarm` without a teacher;
`rq` and `fsq` read semantic ids alone, `gsu` the search alone, `qarm_` both. `_aligned` are ids of
projected vectors, `_llm` those of the tuned LLM."""


def arms_of(text: str) -> dict[str, Arm]:
    """Return the arms that --arms names; raises InputError on unknown ones."""
    found = {}
    for one in text.split(","):
        name, is_own, rest = one.partition("=")
        if not is_own and name not in ARMS:
            raise InputError("--arms", name, choices=ARMS)
        recipe, *changes = rest.split(":")
        if is_own and recipe not in recipes.RANKERS:
            raise InputError("--arms", recipe, choices=recipes.RANKERS)
        found[name] = Arm(recipe, tuple(changes)) if is_own else ARMS[name]
    return found


def codes_of(arm: Arm, vectors: str, sizes: Sequence[str], out: str) -> str:
    """Return the folder of an arm's semantic ids, making them first."""
    config = config_of(sizes, kind=arm.kind)
    place = f"{vectors.rstrip('/').rsplit('/', 1)[-1]}-{arm.kind}"
    suffix = {None: "", "projection": "-aligned", "llm": "-llm"}[arm.aligned]
    folder = join(out, "codes", f"{place}{suffix}")
    embeddings = served(vectors).item_embeddings
    if arm.aligned:
        embeddings = join(vectors, f"{ALIGNED}-{arm.aligned}")
        align_run(vectors, config=METHODS[arm.aligned](), out=embeddings)
    if not exists(join(folder, "manifest.json")):
        code_items(embeddings, folder, config)
    return folder


def config_of_arm(arm: Arm, seed: int, vectors: str, given: argparse.Namespace) -> Config:
    """Return the configuration of a run."""
    changes = [*arm.changes, *given.assignments, "training.num_workers=0", f"seed={seed}"]
    config = override(recipes.build(arm.recipe), changes)
    family = family_of(config.ranking)
    if family.uses_vectors or (family.reads is not None and not family.vectors_optional):
        if not vectors:
            raise InputError("--vectors", None, f"is needed by {arm.recipe}")
        config = override(config, [f"ranking.vectors={vectors}"])
    if arm.kind:
        folder = codes_of(arm, vectors, given.codes, given.out)
        config = override(config, [f"ranking.codes={folder}"])
    return config


def trained(config: Config, data: str, out: str, cache: str) -> Judged:
    """Train a run, unless it is finished, and return its test predictions."""
    if exists(join(out, "predictions", "test.parquet")):
        if read_json(join(out, "config.json"))["ranking"] != to_dict(config)["ranking"]:
            raise InputError("--out", out, "holds a run with other settings; choose another folder")
        return Judged.load(join(out, "predictions"), "test")
    resume = exists(join(out, "checkpoints"))
    train_run(config, data, out, cache=cache, resume=resume, is_tested=False)
    ranker, source = load_ranker(out), ensure_prepared(data, config.prepare)
    predict = predictor(ranker.model, ranker.collator)
    judged = Judged.of(exposures_of(config, source, cache), "test", predict)
    judged.save(join(out, "predictions"), "test")
    return judged


def line(name: str, mine: Sequence[Judged], base: Sequence[Judged], cold: np.ndarray) -> str:
    """Return an arm's line: over all shown items, then over cold ones."""
    cells = [f"{name:<16}"]
    for kept in (np.ones(len(cold), bool), cold):
        some, other = ([one.where(kept) for one in seeds] for seeds in (mine, base))
        values = [one.metrics("impressions") for one in some]
        for metric in ("AUC", "gAUC"):
            cells.append(f"{spread([found.get(metric, np.nan) for found in values]):<12}")
        cells.append(f"{'' if mine is base else difference(some, other):<22}")
    return " | ".join(cells)


def spread(values: Sequence[float]) -> str:
    """Return mean and standard deviation over seeds."""
    deviation = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    return f"{np.mean(values):.2f}{deviation}"


def difference(mine: Sequence[Judged], base: Sequence[Judged]) -> str:
    """Return the mean difference of the AUC with its 95 % interval."""
    first = mine[0]
    if not first.clicked.any() or first.clicked.all():
        return ""
    found = mean_auc_difference(
        [one.chance for one in mine], [one.chance for one in base], first.clicked, first.user, 0
    )
    return f"{100 * found.difference:+.2f} [{100 * found.low:+.2f}, {100 * found.high:+.2f}]"


def main(argv: list[str] | None = None) -> None:
    """Train what is missing, and print the table."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    flags.add_argument("data", nargs="?", metavar="DATA", help="default: the toy shop")
    flags.add_argument("--vectors", action="append", default=[], metavar="RUN",
                       help="finished run with item vectors; repeatable, a seed each")  # fmt: skip
    flags.add_argument("--arms", default=",".join(ARMS), help="default: %(default)s")
    flags.add_argument("--seeds", type=int, default=3)
    flags.add_argument("--out", default="runs/ctr_systems", help="folder of all runs")
    flags.add_argument("--set", action="append", default=[], dest="assignments",
                       help="FIELD=VALUE for every arm (repeatable)")  # fmt: skip
    flags.add_argument("--codes", action="append", default=[], metavar="codes.FIELD=VALUE",
                       help="how semantic ids are made (repeatable)")  # fmt: skip
    cache_flag(flags)
    given = flags.parse_args(argv)
    given.out = absolute(given.out)
    arms, cache = arms_of(given.arms), absolute(given.cache or join(given.out, "cache"))
    data = absolute(given.data) if given.data else toy_shop(cache)
    vectors = [absolute(run) for run in given.vectors] or [""]
    found: dict[str, list[Judged]] = {}
    for seed in range(given.seeds):
        for name, arm in arms.items():
            config = config_of_arm(arm, seed, vectors[seed % len(vectors)], given)
            place = join(given.out, f"{name}-{seed}")
            found.setdefault(name, []).append(trained(config, data, place, cache))
    source = ensure_prepared(data, config.prepare)
    rates = ItemRates.count(exposures_of(config, source, cache), source.catalog().num_items)
    base, negatives = next(iter(found.values())), source.facts.get("negative_source")
    cold = ~rates.is_warm[base[0].row]
    proxy = ", PROXY negatives" if negatives == "proxy" else ""
    print(f"{len(cold)} shown items of the test, {cold.sum()} of them cold{proxy}; "
          f"{given.seeds} seeds; differences to {next(iter(arms))}")  # fmt: skip
    heads = ("arm", "AUC", "gAUC", "AUC difference", "cold AUC", "cold gAUC", "cold AUC difference")
    widths = (16, 12, 12, 22, 12, 12, 22)
    print(" | ".join(f"{text:<{width}}" for text, width in zip(heads, widths, strict=True)))
    for name, seeds in found.items():
        print(line(name, seeds, base, cold))


if __name__ == "__main__":
    run(main)
