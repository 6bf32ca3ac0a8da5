"""What a cluster has and could add, and the choice between GPUs and CPUs that follows from it."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from karma_ray.cluster import executor
from karma_ray.cluster.accelerators import CPU, GPU, Pool, encoders, training_on_gpus
from karma_ray.cluster.supply import NodeType, Reach, Supply, declared_types, of_ray_cluster
from karma_ray.errors import InputError
from karma_ray.model.device import using_gpus
from karma_ray.runs.executor import HERE
from karma_ray.training.config import TrainingConfig

LAPTOP = Supply([{"CPU": 4.0}])
HEAD = {"CPU": 8.0}
GROWING = Supply(
    [HEAD], [NodeType(HEAD, 1), NodeType({"CPU": 8, "GPU": 1}, 6), NodeType({"CPU": 16}, 4)], 9
)
TWO_GPUS = Supply([HEAD, {"CPU": 8.0, "GPU": 2.0}])


def training(workers: int, use_gpu: str = "auto", fewest: int = 0) -> TrainingConfig:
    return replace(TrainingConfig(), num_workers=workers, use_gpu=use_gpu, min_workers=fewest)  # type: ignore[arg-type]


def test_reach_counts_places_on_nodes_not_sums_of_resources() -> None:
    both = {"CPU": 3.0, "GPU": 1.0}
    apart = Supply([{"CPU": 8.0}, {"CPU": 2.0, "GPU": 4.0}])
    assert apart.reach(both) == Reach(0)
    assert TWO_GPUS.reach(both) == Reach(2)
    assert GROWING.reach(GPU) == Reach(0, 6)
    # The limit of nodes is spent where most fits: four of 16, then the five of 8 that remain.
    assert GROWING.reach(CPU) == Reach(8, 4 * 16 + 5 * 8 - 8)
    assert replace(GROWING, most_nodes=3).reach(GPU) == Reach(0, 3)
    assert replace(GROWING, nodes=[HEAD, {"CPU": 8, "GPU": 1}]).reach(GPU) == Reach(1, 5)


def test_the_cluster_file_of_the_project_declares_its_gpus() -> None:
    config = yaml.safe_load(Path(__file__).parents[2].joinpath("cluster.yaml").read_text())
    types, most = declared_types(config)
    gpus = sum(kind.most for kind in types if kind.resources.get("GPU"))
    assert gpus and Supply([HEAD], types, most).reach(GPU) == Reach(0, min(gpus, most))


def test_the_resource_of_kubernetes_declares_its_gpus_if_it_has_an_autoscaler() -> None:
    def group(**limits: str) -> dict[str, Any]:
        container = {"name": "ray", "resources": {"limits": limits, "requests": limits}}
        return {"rayStartParams": {}, "template": {"spec": {"containers": [container]}}}

    gpus = group(cpu="8", memory="32Gi", **{"nvidia.com/gpu": "1"})
    spec = {
        "enableInTreeAutoscaling": True,
        "headGroupSpec": group(cpu="4", memory="8Gi"),
        "workerGroupSpecs": [gpus | {"groupName": "gpu", "minReplicas": 0, "maxReplicas": 3}],
    }
    resource = {"metadata": {"name": "shop", "namespace": "default"}, "spec": spec}
    config = of_ray_cluster(resource)
    assert config is not None
    types, most = declared_types(config)
    assert Supply([{"CPU": 4.0}], types, most).reach(GPU | CPU) == Reach(0, 3)
    assert of_ray_cluster(resource | {"spec": spec | {"enableInTreeAutoscaling": False}}) is None


@pytest.mark.parametrize(
    ("found", "asked", "on_gpus", "sentence"),
    [
        (GROWING, training(4), True, "training on 4 GPUs: none are up, the autoscaler may add up "
         "to 6"),
        (TWO_GPUS, training(2), True, "training on 2 GPUs: 2 are up, the autoscaler may add none"),
        (TWO_GPUS, training(4, fewest=1), True, "training on 2 GPUs"),
        (TWO_GPUS, training(4), False, "training on CPUs: 2 GPUs are fewer than the 4 workers; "
         "--set training.num_workers=2 would use them"),
        (TWO_GPUS, training(2, "false"), False, "training on CPUs: training.use_gpu is false"),
        (LAPTOP, training(2), False, "training on CPUs: there is no GPU"),
    ],
)  # fmt: skip
def test_the_choice_follows_from_what_may_come_and_is_said(
    found: Supply, asked: TrainingConfig, on_gpus: bool, sentence: str,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    with caplog.at_level(logging.INFO):
        assert training_on_gpus(asked, found) is on_gpus
    (line,) = caplog.messages
    assert line.startswith(sentence)


def test_what_can_never_come_is_refused_with_what_there_is() -> None:
    with pytest.raises(InputError, match=r"training\.use_gpu: 'true' needs 4 GPUs.*2 are up"):
        training_on_gpus(training(4, "true"), TWO_GPUS)
    with pytest.raises(InputError, match=r"training\.use_gpu.*no GPU"):
        training_on_gpus(training(1, "true"), LAPTOP)
    with pytest.raises(InputError, match=r"training\.num_workers: 5 needs 5 CPUs.*4 are up"):
        training_on_gpus(training(5), LAPTOP)
    assert not training_on_gpus(training(5, fewest=4), LAPTOP)
    with using_gpus(False):
        assert encoders("embedding", 100, found=TWO_GPUS) == Pool(16, 0.0)
    with pytest.raises(InputError, match=r"--actors: 5 needs 5 CPUs"):
        encoders("embedding", 9, asked=5, found=LAPTOP)


def test_a_pool_has_an_encoder_for_each_gpu_or_core_that_the_work_can_fill() -> None:
    assert encoders("embedding", 100, found=GROWING) == Pool(6, 1.0)
    assert encoders("embedding", 3, found=GROWING) == Pool(3, 1.0)
    assert encoders("embedding", 1, found=LAPTOP) == Pool(1, 0.0)
    assert encoders("embedding", 100, found=LAPTOP) == Pool(4, 0.0)
    assert encoders("embedding", 100, asked=4, found=TWO_GPUS) == Pool(4, 0.5)
    small = Supply([{"CPU": 8.0, "memory": 10.0}])
    assert encoders("embedding", 100, memory=4.0, found=small) == Pool(2, 0.0)


@pytest.mark.parametrize(
    ("found", "elsewhere"),
    [
        (None, False),  # no cluster is joined
        (LAPTOP, False),
        (Supply([HEAD], [NodeType(HEAD, 1)]), False),
        (TWO_GPUS, True),
        (GROWING, True),
    ],
)
def test_small_models_are_trained_elsewhere_where_there_are_other_machines(
    found: Supply | None, elsewhere: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executor, "joins_a_cluster", lambda: found is not None)
    monkeypatch.setattr(executor, "connect", lambda: None)
    monkeypatch.setattr(executor, "supply", lambda: found)
    assert executor.on_other_machines() is (executor.ON_RAY if elsewhere else HERE)
