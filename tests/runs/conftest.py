"""One small toy shop for every run of these tests; who changes a shop writes one of its own."""

from __future__ import annotations

import pytest

from karma_ray.data.synthetic.config import ToyShopConfig
from karma_ray.data.synthetic.shop import write_toy_shop


@pytest.fixture(scope="session")
def shop(tmp_path_factory: pytest.TempPathFactory) -> str:
    """240 items and 120 users; prepared by the first run that reads it."""
    folder = str(tmp_path_factory.mktemp("shop"))
    write_toy_shop(folder, ToyShopConfig(num_items=240, num_users=120))
    return folder
