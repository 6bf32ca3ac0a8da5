"""A driver on a Ray with GPUs in name only: `python -m tests.cluster.fake_gpus FOLDER RUN DATA`.

It trains on two of them, embeds the catalogue on them, and asks for one that never comes.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch.distributed
from ray._raylet import GcsClient
from ray.core.generated.autoscaler_pb2 import ClusterConfig, NodeGroupConfig
from torch import nn

from karma_ray.artifacts import join
from karma_ray.cluster import measuring
from karma_ray.cluster.accelerators import GPU, share_of_gpus_up, trial_resources
from karma_ray.cluster.elsewhere import run_elsewhere
from karma_ray.cluster.embedding import embed_items
from karma_ray.cluster.measuring import enlist_on_ray, measure_on_a_gpu
from karma_ray.cluster.supply import Reach, supply
from karma_ray.cluster.training import run_training
from karma_ray.cluster.waiting import telling
from karma_ray.model.device import using_gpus
from karma_ray.training.parallel import rank
from karma_ray.training.step import StepOutput
from tests.cluster import test_training as small
from tests.conftest import ENVIRONMENT, ROOT


def noting_step(folder: str, model: nn.Module, batch: Any, *_: object) -> StepOutput:
    """A step that notes what this worker was given."""
    facts = {
        "gpus": ray.get_runtime_context().get_accelerator_ids()["GPU"],
        "backend": torch.distributed.get_backend(),
        "device": next(model.parameters()).device.type,
    }
    Path(folder, f"worker-{rank()}.json").write_text(json.dumps(facts))
    return small._step(model, batch)


def given_gpus() -> dict[str, Any]:
    """What a measurement was given."""
    return {"gpus": ray.get_runtime_context().get_accelerator_ids().get("GPU", [])}


def note_gpus(folder: str) -> None:
    """Note how many GPUs a function of the driver was given elsewhere."""
    Path(folder, "elsewhere.json").write_text(f"{len(given_gpus()['gpus'])} of the GPUs")


def numbers(rank: int, count: int) -> Iterator[np.ndarray]:
    """What a process of an evaluation yields: its place."""
    yield np.array([rank, count])


def report_growth(gpus: int) -> None:
    """Say to Ray what an autoscaler would: nodes with `gpus` GPUs in all may be added."""
    config = ClusterConfig()
    for name, resources, most in (("head", {"CPU": 4, "GPU": 2}, 1), ("gpu", {"GPU": 1}, gpus)):
        config.node_group_configs.append(
            NodeGroupConfig(name=name, resources=resources, max_count=most)
        )
    client = GcsClient(ray.get_runtime_context().gcs_address)
    client.report_cluster_config(config.SerializeToString())


class Heard(logging.Handler):
    """Keeps the messages of the log."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def main(folder: str, run: str, data: str) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    heard = Heard()
    logging.getLogger("karma_ray").addHandler(heard)
    ray.init(
        num_cpus=4, num_gpus=2, include_dashboard=False, log_to_driver=False,
        object_store_memory=256 * 1024 * 1024, logging_level="warning",
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT), **ENVIRONMENT}},
    )  # fmt: skip
    job = small._job(Path(folder, "run"), small.write_rows(Path(folder)), num_workers=2, steps=4)
    run_training(replace(job, step=partial(noting_step, folder)), progress=False)
    embed_items(join(run, "bundle"), data, join(folder, "embedded"), part_items=16)
    while ray.available_resources().get("GPU", 0.0) < 2:  # the encoders are still ending
        time.sleep(0.2)
    assert share_of_gpus_up(3) == 0.5 and trial_resources(4) == (1, 0.5)
    assert len(measure_on_a_gpu(given_gpus)["gpus"]) == 1 and not given_gpus()["gpus"]
    with using_gpus(False):  # as a run with training.use_gpu=false
        embed_items(join(run, "bundle"), data, join(folder, "embedded_on_cpus"), part_items=16)
        assert not measure_on_a_gpu(given_gpus)["gpus"]
    run_elsewhere("noting", partial(note_gpus, folder), 1, 0.5)
    assert Path(folder, "elsewhere.json").read_text() == "1 of the GPUs"
    report_growth(3)
    assert supply().reach(GPU) == Reach(2, 3)
    measuring.GROWING_S = 10.0
    others = enlist_on_ray(numbers, 3, join(run, "bundle"), 3)
    assert [next(other).tolist() for other in others] == [[1, 2]]  # as no machine has come

    @ray.remote(num_gpus=3)
    def never() -> None: ...

    waiting = never.remote()
    with telling("a task", GPU, 3):
        while not any("a task: waiting for" in message for message in heard.messages):
            time.sleep(0.2)
    ray.cancel(waiting)
    ray.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
