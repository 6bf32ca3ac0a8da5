"""The plan of a study: data set, settings, and the trials of a table's rows and seeds."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from karma_ray import pretrained, recipes
from karma_ray.artifacts import absolute, exists, join
from karma_ray.config import Config, assigned, override
from karma_ray.data.pictures import has_images
from karma_ray.data.prepared import fingerprint, read_data_manifest, require_data
from karma_ray.data.visual import features_uri
from karma_ray.errors import InputError
from karma_ray.studies.rows import Row
from karma_ray.studies.tables import TABLES
from karma_ray.studies.trial import Trial

HERE = ("training.num_workers=0", "training.threads_per_worker=1")
"""A trial trains in its own process, with one thread."""
_LONG = ("training.steps=1000", "training.validate_every=200", *HERE)
SETTINGS: dict[str, tuple[str, ...]] = {
    # Unlike the `toy` recipe, which is tuned to win in five minutes, these settings give every row
    # the same size. They must not change: records are identified by them (test_records.py).
    "toy_shop": (
        "model.tiny.hidden_size=64", "model.tiny.intermediate_size=192",
        "model.tiny.vocab_size=2048", "model.score.scale=10", "objective.hard_weight=2",
        "objective.lambda_dec=0.1", "training.encoder_delay=0.4", "training.encoder_lr=0.3",
        "pretrain.steps=200", "warmup.steps=200", "training.learning_rate=0.002",
        "training.batch_size=64", "training.steps=1500", "training.validate_every=150", *HERE,
    ),
    # With few clicks, hard negatives of full weight outweigh the query, and an encoder that learns
    # from the start loses the user's taste (docs/log.md, L15).
    "hm": (
        "model.score.scale=10", "objective.hard_weight=0.3", "training.encoder_delay=0.25",
        "training.encoder_lr=0.5", "training.steps=1600", "training.validate_every=200", *HERE,
    ),
    # Without queries, training on clicks alone collapses an encoder that learns from the start.
    "amazon_industrial": ("training.encoder_delay=0.4", "training.encoder_lr=0.3", *_LONG),
    "*": _LONG,
}  # fmt: skip
"""Settings of a study per data set, `toy_shop-NAME` as for `toy_shop` (`*`: any other); --set is
applied after them."""


@dataclass(frozen=True)
class Data:
    """The data set of a study."""

    uri: str
    name: str
    hash: str

    @classmethod
    def open(cls, uri: str) -> Data:
        """Open a data folder; raises InputError when there are no data."""
        require_data(uri)
        manifest = read_data_manifest(uri)
        name = str(manifest.get("name") or absolute(uri).rstrip("/").rsplit("/", 1)[-1])
        return cls(absolute(uri), name, str(manifest.get("data_hash") or fingerprint(uri)))


def named_rows(table: str, names: str | None) -> list[Row]:
    """Return rows of a table by comma-separated names, or all rows without names.

    Raises InputError on an unknown table or row.
    """
    if table not in TABLES:
        raise InputError("TABLE", table, choices=list(TABLES))
    rows = {row.name: row for row in TABLES[table].rows}
    wanted = list(rows) if names is None else [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in rows:
            raise InputError("--rows", name, f"is not a row of {table}", choices=list(rows))
    return [rows[name] for name in dict.fromkeys(wanted)]


def possible_rows(
    rows: Sequence[Row], data: Data, extra: Sequence[str] = ()
) -> tuple[list[Row], dict[str, str]]:
    """Return the rows that the data allow, and reasons against others; `extra` is from --set."""
    reasons = {row.name: _missing(row, data, extra) for row in rows}
    allowed = [row for row in rows if not reasons[row.name]]
    return allowed, {name: reason for name, reason in reasons.items() if reason}


def _missing(row: Row, data: Data, extra: Sequence[str]) -> str:
    """Return the reason why a row cannot be run on these data, or ""."""
    if row.built_from not in recipes.names():
        return f"there is no recipe {row.built_from} yet"
    if row.built_from in recipes.CEILINGS and not exists(join(data.uri, "truth")):
        return f"the truth of {data.name} is unknown"
    of_llm = (*recipes.LLM_FLOORS, *recipes.MADE_FOR_LLM)
    if row.built_from in of_llm and not pretrained.names_llm(override(Config(), extra)):
        return "no pretrained model is named (--set model.checkpoint=...)"
    if row.needs_images and not any(a.startswith("collate.visual_features=") for a in extra):
        if not has_images(data.uri):
            return f"the items of {data.name} have no images"
        if not exists(features_uri(data.uri)):
            how = f"python jobs/features.py {shlex.quote(data.uri)}"
            return f"the images have no features; make them with: {how}"
    return ""


def parsed_seeds(text: str) -> list[int]:
    """Parse `3` as [0, 1, 2], `0,4` as [0, 4] and `4,` as [4]; raises InputError."""
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
        if "," not in text:
            numbers = list(range(numbers[0]))
        if numbers and min(numbers) >= 0:
            return list(dict.fromkeys(numbers))
    except (ValueError, IndexError):
        pass
    message = "is neither a count nor a comma-separated list of seeds from 0"
    raise InputError("--seeds", text, message, choices=["3", "0,1,2", "7,"])


def check_settings(rows: Iterable[Row], extra: Sequence[str]) -> None:
    """Raise InputError on a `--set` that is wrong for any data, before data are made or read."""
    for row in rows:
        if row.built_from in recipes.names():
            override(recipes.build(row.built_from), [*row.settings, *extra])


def planned(
    rows: Iterable[Row], seeds: Sequence[int], data: Data, extra: Sequence[str] = ()
) -> list[Trial]:
    """Return every row and seed, in the order of seeds, checked before the first one starts.

    `extra` is applied after the settings of the data set. These are for small models: with
    pretrained weights `pretrained.PRETRAINED` comes between them, then the settings of the row.
    """
    kind = data.name.partition("-")[0]
    base = SETTINGS.get(kind, SETTINGS["*"])
    # The same for all rows, as rows are compared that were made under equal assignments.
    plain = override(recipes.action_only(), [*base, *extra])
    shared = pretrained.settings_of_weights(plain, assigned(extra))
    trials = []
    for row in rows:
        config = override(recipes.build(row.built_from), [*base, *row.settings, *extra])
        own = pretrained.settings_of_weights(config, assigned([*row.settings, *extra]))
        config = override(config, own)
        config.model.check()
        config.objective.check()
        config.evaluation.corpus_size()
        trials += [
            Trial(row.name, replace(config, seed=seed), (*base, *shared, *extra), tuple(extra))
            for seed in seeds
        ]
    return sorted(trials, key=lambda trial: seeds.index(trial.config.seed))
