"""The data of commands without --data: the toy shop, generated once and kept in the cache."""

from __future__ import annotations

import logging

from karma_ray.artifacts import absolute, exists, join, locked, value_hash
from karma_ray.data.config import PrepareConfig
from karma_ray.data.synthetic.config import ToyShopConfig
from karma_ray.data.synthetic.shop import write_toy_shop
from karma_ray.data.visual import features_uri
from karma_ray.node_cache import complete_folder
from karma_ray.runs.features import FeaturesConfig, make_features
from karma_ray.runs.preparation import ensure_prepared

LOG = logging.getLogger(__name__)
CACHE = "runs/cache"
"""Folder that all runs share: the toy shop, pretrained and warmed-up weights, floors."""


def cache_beside(out: str) -> str:
    """Return the default cache of a run: `cache` beside a remote run folder, or else `CACHE`.

    The workers of a remote run are on machines that share no disk.
    """
    return join(out.rstrip("/").rpartition("/")[0], "cache") if "://" in out else CACHE


def toy_shop(cache: str = CACHE) -> str:
    """Return the toy shop, prepared and with visual features, so that every recipe runs on it."""
    shop = ToyShopConfig()
    folder = absolute(join(cache, f"toy_shop-{value_hash(vars(shop))}"))
    with locked(folder):
        if "://" not in folder:
            _make(folder, shop)
        elif not exists(join(features_uri(folder), "manifest.json")):
            with complete_folder(folder) as draft:
                _make(draft, shop)
    return folder


def _make(folder: str, shop: ToyShopConfig) -> None:
    if not exists(join(folder, "manifest.json")):
        LOG.info("toy shop: drawing items, people and their clicks")
        write_toy_shop(folder, shop)
    if not exists(join(features_uri(folder), "manifest.json")):
        ensure_prepared(folder, PrepareConfig())  # features are fitted on the training items
        make_features(folder, FeaturesConfig())
