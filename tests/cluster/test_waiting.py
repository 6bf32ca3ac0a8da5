"""Searches and studies whose trials find no place say what they wait for."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from karma_ray.cluster import measuring
from karma_ray.cluster.study import RayMachine
from karma_ray.cluster.tuning import search
from karma_ray.cluster.waiting import need_of
from karma_ray.config import Config
from karma_ray.data.synthetic.config import ToyShopConfig
from karma_ray.data.synthetic.shop import write_toy_shop
from karma_ray.errors import InputError
from tests.cluster.test_tuning import STEPS, space

PATIENCE_S = 120.0
"""After which a test that is told nothing goes on, and fails."""


class Heard(logging.Handler):
    """Keeps what is said, and notices the first sentence about waiting."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []
        self.told = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())
        if "waiting for" in self.messages[-1]:
            self.told.set()


@pytest.fixture
def full_until_told(ray_cluster: None) -> Iterator[list[str]]:
    """What is logged about the cluster of the session, which is full until it is said to be."""
    from ray.util.placement_group import placement_group, remove_placement_group

    logger, heard = logging.getLogger("karma_ray.cluster.waiting"), Heard()
    taken = placement_group([{"CPU": 8}])
    assert taken.wait(PATIENCE_S)

    def release() -> None:
        heard.told.wait(PATIENCE_S)
        remove_placement_group(taken)

    releasing = threading.Thread(target=release)
    releasing.start()
    logger.addHandler(heard)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        yield heard.messages
    finally:
        logger.setLevel(level)
        logger.removeHandler(heard)
        heard.told.set()
        releasing.join()


@pytest.mark.ray
def test_a_search_says_what_its_trials_wait_for(full_until_told: list[str], tmp_path: Path) -> None:
    def at_once(config: Config, data: str | None, out: str, *, resume, on_validate) -> None:
        on_validate(config.training.steps, {"HR@50": 1.0})

    found = search(
        space(), space().base(), data=None, trials=1, out=str(tmp_path), train=at_once
    )  # fmt: skip
    assert found.best.step == STEPS
    assert "trials: waiting for 1 CPU: 8 in the cluster, 0 of them free" in full_until_told


@pytest.mark.ray
def test_a_search_makes_its_first_stages_where_a_trial_has_a_place(
    full_until_told: list[str], tmp_path: Path
) -> None:
    write_toy_shop(str(tmp_path / "shop"), ToyShopConfig(num_items=240, num_users=60))
    with pytest.raises(InputError) as raised:  # which is found before anything is trained
        search(
            space("valid/HR@7"), space().base(), data=str(tmp_path / "shop"), trials=1,
            out=str(tmp_path / "search"), cache=str(tmp_path / "cache"),
        )  # fmt: skip
    assert type(raised.value) is InputError and raised.value.value == "valid/HR@7"
    assert "first stages: waiting for 1 CPU: 8 in the cluster, 0 of them free" in full_until_told


@pytest.mark.ray
def test_an_evaluation_waits_for_places_but_goes_on_without_those_that_do_not_come(
    full_until_told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measuring._grow({"CPU": 4.0}, 2)
    assert "evaluation: waiting for 2 CPUs: 8 in the cluster, 0 of them free" in full_until_told
    monkeypatch.setattr(measuring, "GROWING_S", 1.0)
    measuring._grow({"CPU": 5.0}, 2)  # one of the two has never room


@pytest.mark.ray
def test_a_study_says_what_its_trials_wait_for(full_until_told: list[str]) -> None:
    def double(number: int) -> int:
        return 2 * number

    machine = RayMachine()
    task = machine.start(double, [7], 1)
    while not machine.ended([task], 5.0):
        pass
    assert machine.result(task) == 14
    machine.stop([])
    assert "trials: waiting for 8 CPUs: 8 in the cluster, 0 of them free" in full_until_told


def test_a_process_with_a_gpu_waits_for_that_and_another_for_its_cpus() -> None:
    assert need_of(2, 0.5) == {"GPU": 0.5} and need_of(2, 0) == {"CPU": 2}
