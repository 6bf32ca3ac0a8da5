"""The registry of importers, by the format names of `jobs/import_data.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from karma_ray.data.importers.amazon_industrial import import_amazon_industrial
from karma_ray.data.importers.amazon_reviews import import_amazon_reviews
from karma_ray.data.importers.hm import import_hm
from karma_ray.data.importers.jdsearch import import_jdsearch
from karma_ray.data.importers.kuaisearch import import_kuaisearch
from karma_ray.data.importers.mind import import_mind
from karma_ray.data.importers.movielens import import_movielens
from karma_ray.data.importers.online_retail import import_online_retail
from karma_ray.data.importers.retailrocket import import_retailrocket
from karma_ray.data.importers.toy_shop import import_toy_shop
from karma_ray.errors import InputError

IMPORTERS: dict[str, Callable[..., dict[str, Any]]] = {
    "hm": import_hm,
    "online_retail": import_online_retail,
    "amazon_industrial": import_amazon_industrial,
    "movielens": import_movielens,
    "kuaisearch": import_kuaisearch,
    "jdsearch": import_jdsearch,
    "mind": import_mind,
    "amazon_reviews_2023": import_amazon_reviews,
    "retailrocket": import_retailrocket,
    "toy_shop": import_toy_shop,
}
"""(src, out, seed=) -> manifest. The format `long` has further arguments and is separate."""

FORMATS = (*IMPORTERS, "long")


def importer(name: str) -> Callable[..., dict[str, Any]]:
    """Return the importer of a format; raises InputError that names all formats."""
    if name not in IMPORTERS:
        raise InputError("FORMAT", name, choices=FORMATS)
    return IMPORTERS[name]
