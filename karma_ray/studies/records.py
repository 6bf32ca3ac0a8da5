"""Records of finished runs: which records are of the same run, and which can be compared.

A record is `{data, name, row, recipe, seed, config, assignments, set, metrics, ...}`, a line in the
file of its data set. The outcomes of all test examples (evaluation/outcomes.py) are stored beside
it on the machine of the run and are not committed; intervals.py keeps what comparisons need.
Records without `row` are older ones and are in no table.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from karma_ray import recipes
from karma_ray.artifacts import (
    exists,
    join,
    open_filesystem,
    read_bytes,
    read_lines,
    value_hash,
)
from karma_ray.config import Config, flattened, from_dict, override, to_dict
from karma_ray.errors import InputError
from karma_ray.evaluation.outcomes import Outcomes
from karma_ray.report.record import number
from karma_ray.studies.checkpoints import portable_fields
from karma_ray.training.config import EXECUTION, WARMED_UP_BY

Record = dict[str, Any]
OUTCOMES = "outcomes"
"""Folder of the values per example, inside that of the records."""
METRIC = "HR@50"
"""Validation metric by which settings are chosen."""

_MEASURED = ("prepare.", "evaluation.")
_ENCODED = (
    "model.weights", "model.item_encoder.checkpoint", "model.item_encoder.layers",
    "collate.max_item_tokens",
)  # fmt: skip
"""What a floor of a pretrained LLM depends on besides."""
_ALWAYS = ("model.decodability.max_target_tokens",)
"""Decodability settings of the warm-up, on which every row depends."""


def read_records(results: str | Path) -> list[Record]:
    """Read every record of a folder or URI, by data set and name."""
    fs, path = open_filesystem(str(results))
    names = sorted(name.rsplit("/", 1)[-1] for name in fs.glob(f"{path}/*.jsonl"))
    return [record for name in names for record in read_lines(join(str(results), name))]


def outcomes_path(results: str | Path, name: str) -> str:
    """Return the file of one part of the values per example; `name` is its content hash."""
    return join(str(results), OUTCOMES, f"{name}.npz")


def outcomes_of(record: Record, results: str | Path) -> Outcomes | None:
    """Read the values per example of a record, or None if a file is missing."""
    paths = [outcomes_path(results, record[name]) for name in ("examples", "outcomes")]
    if not all(exists(path) for path in paths):
        return None
    return Outcomes.unpacked(*(read_bytes(path) for path in paths))


def settled(saved: Record) -> Record:
    """Return a record's configuration with defaults for newer fields; unchanged if it names
    fields that no longer exist."""
    try:
        return to_dict(from_dict(saved))
    except InputError:
        return saved


def learnt_from(saved: Record) -> dict[str, Any]:
    """Return the dotted fields of a configuration that affect the result, without the seed.

    Left out are execution settings, training settings of recipes that are not trained, and
    settings of decoders that are not built.
    """
    fields = portable_fields(dict(flattened(settled(saved))))
    unused = _unused(saved)
    fields.pop("seed", None)
    recipe = fields.pop("recipe", "")
    kept = {n: value for n, value in fields.items() if n not in EXECUTION or n in WARMED_UP_BY}
    if recipe not in recipes.TRAINED:
        used = (*_MEASURED, *_ENCODED) if recipe in recipes.LLM_FLOORS else _MEASURED
        kept = {name: value for name, value in kept.items() if name.startswith(used)}
        return {"recipe": recipe, **kept}
    return {
        name: value
        for name, value in kept.items()
        if not name.startswith(unused) or name in _ALWAYS
    }


def run_key(saved: Record, data_hash: str | None) -> str:
    """Return a key that is equal for runs which differ only in seed and place of execution."""
    return value_hash([learnt_from(saved), data_hash])


def record_key(record: Record) -> str:
    """Return the `run_key` of a record."""
    return run_key(record["config"], record.get("data_hash"))


def same_run(record: Record, config: Config, data_hash: str | None) -> bool:
    """Whether a record was made with this configuration, including the seed."""
    mine = run_key(to_dict(config), data_hash)
    return record["seed"] == config.seed and mine == record_key(record)


def baseline_key(record: Record, baseline: str) -> str:
    """Return the `run_key` of the recipe `baseline` under all other settings of this record.

    Records with equal baselines are compared. "" if a setting no longer exists.
    """
    try:
        config = override(recipes.build(baseline), record.get("assignments", []))
    except InputError:
        return ""
    return run_key(to_dict(config), record.get("data_hash"))


def validated(record: Record, metric: str = METRIC) -> float | None:
    """Return the metric on all validation examples after the last step, or on those of the curve
    for older records. None without a finite value."""
    value = record["metrics"].get(f"valid/{metric}")
    if value is None:
        curve = record.get("curve") or [{}]
        value = curve[-1].get(metric)
    # Comparisons with NaN are always false, so NaN could be chosen.
    return number(value)


def chosen(members: Iterable[Record]) -> tuple[list[Record], dict[str, int]]:
    """Return records of each row's best searched setting and of untrained rows, and how many
    settings each row tried.

    Settings are compared by the validation of the first searched seed.
    """
    members = list(members)
    kept: list[Record] = []
    tried: dict[str, int] = {}
    for row in dict.fromkeys(record["row"] for record in members):
        of_row = [record for record in members if record["row"] == row]
        seeds = [record["seed"] for record in of_row if record.get("searched")]
        if not seeds:
            kept += [r for r in of_row if r["config"]["recipe"] not in recipes.TRAINED]
            continue
        values = {
            record_key(record): value
            for record in of_row
            if record["seed"] == min(seeds) and (value := validated(record)) is not None
        }
        if values:
            tried[row] = len(values)
            best = max(values, key=values.__getitem__)
            kept += [record for record in of_row if record_key(record) == best]
    return kept, tried


def _unused(saved: Record) -> tuple[str, ...]:
    """Return prefixes of fields that only affect parts which this run does not build."""
    try:
        config = from_dict(saved)
    except InputError:
        return ()
    built = config.objective.built
    unused: tuple[str, ...] = () if config.ranking.family else ("ranking.",)
    if not built.image:
        unused += ("objective.lambda_img", "model.imagery.", "collate.visual_features")
    if not built.text:
        unused += ("objective.generation", "objective.reconstruction", "model.decodability.")
    if not (built.text or built.image):
        unused += ("objective.lambda_dec", "objective.ce_reduction")
    return unused
