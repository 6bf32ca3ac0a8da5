"""The assembled configuration and its overrides by dotted paths.

Each part defines its own configuration (a frozen dataclass beside the class); this module combines
them. `recipes.py` returns a full `Config` per named run.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import os
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast, get_type_hints

from pydantic import ConfigDict

from karma_ray.data.collate import CollateConfig
from karma_ray.data.config import PrepareConfig
from karma_ray.errors import InputError
from karma_ray.evaluation.config import EvaluationConfig
from karma_ray.model.config import ModelConfig
from karma_ray.objectives.losses import ObjectiveConfig
from karma_ray.ranges import CountOrZero, validated
from karma_ray.ranking.config import RankingConfig
from karma_ray.training.config import PretrainConfig, TrainingConfig, WarmupConfig


@dataclass(frozen=True)
class Config:
    """The complete configuration of a run."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    recipe: str = "karma_text"
    """Name of the recipe from which this run started."""
    seed: CountOrZero = 0
    """Seed of initialisation, data order, decoded positions and query dropping."""
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    """How events become sequences and examples."""
    collate: CollateConfig = field(default_factory=CollateConfig)
    """How rows become batches."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Item encoder, user decoder, score, and decoders that exist only in training."""
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    """Causal language modelling of the catalogue's text; only for the `tiny` backbone."""
    warmup: WarmupConfig = field(default_factory=WarmupConfig)
    """Stage 1: decode an item's text from its own embedding."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """L = L_act + lambda_dec (L_gen + L_recon + lambda_img L_img), equations 4 and 9."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """Stage 2: the joint objective on behaviour sequences."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Metrics on the validation and test examples."""
    ranking: RankingConfig = field(default_factory=RankingConfig)
    """The CTR model that a run trains in place of KARMA, if its family is given."""


SHORT = {
    "model.checkpoint": ("model.item_encoder.checkpoint", "model.user_decoder.checkpoint"),
}
"""Short forms of `--set`, which set several fields to one value."""


def to_dict(config: Config) -> dict[str, Any]:
    """Return the configuration as plain JSON values."""
    return dataclasses.asdict(config)


def flattened(value: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves with dotted names: `{"a": {"b": 1}}` -> ("a.b", 1)."""
    for name, inner in value.items():
        if isinstance(inner, Mapping):
            yield from flattened(inner, f"{path}{name}.")
        else:
            yield f"{path}{name}", inner


def from_dict(value: Mapping[str, Any]) -> Config:
    """Build and validate a Config; raises InputError naming field, value and problem.

    In texts that start with `~/` the home folder is expanded.
    """
    _check_names(Config, value, "")
    return validated(Config, _from_home(value))


def overlaid(config: Config, value: Mapping[str, Any]) -> Config:
    """Return the configuration with the fields that `value`, as in `from_dict`, says."""
    whole = to_dict(config)
    for path, leaf in flattened(value):
        *groups, name = path.split(".")
        node = whole
        for group in groups:
            node = node[group]
        node[name] = leaf
    return from_dict(whole)


def from_home(text: str) -> str:
    """Expand `~` at the start of a path, because most libraries take it for a folder's name."""
    return os.path.expanduser(text) if text == "~" or text.startswith("~/") else text


def _from_home(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _from_home(part) for name, part in value.items()}
    return from_home(value) if isinstance(value, str) else value


def override(config: Config, assignments: Iterable[str]) -> Config:
    """Apply `dotted.path=value` strings (the values of `--set`) to a configuration.

    Raises InputError on an unknown path (naming the choices) or a value of the wrong type.
    """
    value = to_dict(config)
    for assignment in assignments:
        path, separator, text = assignment.partition("=")
        if not separator:
            raise InputError("--set", assignment, "is not of the form dotted.path=value")
        for field_path in SHORT.get(path.strip(), (path.strip(),)):
            _assign(value, field_path, text)
    return from_dict(value)


def assigned(assignments: Iterable[str]) -> set[str]:
    """Return the names of the fields that `--set` values assign."""
    paths = [assignment.partition("=")[0].strip() for assignment in assignments]
    return {field for path in paths for field in SHORT.get(path, (path,))}


def _assign(value: dict[str, Any], path: str, text: str) -> None:
    node, parts = value, path.split(".")
    for depth, part in enumerate(parts):
        if not isinstance(node, dict) or part not in node:
            choices = list(node) if isinstance(node, dict) else None
            where = "--set " + (".".join(parts[:depth]) or "(top)")
            raise InputError(where, part, "is not a known field", choices=choices)
        if depth < len(parts) - 1:
            node = node[part]
    if isinstance(node[parts[-1]], dict):
        raise InputError("--set", path, "is a group of fields", choices=list(node[parts[-1]]))
    # A text is taken as it is: `none` and `1` are words where the field holds words.
    before = node[parts[-1]]
    node[parts[-1]] = text.strip() if isinstance(before, str) else _literal(text)


def describe_fields(kind: type = Config, prefix: str = "") -> str:
    """Return every field with its default and its docstring, for `--help`."""
    short = SHORT if kind is Config else {}
    lines = [f"  {name} sets {' and '.join(fields)}" for name, fields in short.items()]
    _describe(kind, prefix, lines)
    return "\n".join(lines)


def _literal(text: str) -> Any:
    lowered = text.strip().lower()
    if lowered in ("true", "false"):
        return lowered == "true"
    if lowered in ("none", "null"):
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    if text.startswith("[") and text.endswith("]"):
        return [_literal(part) for part in text[1:-1].split(",") if part.strip()]
    return text.strip()


def _check_names(kind: type, value: Mapping[str, Any], prefix: str) -> None:
    hints = get_type_hints(kind)
    names = [item.name for item in dataclasses.fields(kind)]
    for name, child in value.items():
        if name not in names:
            raise InputError(f"config {prefix}{name}", child, "is not a known field", choices=names)
        if dataclasses.is_dataclass(hints[name]) and isinstance(child, Mapping):
            _check_names(hints[name], child, f"{prefix}{name}.")


def _describe(kind: type, prefix: str, lines: list[str]) -> None:
    documentation = _field_docs(kind)
    for item in dataclasses.fields(kind):
        hint = get_type_hints(kind)[item.name]
        if dataclasses.is_dataclass(hint):
            _describe(cast(type, hint), f"{prefix}{item.name}.", lines)
            continue
        default = item.default
        if default is dataclasses.MISSING and item.default_factory is not dataclasses.MISSING:
            default = item.default_factory()
        lines.append(f"  {prefix}{item.name} = {default}")
        if item.name in documentation:
            lines.append(f"      {documentation[item.name]}")


def _field_docs(kind: type) -> dict[str, str]:
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0].body  # type: ignore[attr-defined]
    documented: dict[str, str] = {}
    for node, following in itertools.pairwise(body):
        if (
            isinstance(node, ast.AnnAssign)
            and isinstance(node.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
        ):
            documented[node.target.id] = " ".join(str(following.value.value).split())
    return documented
