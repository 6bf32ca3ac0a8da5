"""What a command without --data works on: the toy shop, made once and kept in the cache."""

from __future__ import annotations

import logging

from karma_ray.artifacts import absolute, exists, join, locked, value_hash
from karma_ray.data.sessions import PrepareConfig
from karma_ray.data.synthetic.config import ToyShopConfig
from karma_ray.data.synthetic.shop import write_toy_shop
from karma_ray.data.visual import features_uri
from karma_ray.runs.features import FeaturesConfig, make_features
from karma_ray.runs.preparation import ensure_prepared

LOG = logging.getLogger(__name__)
CACHE = "runs/cache"
"""What all runs share: the toy shop, pretrained and warmed-up weights, floors."""


def toy_shop(cache: str = CACHE) -> str:
    """The built-in data, prepared and with visual features, so that every recipe runs on it."""
    shop = ToyShopConfig()
    folder = absolute(join(cache, f"toy_shop-{value_hash(vars(shop))}"))
    with locked(folder):
        if not exists(join(folder, "manifest.json")):
            LOG.info("toy shop: drawing items, people and their clicks")
            write_toy_shop(folder, shop)
        if not exists(join(features_uri(folder), "manifest.json")):
            ensure_prepared(folder, PrepareConfig())  # they are fitted on the items of training
            make_features(folder, FeaturesConfig())
    return folder
