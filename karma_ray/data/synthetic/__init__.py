"""The toy shop: a seeded generator of items, users, queries and clicks whose truth is known."""

from karma_ray.data.synthetic.config import ToyShopConfig
from karma_ray.data.synthetic.shop import ToyShop, make_toy_shop, write_toy_shop
from karma_ray.data.synthetic.truth import PersonaStates, ToyTruth

__all__ = [
    "PersonaStates",
    "ToyShop",
    "ToyShopConfig",
    "ToyTruth",
    "make_toy_shop",
    "write_toy_shop",
]
