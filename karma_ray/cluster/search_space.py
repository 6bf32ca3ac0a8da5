"""Search spaces of `tune_spaces/`: drawn fields, the maximised metric and fixed fields.

What is wrong with a space is said before the first trial starts: every choice and both ends of
every range are tried in the configuration.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from optuna.distributions import distribution_to_json
from ray.tune.search.optuna import OptunaSearch
from ray.tune.search.sample import Categorical, Domain, Float, Integer

from karma_ray import pretrained, recipes
from karma_ray.artifacts import exists
from karma_ray.config import Config, assigned, override
from karma_ray.data.visual import features_uri
from karma_ray.errors import InputError
from karma_ray.studies.ledger import assignments

NULLS: Mapping[str, tuple[object, ...]] = {
    "model.decodability.recon_detach_h": (True,),
    "model.decodability.recon_text": ("shuffled",),
}
"""Values of null controls: they show what a gain is due to, so a search must not choose them."""
VISUAL = ("objective.lambda_img", "model.imagery.")
"""Beginnings of the fields that act on pictures alone."""


@dataclass(frozen=True)
class Space:
    """The content of a file of `tune_spaces/`."""

    path: str
    domains: Mapping[str, Domain]
    metric: str
    base_recipe: str
    fixed: tuple[str, ...]
    without_images: str = ""
    """The base recipe on data without visual features, where visual fields are not drawn."""

    def suited(self, data: str) -> Space:
        """Return the space for a data folder."""
        if not self.without_images or exists(features_uri(data)):
            return self
        drawn = {p: domain for p, domain in self.domains.items() if not p.startswith(VISUAL)}
        return replace(self, base_recipe=self.without_images, domains=drawn)

    def distributions(self) -> dict[str, str]:
        """Return Optuna's distribution of every drawn field, as JSON."""
        found = OptunaSearch.convert_search_space(dict(self.domains))
        return {path: distribution_to_json(distribution) for path, distribution in found.items()}

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
    fixed = getattr(module, "FIXED", ())
    if not isinstance(fixed, tuple | list):
        told = "is not a list of settings, such as ('training.steps=400',)"
        raise InputError("FIXED", fixed, told)
    space = Space(
        path=path,
        domains=getattr(module, "SPACE", {}),
        metric=getattr(module, "METRIC", ""),
        base_recipe=getattr(module, "BASE_RECIPE", "toy"),
        fixed=tuple(fixed),
        without_images=getattr(module, "WITHOUT_IMAGES", ""),
    )
    _check(space)
    if space.without_images:
        _check(replace(space, base_recipe=space.without_images))
    return space


def check_trained(field: str, recipe: str) -> None:
    """Raise InputError unless a recipe exists and trains a model that retrieves."""
    if recipe not in recipes.TRAINED:
        problem = "trains nothing" if recipe in recipes.names() else "is not valid"
        if recipe in recipes.RANKERS:
            problem = (
                "trains a ranking model, which is not searched for: trials share a warm-up and "
                "are compared by metrics of retrieval"
            )
        raise InputError(field, recipe, problem, choices=list(recipes.TRAINED))


def _check(space: Space) -> None:
    if not isinstance(space.domains, dict) or not space.domains:
        raise InputError("SPACE", space.path, "has no SPACE: {dotted path: Ray Tune domain}")
    if not space.metric.startswith("valid/"):
        raise InputError(
            "METRIC", space.metric, "must be a validation metric, such as valid/HR@50: a search "
            "that looks at the test examples overstates its result",
        )  # fmt: skip
    check_trained("BASE_RECIPE", space.base_recipe)
    base = space.base()
    for path, domain in space.domains.items():
        if not isinstance(domain, Domain):
            raise InputError(f"SPACE {path}", domain, "is not a Ray Tune domain")
        try:
            OptunaSearch.convert_search_space({path: domain})
        except ValueError as error:
            told = f"is a domain from which Optuna cannot draw ({error})"
            raise InputError(f"SPACE {path}", str(domain.domain_str), told) from error
        for value in _extremes(domain):
            if value in NULLS.get(path, ()):
                problem = "is a null control, which a search must not choose; leave it out"
                raise InputError(f"SPACE {path}", value, problem)
            try:
                override(base, assignments({path: value}))
            except InputError as error:
                if error.field.startswith("--set"):  # it names an unknown field
                    raise
                raise InputError(f"SPACE {path}", value, f"cannot be set: {error}") from error


def _extremes(domain: Domain) -> list[Any]:
    """Return every choice, or the smallest and the largest number, that can be drawn."""
    if isinstance(domain, Categorical):
        return list(domain.categories)
    if isinstance(domain, Integer):
        return [domain.lower, domain.upper if hasattr(domain.sampler, "q") else domain.upper - 1]
    if isinstance(domain, Float):
        # Without a quantum the upper end is not drawn.
        upper = domain.upper
        last = upper if hasattr(domain.sampler, "q") else float(np.nextafter(upper, domain.lower))
        return [domain.lower, last]
    return [domain.sample()]
