"""The metrics of every recipe over seeds: mean and spread.

    python benchmarks/quality.py --recipes query_filter,action_only,karma_text --seeds 0,1,2
    python benchmarks/quality.py --data DATA --set training.steps=2000
    python benchmarks/quality.py --summary

Every finished run leaves `docs/results/<data>-<recipe>-seed<k>.json`; a run found there with the
same configuration is not repeated, so a study can be stopped and continued. Prints a table and
one JSON line per recipe; the last line is a flat object `<data>/<recipe>/<metric>`.
"""

from __future__ import annotations

import functools
import json
import logging
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from karma_ray import cli, recipes
from karma_ray.artifacts import exists, join, read_json, read_manifest, value_hash, write_json
from karma_ray.baselines.floors import build_floor
from karma_ray.cluster.pipeline import toy_shop, train_run
from karma_ray.cluster.sharding import ensure_prepared
from karma_ray.config import Config, from_dict, override, to_dict
from karma_ray.errors import InputError
from karma_ray.training.evaluate import evaluate_prepared

logger = logging.getLogger("quality")
CACHE = str(ROOT / "runs" / "cache")

DEFAULT_RECIPES = (*recipes.FLOORS, "action_only", "karma_text")
TABLE = ("HR@10", "HR@50", "HR@200", "gAUC", "JS@50_excl_gt", "cold/HR@10", "in_query/HR@10")
HEADLINE = ("HR@10", "HR@50", "HR@200", "gAUC", "in_query/HR@10")
QUICK = (
    "pretrain.steps=40", "warmup.steps=40", "training.steps=40", "evaluation.max_examples=400",
)  # fmt: skip
_HERE = ("training.num_workers=0", "training.threads_per_worker=1")
_LONG = ("training.steps=1000", "training.validate_every=200", *_HERE)
STUDY: dict[str, tuple[str, ...]] = {
    # The shape of the `toy` recipe, for longer: every recipe of the toy shop with the same one.
    "toy_shop": (
        "model.tiny.hidden_size=64", "model.tiny.intermediate_size=192",
        "model.tiny.vocab_size=2048", "model.score.scale=10", "objective.hard_weight=2",
        "objective.lambda_dec=0.1", "training.encoder_delay=0.4", "training.encoder_lr=0.3",
        "pretrain.steps=200", "warmup.steps=200", "training.learning_rate=0.002",
        "training.batch_size=64", "training.steps=1500", "training.validate_every=150", *_HERE,
    ),
    # Without queries clicks alone collapse an encoder that learns from the start.
    "amazon_industrial": ("training.encoder_delay=0.4", "training.encoder_lr=0.3", *_LONG),
    "*": _LONG,
}  # fmt: skip
"""What a study sets for a data set by name (`*`: any other); --set comes after it."""
_MEASURED = ("prepare.", "evaluation.")
Record = dict[str, Any]


def main(argv: list[str] | None = None) -> None:
    """Run what is missing, then print all results of the data."""
    commit()  # what is loaded now, whatever is committed while this runs
    flags = cli.parser(__doc__ or "")
    flags.add_argument("--data", metavar="URI", help="data folder (default: the toy shop)")
    flags.add_argument(
        "--recipes", help="comma-separated (default: floors, action_only, karma_text)"
    )
    flags.add_argument("--seeds", default="0,1,2", help="comma-separated (default: 0,1,2)")
    flags.add_argument(
        "--set", action="append", default=[], metavar="PATH=VALUE", dest="assignments"
    )
    flags.add_argument("--quick", action="store_true", help="floors and toy, one seed, few steps")
    flags.add_argument("--summary", action="store_true", help="run nothing, print what is there")
    flags.add_argument("--results", metavar="DIR", help="default: docs/results, with --quick runs/")
    arguments = flags.parse_args(argv)
    quick = bool(arguments.quick)
    results = Path(arguments.results or ROOT / ("runs/quality-quick" if quick else "docs/results"))
    data, name = None, None
    if not arguments.summary or arguments.data:
        data = arguments.data or toy_shop(CACHE)
        name = str(read_manifest(data, "data")["name"])
    if data and name and not arguments.summary:
        default = (*recipes.FLOORS, "toy") if quick else DEFAULT_RECIPES
        chosen = arguments.recipes.split(",") if arguments.recipes else list(default)
        study = QUICK if quick else STUDY.get(name, STUDY["*"])
        assignments = [*study, *arguments.assignments]
        for config in configurations(chosen, [0] if quick else seeds(arguments.seeds), assignments):
            finish(config, data, name, results)
    summarise([record for record in read_results(results) if name in (None, record["data"])])


def seeds(text: str) -> list[int]:
    """`0,1,2` -> [0, 1, 2]."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError("--seeds", text, "is not a comma-separated list of integers") from None


def configurations(
    chosen: Iterable[str], seed_list: list[int], assignments: list[str]
) -> list[Config]:
    """Every recipe x seed, built before the first run starts so that a typo ends it at once."""
    built = [override(recipes.build(name), assignments) for name in chosen]
    return [replace(config, seed=seed) for seed in seed_list for config in built]


def finish(config: Config, data: str, name: str, results: Path) -> None:
    """Run one configuration and leave its record, unless it is there already."""
    shop = read_manifest(data, "data").get("data_hash")
    stem = f"{name}-{config.recipe}-seed{config.seed}"
    digest = value_hash([to_dict(config), shop])[:8]
    for path in sorted(results.glob(f"{stem}*.json")):
        record = read_json(str(path))
        if same_config(record["config"], config) and record.get("data_hash") == shop:
            logger.info("%s is there: %s", stem, path)
            return
    logger.info("%s starts", stem)
    started = time.monotonic()
    metrics = measure(config, data, str(ROOT / "runs" / "quality" / f"{stem}-{digest}"))
    record = {
        "data": name,
        "recipe": config.recipe,
        "seed": config.seed,
        "config": to_dict(config),
        "metrics": metrics,
        "seconds": round(time.monotonic() - started, 1),
        "commit": commit(),
        "data_hash": shop,
    }
    # Another configuration of the same recipe and seed keeps its file.
    taken = (results / f"{stem}.json").exists()
    write_json(record, str(results / (f"{stem}-{digest}.json" if taken else f"{stem}.json")))


def measure(config: Config, data: str, out: str) -> dict[str, Any]:
    """Test metrics of one run: floors and ceilings are scored, recipes trained first."""
    if config.recipe in recipes.TRAINED:
        # An interrupted run has its configuration and perhaps checkpoints: it goes on from there.
        return train_run(config, data, out, resume=exists(join(out, "config.json")), cache=CACHE)
    prepared = ensure_prepared(data, config.prepare)
    ranker = build_floor(config.recipe, prepared, config.seed)
    return dict(evaluate_prepared(ranker, prepared, "test", config.evaluation, config.seed))


def same_config(saved: Record, config: Config) -> bool:
    """Whether a record was made with this configuration."""
    return settled(saved) == to_dict(config)


def settled(saved: Record) -> Record:
    """A record's configuration, with fields that came later at their defaults; as it is where
    it names fields that are gone."""
    try:
        return to_dict(from_dict(saved))
    except InputError:
        return saved


@functools.cache
def commit() -> str | None:
    """HEAD, or None outside a repository."""
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def read_results(results: Path) -> list[Record]:
    """Every record under a folder."""
    return [read_json(str(path)) for path in sorted(results.glob("*.json"))]


def groups(records: list[Record]) -> dict[tuple[str, str], list[Record]]:
    """(data, recipe) -> its seeds; `recipe[field=value]` where settings of a recipe differ."""
    variants: dict[tuple[str, str], dict[str, list[Record]]] = {}
    for record in records:
        of_recipe = variants.setdefault((record["data"], record["recipe"]), {})
        of_recipe.setdefault(value_hash(settings_of(record)), []).append(record)
    result: dict[tuple[str, str], list[Record]] = {}
    for (data, recipe), found in variants.items():
        settings = [settings_of(members[0]) for members in found.values()]
        names = [name for name in settings[0] if len({str(s.get(name)) for s in settings}) > 1]
        for setting, members in zip(settings, found.values(), strict=True):
            told = ",".join(f"{name.rsplit('.', 1)[-1]}={setting.get(name)}" for name in names)
            result[data, f"{recipe}[{told}]" if told else recipe] = members
    return result


def settings_of(record: Record) -> Record:
    """What tells one run of a recipe from another but for the seed: dotted path -> value."""
    # A floor trains nothing: only what it is measured on and with counts.
    trained = record["recipe"] in recipes.TRAINED
    settings = {
        name: value
        for name, value in flattened(settled(record["config"]))
        if name.startswith(_MEASURED) or (trained and name != "seed")
    }
    return {**settings, "data_hash": record.get("data_hash")}


def flattened(value: Record, path: str = "") -> Iterator[tuple[str, Any]]:
    """`{"a": {"b": 1}}` -> ("a.b", 1)."""
    for name, inner in value.items():
        if isinstance(inner, dict):
            yield from flattened(inner, f"{path}{name}.")
        else:
            yield f"{path}{name}", inner


def spread(records: list[Record]) -> dict[str, dict[str, float | None]]:
    """Per metric: mean and sample standard deviation (None for one seed) over the seeds."""
    result: dict[str, dict[str, float | None]] = {}
    names = dict.fromkeys(name for record in records for name in record["metrics"])
    for name in names:
        found = [record["metrics"].get(name) for record in records]
        values = [float(value) for value in found if isinstance(value, int | float)]
        if values:
            deviation = statistics.stdev(values) if len(values) > 1 else None
            result[name] = {"mean": statistics.fmean(values), "std": deviation}
    return result


def summarise(records: list[Record]) -> None:
    """Print the table, a JSON line per recipe and the flat headline."""
    table = {key: spread(members) for key, members in sorted(groups(records).items())}
    print(f"{'data':<18}{'recipe':<56}" + "".join(f"{name:>16}" for name in TABLE))
    for (data, recipe), values in table.items():
        cells = "".join(f"{cell(values.get(name)):>16}" for name in TABLE)
        print(f"{data:<18}{recipe:<56}{cells}")
    headline: dict[str, float | None] = {}
    for (data, recipe), members in sorted(groups(records).items()):
        values = table[data, recipe]
        seed_list = sorted(record["seed"] for record in members)
        print(json.dumps({"data": data, "recipe": recipe, "seeds": seed_list, "metrics": values}))
        for name in HEADLINE:
            if name in values:
                headline[f"{data}/{recipe}/{name}"] = values[name]["mean"]
                headline[f"{data}/{recipe}/{name}_std"] = values[name]["std"]
    print(json.dumps(headline))


def cell(value: dict[str, float | None] | None) -> str:
    """`12.3 ± 0.4`, without the spread for one seed, `-` where the metric is absent."""
    if value is None:
        return "-"
    deviation = value["std"]
    return f"{value['mean']:.1f}" + ("" if deviation is None else f" ± {deviation:.1f}")


if __name__ == "__main__":
    cli.run(main)
