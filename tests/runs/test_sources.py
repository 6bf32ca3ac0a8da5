"""The data of a command without --data: every recipe finds what it needs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from karma_ray.artifacts import content_hash, join, read_manifest
from karma_ray.data.catalog import Catalog
from karma_ray.data.config import PrepareConfig
from karma_ray.data.prepared import PreparedData
from karma_ray.data.synthetic.config import ToyShopConfig
from karma_ray.data.visual import VisualFeatures, features_uri
from karma_ray.runs import sources
from karma_ray.runs.preparation import ensure_prepared
from karma_ray.runs.sources import toy_shop


def test_the_toy_shop_is_prepared_and_has_features_of_its_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = ToyShopConfig(num_items=240, num_users=60)
    monkeypatch.setattr(sources, "ToyShopConfig", lambda: small)
    folder = toy_shop(str(tmp_path))
    facts = read_manifest(features_uri(folder))
    assert facts["fitted_on"] == "training items" and facts["num_items"] == 240
    catalog = Catalog.load(folder)
    values, has_image = VisualFeatures.load(features_uri(folder), catalog).gather(np.arange(240))
    assert has_image.all() and values.std() > 0.5
    made = Path(features_uri(folder), "manifest.json").stat().st_mtime_ns
    assert toy_shop(str(tmp_path)) == folder
    assert Path(features_uri(folder), "manifest.json").stat().st_mtime_ns == made
    remote = toy_shop("memory://toy-shops")
    assert content_hash(join(remote, "sequences")) == content_hash(join(folder, "sequences"))
    assert ensure_prepared(remote, PrepareConfig()).facts == PreparedData.load(folder).facts
