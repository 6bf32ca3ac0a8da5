from __future__ import annotations

import time

import pytest

from karma_ray.cluster.occupancy import Occupancy, kind_of, occupancy, screen


@pytest.mark.parametrize(
    ("resources", "kind"),
    [
        ({"CPU": 8.0, "GPU": 1.0, "accelerator_type:A10G": 1.0}, "8 CPU, 1 GPU (A10G)"),
        ({"CPU": 16.0, "memory": 1e9, "node:10.0.0.1": 1.0}, "16 CPU"),
        ({"node:__internal_head__": 1.0}, "head"),
        ({"node:__internal_head__": 1.0, "CPU": 4.0}, "head, 4 CPU"),
    ],
)
def test_the_kind_of_a_machine_is_what_it_offers(resources: dict[str, float], kind: str) -> None:
    assert kind_of({"Resources": resources}) == kind


def test_the_screen_says_what_is_up_in_use_and_waited_for() -> None:
    found = Occupancy(
        nodes={"head": 1, "8 CPU, 1 GPU (A10G)": 2}, total={"CPU": 16.0, "GPU": 2.0},
        free={"CPU": 12.0, "GPU": 0.0}, jobs=["python jobs/train.py"],
        actors={("Worker", "8 CPU, 1 GPU (A10G)"): 2}, waiting={"1 CPU, 1 GPU": 2},
    )  # fmt: skip
    assert screen(found).splitlines() == [
        "Machines up: 2 x 8 CPU, 1 GPU (A10G); 1 x head.",
        "In use: 4 of 16 CPU, 2 of 2 GPU.",
        "Job: python jobs/train.py",
        "2 x Worker on 8 CPU, 1 GPU (A10G)",
        "Waited for: 2 x 1 CPU, 1 GPU.",
    ]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_cluster_shows_its_actors_and_the_demand_that_has_no_place() -> None:
    import ray

    @ray.remote(num_cpus=1)
    class Encoder:
        def ready(self) -> bool:
            return True

    working = Encoder.remote()
    assert ray.get(working.ready.remote())
    too_large = Encoder.options(num_cpus=99).remote()
    end = time.monotonic() + 60
    while "99 CPU" not in (found := occupancy()).waiting:
        assert time.monotonic() < end, found
        time.sleep(0.2)
    ray.kill(too_large)
    assert found.nodes == {"head, 8 CPU": 1}
    assert found.actors["Encoder", "head, 8 CPU"] == 1
    assert found.free["CPU"] <= found.total["CPU"] - 1 == 7
    ray.kill(working)
