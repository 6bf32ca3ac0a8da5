"""Users are divided by nothing but their id and the experiment."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest

from karma_ray.errors import InputError
from karma_ray.serving.arms import Arm, Arms, check_shares, place_of

ROOT = Path(__file__).resolve().parents[2]
USERS = [f"user {n}" for n in range(20_000)]


def arms(*shares: float, split: str = "first") -> Arms:
    engine = cast(Any, object())
    others = [Arm(f"arm{n}", engine, share) for n, share in enumerate(shares)]
    return Arms([Arm("main", engine), *others], split)


def test_each_arm_has_its_share_of_users() -> None:
    found = [arms(0.1, 0.3).of(user).name for user in USERS]
    for name, share in (("main", 0.6), ("arm0", 0.1), ("arm1", 0.3)):
        # five standard deviations of a draw of 20,000 users
        deviation = 5 * (share * (1 - share) / len(USERS)) ** 0.5
        assert found.count(name) / len(USERS) == pytest.approx(share, abs=deviation)


def test_a_user_keeps_the_arm_in_every_process_and_when_the_share_grows() -> None:
    code = "from karma_ray.serving.arms import place_of; print(place_of('user 7', 'first'))"
    other = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert float(other.stdout) == place_of("user 7", "first")
    few, many = arms(0.1), arms(0.4)
    inside = [user for user in USERS if few.of(user).name == "arm0"]
    assert inside and all(many.of(user).name == "arm0" for user in inside)


def test_another_experiment_divides_the_users_anew() -> None:
    one, other = arms(0.5), arms(0.5, split="second")
    agree = sum(one.of(user).name == other.of(user).name for user in USERS) / len(USERS)
    assert agree == pytest.approx(0.5, abs=0.02)


def test_who_gives_no_name_meets_the_first_arm() -> None:
    assert arms(0.99).of(None).name == "main"


@pytest.mark.parametrize("shares", [[0.0], [1.0], [0.6, 0.4], [-0.1], [1.2]])
def test_shares_that_leave_nothing_are_refused(shares: list[float]) -> None:
    with pytest.raises(InputError, match="--share"):
        check_shares(shares)
    check_shares([])
