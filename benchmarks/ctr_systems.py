"""The ranking systems side by side: CTR models on the same pages, over seeds, in one table.

python benchmarks/ctr_systems.py --vectors RUN                            the toy shop, every arm
python benchmarks/ctr_systems.py DATA --vectors RUN --arms din,qarm_rq,qarm_fsq --seeds 3
python benchmarks/ctr_systems.py DATA --vectors RUN --arms din,wide=ctr_din:ranking.width=32

An arm is a name of ARMS, or NAME=RECIPE[:FIELD=VALUE...]. Every arm is trained once for each seed
in OUT/ARM-SEED; runs that are finished are read, and interrupted ones go on. Floors and ceilings
are not measured: `python jobs/evaluate.py OUT/ARM-SEED` does. With several --vectors
the seeds take turns, so that the table is over seeds of the vectors as well. A difference is a
mean over seeds; its interval draws users, with all their seeds, and is over the same shown items.
The first table has differences to the first arm, the second those of PAIRS whose arms are both
there, and the third the teachers of ctr_ocarm, which read what comes after the page. Cold items
are those that no training page showed.
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
from karma_ray.data.prepared import PreparedData
from karma_ray.errors import InputError
from karma_ray.metrics.significance import BootstrapResult
from karma_ray.ranking.families import family_of
from karma_ray.ranking.floors import ItemRates
from karma_ray.ranking.judged import Judged, mean_differences
from karma_ray.ranking.load import load_ranker
from karma_ray.retrieval.aligned import FOLDER as ALIGNED
from karma_ray.retrieval.aligned import METHODS, Method, align_run
from karma_ray.retrieval.parts import served
from karma_ray.runs.ctr import ensure_teacher, exposures_of, predictor
from karma_ray.runs.ctr_assessment import teacher_metrics
from karma_ray.runs.executor import HERE
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
    """How the embeddings that these are of were aligned, if they were; without ids, how its vectors
    were."""


ARMS: Mapping[str, Arm] = {
    "din": Arm("ctr_din"),
    "simtier": Arm("ctr_simtier"),
    "vectors": Arm("ctr_din", ("ranking.family=vectors",)),
    "vectors_aligned": Arm("ctr_din", ("ranking.family=vectors",), aligned="projection"),
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
`rq` and `fsq` read semantic ids alone, `gsu` the search alone, `qarm_` both. `_aligned`
is of projected vectors, `_llm` of those of the tuned LLM."""
PAIRS = (
    ("vectors_aligned", "vectors"), ("fsq", "rq"), ("fsq_aligned", "fsq"),
    ("fsq_llm", "fsq"), ("fsq_llm", "fsq_aligned"),
    ("qarm_fsq", "qarm_rq"), ("qarm_fsq_aligned", "qarm_fsq"),
    ("sarm", "simtier"), ("sarm", "vectors"), ("sarm", "sarm_words"), ("ocarm", "untaught"),
)  # fmt: skip
"""Arms that differ in what a system adds, and in nothing else but its rival."""


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
        embeddings = aligned_by(arm.aligned, vectors)
    if not exists(join(folder, "manifest.json")):
        code_items(embeddings, folder, config)
    return folder


def aligned_by(method: Method, vectors: str) -> str:
    """Return the folder of a run's aligned embeddings, making them first."""
    folder = join(vectors, f"{ALIGNED}-{method}")
    align_run(vectors, config=METHODS[method](), out=folder)
    return folder


def config_of_arm(arm: Arm, seed: int, vectors: str, given: argparse.Namespace) -> Config:
    """Return the configuration of a run."""
    changes = [*arm.changes, *given.assignments, "training.num_workers=0", f"seed={seed}"]
    config = override(recipes.build(arm.recipe), changes)
    family = family_of(config.ranking)
    if family.uses_vectors or (family.reads is not None and not family.vectors_optional):
        if not vectors:
            raise InputError("--vectors", None, f"is needed by {arm.recipe}")
        read = aligned_by(arm.aligned, vectors) if arm.aligned and not arm.kind else vectors
        config = override(config, [f"ranking.vectors={read}"])
    if arm.kind:
        folder = codes_of(arm, vectors, given.codes, given.out)
        config = override(config, [f"ranking.codes={folder}"])
    return config


def trained(config: Config, data: str, out: str, cache: str) -> Judged:
    """Train a run, unless it is finished, and return its test predictions."""
    if exists(join(out, "predictions", "test.parquet")):
        if read_json(join(out, "config.json"))["ranking"] != to_dict(config)["ranking"]:
            raise InputError("--out", out, "holds a run with other settings; choose another folder")
    else:
        resume = exists(join(out, "checkpoints"))
        train_run(config, data, out, cache=cache, resume=resume, is_tested=False)
    return predicted(config, ensure_prepared(data, config.prepare), out, cache, "test")


def predicted(config: Config, source: PreparedData, out: str, cache: str, split: str) -> Judged:
    """Return what a finished run predicts for a split, which is kept beside it."""
    folder = join(out, "predictions")
    if exists(join(folder, f"{split}.parquet")):
        return Judged.load(folder, split)
    ranker = load_ranker(out)
    predict = predictor(ranker.model, ranker.collator)
    judged = Judged.of(exposures_of(config, source, cache), split, predict)
    judged.save(folder, split)
    return judged


def line(name: str, mine: Sequence[Judged], base: Sequence[Judged], cold: np.ndarray) -> str:
    """Return an arm's line: over all shown items, then over cold ones."""
    cells = [f"{name:<16}"]
    for kept in (np.ones(len(cold), bool), cold):
        some, other = ([one.where(kept) for one in seeds] for seeds in (mine, base))
        values = [one.metrics("impressions") for one in some]
        for metric in ("AUC", "gAUC"):
            cells.append(f"{spread([found.get(metric, np.nan) for found in values]):<12}")
        cells.append(f"{'' if mine is base else difference(some, other).get('AUC', ''):<22}")
    return " | ".join(cells)


def spread(values: Sequence[float]) -> str:
    """Return mean and standard deviation over seeds."""
    deviation = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    return f"{np.mean(values):.2f}{deviation}"


def difference(mine: Sequence[Judged], base: Sequence[Judged]) -> dict[str, str]:
    """Return the mean differences of AUC and gAUC with their 95 % intervals, in points."""
    if not mine[0].clicked.any() or mine[0].clicked.all():
        return {}

    def text(found: BootstrapResult) -> str:
        return f"{100 * found.difference:+.2f} [{100 * found.low:+.2f}, {100 * found.high:+.2f}]"

    found = mean_differences(mine, base, "impressions", 0)
    return {name: text(result) for name, result in found.items()}


def pairs(found: Mapping[str, Sequence[Judged]], cold: np.ndarray) -> list[str]:
    """Return the table of PAIRS whose arms are both there: all shown items, then cold ones."""
    heads = ("AUC difference", "gAUC difference", "cold AUC difference", "cold gAUC difference")
    lines = [" | ".join([f"{'pair':<28}", *(f"{head:<22}" for head in heads)])]
    for mine, base in PAIRS:
        if mine in found and base in found:
            cells = [f"{f'{mine} − {base}':<28}"]
            for kept in (np.ones(len(cold), bool), cold):
                some, other = ([one.where(kept) for one in found[arm]] for arm in (mine, base))
                result = difference(some, other)
                cells += [f"{result.get(metric, ''):<22}" for metric in ("AUC", "gAUC")]
            lines.append(" | ".join(cells))
    return lines if len(lines) > 1 else []


def teachers(runs: Sequence[tuple[Config, str]], source: PreparedData, cache: str) -> list[str]:
    """Return the table of an arm's teachers beside its students on test and validation pages.

    `runs` are the seeds' configurations and folders. Empty for an arm without teachers.
    """
    of_teacher: dict[str, list[float]] = {}
    of_student: dict[str, list[float]] = {}
    for config, out in runs:
        if not ensure_teacher(config, source, cache, HERE):
            return []
        metrics = teacher_metrics(config, source, exposures_of(config, source, cache), cache)
        for split, prefix in (("test", ""), ("valid", "valid/")):
            judged = predicted(config, source, out, cache, split).metrics("impressions")
            for name in ("AUC", "gAUC"):
                of_teacher.setdefault(f"{split} {name}", []).append(
                    metrics[f"teacher/{prefix}{name}"]
                )
                of_student.setdefault(f"{split} {name}", []).append(judged[name])
    rows = {"": of_teacher, "teacher": of_teacher, "student": of_student}
    return [
        " | ".join([f"{row:<16}", *(f"{spread(values[name]) if row else name:<16}"
                                    for name in values)])
        for row, values in rows.items()
    ]  # fmt: skip


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
    runs: dict[str, list[tuple[Config, str]]] = {}
    for seed in range(given.seeds):
        for name, arm in arms.items():
            config = config_of_arm(arm, seed, vectors[seed % len(vectors)], given)
            place = join(given.out, f"{name}-{seed}")
            runs.setdefault(name, []).append((config, place))
            found.setdefault(name, []).append(trained(config, data, place, cache))
    source = ensure_prepared(data, config.prepare)
    report(found, source, ItemRates.count(exposures_of(config, source, cache),
                                          source.catalog().num_items))  # fmt: skip
    for name, seeds in runs.items():
        if lines := teachers(seeds, source, cache):
            print(f"\nteachers of {name}, a bound and no rival", *lines, sep="\n")


def report(found: Mapping[str, Sequence[Judged]], source: PreparedData, rates: ItemRates) -> None:
    """Print the tables of arms and of pairs."""
    (first, base), negatives = next(iter(found.items())), source.facts.get("negative_source")
    cold = ~rates.is_warm[base[0].row]
    proxy = ", PROXY negatives" if negatives == "proxy" else ""
    print(f"{len(cold)} shown items of the test, {cold.sum()} of them cold{proxy}; "
          f"{len(base)} seeds; differences to {first}")  # fmt: skip
    heads = ("arm", "AUC", "gAUC", "AUC difference", "cold AUC", "cold gAUC", "cold AUC difference")
    widths = (16, 12, 12, 22, 12, 12, 22)
    print(" | ".join(f"{text:<{width}}" for text, width in zip(heads, widths, strict=True)))
    for name, seeds in found.items():
        print(line(name, seeds, base, cold))
    if lines := pairs(found, cold):
        print("", *lines, sep="\n")


if __name__ == "__main__":
    run(main)
