"""A whole search on a store: its driver is killed, and the same command brings it to its end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from karma_ray.artifacts import exists, join, open_filesystem, read_bytes, read_json
from karma_ray.config import from_dict
from karma_ray.data.config import PrepareConfig
from karma_ray.data.synthetic.config import ToyShopConfig
from karma_ray.data.synthetic.shop import write_toy_shop
from karma_ray.runs.preparation import ensure_prepared
from karma_ray.studies.ledger import Ledger, Trial
from karma_ray.studies.records import read_records
from tests.cluster import nodes
from tests.cluster.stores import BUCKET, running_store
from tests.tiny_run import SMALL_STUDY

OUT = f"s3://{BUCKET}/search"
SPACE = """
from ray import tune

SPACE = {"objective.lambda_dec": tune.loguniform(0.01, 2.0)}
METRIC = "valid/HR@50"
BASE_RECIPE = "karma_text"
"""


def _command(folder: Path) -> list[str]:
    sets = [f"--set={field}" for field in (*SMALL_STUDY, "training.checkpoint_every=2")]
    return [
        sys.executable, "jobs/tune.py", str(folder / "space.py"), "--data", str(folder / "shop"),
        "--trials", "2", "--concurrent", "1", "--measure-seeds", "1", "--out", OUT, *sets,
    ]  # fmt: skip


def _modified(run: str) -> dict[str, object]:
    """When the files of a run were written."""
    fs, path = open_filesystem(run)
    fs.invalidate_cache()
    return {name: fs.info(name)["LastModified"] for name in fs.find(path)}


def _killed_after_one_trial(folder: Path, environment: Mapping[str, str]) -> Trial:
    """Kill a search whose second trial has started; returns the first one."""
    ledger = Ledger(OUT)

    def has_begun_the_second() -> bool:
        return [trial.ended == "unfinished" for trial in ledger.trials()] == [False, True]

    with open(folder / "first.log", "wb") as log:
        driver = subprocess.Popen(
            _command(folder), cwd=nodes.ROOT, env={**os.environ, **environment}, stdout=log,
            stderr=log,
        )  # fmt: skip
        try:
            nodes.wait(has_begun_the_second, driver, 300, "the second trial starts")
        finally:
            driver.send_signal(signal.SIGKILL)
            driver.wait()
    return ledger.trials()[0]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.fault
def test_a_search_on_a_store_outlives_its_driver_and_ends_with_the_best_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_toy_shop(str(tmp_path / "shop"), ToyShopConfig(num_items=240, num_users=60))
    ensure_prepared(str(tmp_path / "shop"), PrepareConfig())
    (tmp_path / "space.py").write_text(SPACE)
    port, log = nodes.free_port(), tmp_path / "head.log"
    with running_store(monkeypatch) as store, nodes.short_folder() as temp:
        environment = {**store.environment, "RAY_ADDRESS": f"127.0.0.1:{port}"}
        head = [*nodes.as_head(port, temp), "--num-cpus", "3"]
        with nodes.node(log, *head, environment=store.environment) as process:
            nodes.wait(lambda: nodes.started(log), process, 90, "the head starts")
            first = _killed_after_one_trial(tmp_path, environment)
            assert exists(join(OUT, "report.html")) and not exists(join(OUT, "best.json"))
            written = _modified(Ledger(OUT).run_of(first.name))
            done = subprocess.run(
                _command(tmp_path), cwd=nodes.ROOT, env={**os.environ, **environment},
                capture_output=True, text=True, check=False,
            )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "1 of 2 trials have ended already" in done.stderr
        assert _modified(Ledger(OUT).run_of(first.name)) == written
        trials = Ledger(OUT).trials()
        assert trials[0] == first and len(trials) == 2 and trials[1].ended != "unfinished"
        best = from_dict(read_json(join(OUT, "best.json"))).objective.lambda_dec
        assert best in [trial.values["objective.lambda_dec"] for trial in trials]
        # test examples decide nothing: only what is measured at the end has their metrics
        assert not any(exists(join(OUT, "trials", trial.name, "metrics.json")) for trial in trials)
        records = read_records(join(OUT, "measured"))
        assert {(r["row"][:5], r["seed"]) for r in records} == {("defau", 1), ("trial", 1)}
        assert all("HR@50" in record["metrics"] for record in records)
        page = read_bytes(join(OUT, "report.html")).decode()
        assert "Beside the default, on test" in page and "data:image/png;base64," in page
    assert "Measured on test with seed 1;" in done.stdout
    assert f"report  {OUT}/report.html" in done.stdout
