"""`jobs/ablate.py --without-ray` where ray, faiss and polars cannot be imported."""

from __future__ import annotations

import multiprocessing
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs.ablate import main
from karma_ray.artifacts import read_lines
from karma_ray.data.config import PrepareConfig
from karma_ray.data.synthetic.config import ToyShopConfig
from karma_ray.data.synthetic.shop import write_toy_shop
from karma_ray.errors import KarmaRayError
from karma_ray.runs import stopping
from karma_ray.runs.pipeline import train_run
from karma_ray.runs.preparation import ensure_prepared
from karma_ray.studies.here import ThisMachine
from karma_ray.studies.plan import Data, planned
from karma_ray.studies.record_files import run_folder
from karma_ray.studies.records import read_records
from karma_ray.studies.rows import Row
from karma_ray.studies.trial import train_trial
from tests.tiny_run import SMALL_STUDY

ROOT = Path(__file__).resolve().parents[2]
SMALL = (*SMALL_STUDY, "training.threads_per_worker=1")


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return prepared data, as preparation alone needs polars."""
    folder = str(tmp_path_factory.mktemp("shop") / "toy")
    write_toy_shop(folder, ToyShopConfig(num_items=240, num_users=60))
    ensure_prepared(folder, PrepareConfig())
    return folder


def flags_of(shop: str, *flags: str) -> list[str]:
    """Flags of the job for one small study without Ray."""
    sets = [part for setting in SMALL for part in ("--set", setting)]
    return ["table1", "--data", shop, *flags, "--seeds", "1", "--results", "results",
            "--without-ray", *sets]  # fmt: skip


def ablate(shop: str, root: Path, *flags: str) -> str:
    """Run the job in `root`, where only this machine can compute; return what it prints."""
    absent = root / "absent"
    absent.mkdir(exist_ok=True)
    for package in ("ray", "faiss", "polars"):  # also found by the children of the job
        (absent / f"{package}.py").write_text(f"raise ImportError({package!r})")
    command = [sys.executable, str(ROOT / "jobs/ablate.py"), *flags_of(shop, *flags)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=root,
        env=os.environ | {"PYTHONPATH": str(absent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def losses(run: str) -> dict[int, float]:
    """Loss of the joint stage by step."""
    lines = [line for line in read_lines(f"{run}/metrics.jsonl") if line["stage"] == "joint"]
    return {line["step"]: line["loss/total"] for line in lines if "loss/total" in line}


def without_seconds(metrics: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in metrics.items() if name != "seconds"}


def test_a_study_without_ray_stops_goes_on_and_records_what_a_run_measures(
    shop: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = Data.open(shop)
    (trial,) = planned([Row("karma_text", "")], [0], data, SMALL)
    rows = ("--rows", "karma_text")
    monkeypatch.chdir(tmp_path)
    main(flags_of(shop, *rows, "--max-minutes", "0.0001"))
    assert "1 left: karma_text-seed0" in capsys.readouterr().out
    assert "1 made; 0 already there" in ablate(shop, tmp_path, *rows, "--concurrent", "1")
    (record,) = read_records(tmp_path / "results")
    assert record["name"] == trial.name and record["steps"] == 6 and not record["resumed"]
    assert record["peak_gib"]["host"] > 0.1 and record["device"] == "cpu"
    here = str(tmp_path / "here")
    metrics = train_run(trial.config, shop, here, cache=str(tmp_path / "runs/cache"))
    assert without_seconds(record["metrics"]) == without_seconds(metrics)
    assert losses(run_folder(trial, data, str(tmp_path / "runs/study"))) == losses(here)


@pytest.fixture
def signals() -> Iterator[None]:
    """Let signals stop this process as they stop a trial, and undo it."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    stopping.stop_on_signals()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    stopping.forget()


def test_a_run_that_is_told_to_stop_goes_on_to_the_result_of_one_that_is_not(
    shop: str, tmp_path: Path, signals: None
) -> None:
    (trial,) = planned([Row("action_only", "")], [0], Data.open(shop), SMALL)
    whole, cut, cache = (str(tmp_path / name) for name in ("whole", "cut", "cache"))

    def interrupt(step: int, metrics: object) -> None:
        signal.raise_signal(signal.SIGTERM)

    with pytest.raises(SystemExit) as ended:
        train_run(trial.config, shop, cut, on_validate=interrupt, cache=cache)
    assert ended.value.code == 128 + signal.SIGTERM
    assert [path.name for path in Path(cut, "checkpoints/joint").glob("step-*")] == ["step-0000003"]
    stopping.forget()
    made = train_trial(trial.config, shop, cut, cache)
    assert made["resumed"] and made["steps"] == 6
    expected = train_run(trial.config, shop, whole, cache=cache)
    assert without_seconds(made["metrics"]) == without_seconds(expected)
    assert losses(cut)[6] == losses(whole)[6]


def test_children_answer_fail_die_and_stop() -> None:
    machine = ThisMachine()
    answers = machine.start(pow, (2, 5), 1)
    fails = machine.start(int, ("told",), 1)
    dies = machine.start(os._exit, (3,), 1)
    sleeps = machine.start(time.sleep, (3600,), 1)
    waiting = [answers, fails, dies]
    while waiting:
        for task in machine.ended(waiting, 600):
            waiting.remove(task)
    assert machine.result(answers) == 32
    with pytest.raises(KarmaRayError, match=r"invalid literal.*told"):
        machine.result(fails)
    with pytest.raises(KarmaRayError, match="exit code 3"):
        machine.result(dies)
    ours, theirs = multiprocessing.Pipe(duplex=False)
    os.write(theirs.fileno(), struct.pack("!i", 9) + b"x")  # of an answer of nine bytes
    theirs.close()
    with pytest.raises(KarmaRayError, match="exit code 3"):
        machine.result(replace(dies, pipe=ours, is_over=False))
    assert machine.ended([sleeps], 0.0) == [] and machine.stop([sleeps]) == []
    assert not sleeps.process.is_alive()
