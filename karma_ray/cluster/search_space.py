"""Search spaces of `tune_spaces/`: drawn fields, the maximised metric and fixed fields."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.tune.search.sample import Domain

from karma_ray import pretrained, recipes
from karma_ray.config import Config, assigned, override
from karma_ray.errors import InputError


@dataclass(frozen=True)
class Space:
    """The content of a file of `tune_spaces/`."""

    path: str
    domains: Mapping[str, Domain]
    metric: str
    base_recipe: str
    fixed: tuple[str, ...]

    def base(self, extra: Sequence[str] = ()) -> Config:
        """Return the configuration that all trials share; `extra` is from --set.

        It is suited to pretrained weights in fields that are neither set nor drawn.
        """
        config = override(recipes.build(self.base_recipe), [*self.fixed, *extra])
        return pretrained.suited_to_weights(config, assigned([*self.fixed, *extra, *self.domains]))


def load_space(path: str) -> Space:
    """Read a space file; raises InputError when it, or a field that it names, does not exist."""
    if not Path(path).is_file():
        choices = sorted(str(file) for file in Path(path).parent.glob("*.py"))
        raise InputError("SPACE", path, "is not a file", choices=choices or None)
    spec = importlib.util.spec_from_file_location("karma_ray_tune_space", path)
    if spec is None or spec.loader is None:
        raise InputError("SPACE", path, "is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise InputError("SPACE", path, f"cannot be run ({error})") from error
    space = Space(
        path=path,
        domains=getattr(module, "SPACE", {}),
        metric=getattr(module, "METRIC", ""),
        base_recipe=getattr(module, "BASE_RECIPE", "toy"),
        fixed=tuple(getattr(module, "FIXED", ())),
    )
    _check(space)
    return space


def assignments(values: Mapping[str, Any]) -> list[str]:
    """Return drawn values as `dotted.path=value` strings, which `--set` reads back exactly."""
    return [f"{path}={value}" for path, value in values.items()]


def _check(space: Space) -> None:
    if not isinstance(space.domains, dict) or not space.domains:
        raise InputError("SPACE", space.path, "has no SPACE: {dotted path: Ray Tune domain}")
    if not space.metric.startswith("valid/"):
        raise InputError(
            "METRIC", space.metric, "must be a validation metric, such as valid/HR@50: a search "
            "that looks at the test examples overstates its result",
        )  # fmt: skip
    base = space.base()
    for path, domain in space.domains.items():
        if not isinstance(domain, Domain):
            raise InputError(f"SPACE {path}", domain, "is not a Ray Tune domain")
        override(base, assignments({path: domain.sample()}))
