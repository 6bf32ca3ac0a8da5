"""A CTR model trained by Ray Train's workers is that of one process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from karma_ray import recipes
from karma_ray.cluster.training import run_training
from karma_ray.config import override
from karma_ray.data.config import PrepareConfig
from karma_ray.data.synthetic.config import ToyShopConfig
from karma_ray.data.synthetic.shop import write_toy_shop
from karma_ray.runs.ctr import CtrStage, exposures_of
from karma_ray.runs.preparation import ensure_prepared
from karma_ray.training.checkpoints.checkpoint import load_weights


@pytest.mark.ray
def test_two_workers_learn_what_one_process_learns(ray_cluster: None, tmp_path: Path) -> None:
    shop = str(tmp_path / "shop")
    write_toy_shop(shop, ToyShopConfig(num_items=240, num_users=60))
    config = override(
        recipes.build("ctr_din"),
        ["training.batch_size=32", "ranking.epochs=0", "training.steps=8", "ranking.width=4"],
    )
    source = ensure_prepared(shop, PrepareConfig())
    stage = CtrStage(config, shop, exposures_of(config, source, str(tmp_path / "cache")))
    found = {}
    for workers in (0, 2):
        job = stage.job(str(tmp_path / str(workers)))
        job = replace(job, training=replace(job.training, num_workers=workers))
        summary = run_training(job, progress=False)
        found[workers] = stage.build()
        load_weights(summary["weights"], found[workers])
        assert summary["steps"] == 8 and "AUC" in summary["valid"]
    here, there = (model.state_dict() for model in found.values())
    for name, value in here.items():
        assert value.allclose(there[name], rtol=1e-3, atol=1e-5), name
