"""A run with low-rank adapters, from pretraining to a bundle that is measured again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from karma_ray import recipes
from karma_ray.artifacts import read_json
from karma_ray.config import override
from karma_ray.errors import InputError
from karma_ray.model.lora import is_low_rank, rank_of
from karma_ray.runs.continuation import noted_stage
from karma_ray.runs.pipeline import evaluate_run, train_run
from karma_ray.runs.stages import Stage, finished_stage

pytestmark = pytest.mark.usefixtures("blank_pictures")

SMALL = [
    "pretrain.steps=8", "warmup.steps=6", "training.steps=6", "training.batch_size=8",
    "training.report_every=3", "training.checkpoint_every=3", "training.num_workers=0",
    "training.threads_per_worker=1", "evaluation.max_examples=60",
]  # fmt: skip


def test_base_weights_stay_through_both_stages_and_the_run_measures_the_same_again(
    shop: str,
    tmp_path: Path,
) -> None:
    run, cache = (str(tmp_path / name) for name in ("run", "cache"))
    changes = [*SMALL, "model.peft=lora:4", "training.encoder_delay=0.5"]
    config = override(recipes.build("toy"), changes)
    with pytest.raises(InputError, match=r"model\.peft: 'lora:0'"):
        train_run(override(config, ["model.peft=lora:0"]), shop, run, cache=cache)
    metrics = train_run(config, shop, run, cache=cache)
    assert evaluate_run(run, cache=cache)[1] == pytest.approx(metrics, rel=1e-6)

    noted = read_json(f"{run}/start.json")
    stage = finished_stage(run, read_json(f"{run}/data.json")["uri"])
    trained = stage.build_trained().interest
    assert rank_of(trained.item_encoder.body) == rank_of(trained.user_decoder.body) == 4
    started = _started(run, stage)
    for part in ("item_encoder", "user_decoder"):
        first = load_file(f"{noted[part]}/model.safetensors")
        body = getattr(trained, part).body
        own = {n.replace("base_layer.", ""): v for n, v in body.state_dict().items()}
        for name, value in first.items():
            assert torch.equal(own[name], value), name
        low_rank = {n: v for n, v in body.named_parameters() if is_low_rank(n)}
        # The warm-up trained the decoder's; joint training, both (the encoder from step 3 on).
        before = dict(getattr(started, part).body.named_parameters())
        warmed = [bool(before[n].any()) for n in low_rank if "lora_B" in n]
        assert set(warmed) == {part == "user_decoder"}
        assert not [n for n, value in low_rank.items() if torch.equal(value, before[n])]
        assert "lora" not in " ".join(load_file(f"{run}/bundle/{part}/model.safetensors"))


def _started(run: str, stage: Stage):  # type: ignore[no-untyped-def]
    """The model that joint training began with."""
    from karma_ray.artifacts import RunFolder

    begun = noted_stage(RunFolder(run), stage.config, stage.items_uri)
    assert begun is not None
    return begun.build_joint().interest
