"""Keys of the environment stay there: nothing that a run writes or says holds them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import boto3
import pytest

from benchmarks.every_job import ROOT, settings
from karma_ray.data.synthetic.config import ToyShopConfig
from karma_ray.data.synthetic.shop import write_toy_shop
from tests.cluster.stores import BUCKET, running_store

PLANTED = {
    "AWS_ACCESS_KEY_ID": "AKIAPLANTEDKEY000001",
    "AWS_SECRET_ACCESS_KEY": "planted/secret+key+000002",
    "AWS_SESSION_TOKEN": "planted-session-000003",
    "HF_TOKEN": "hf_planted_000004",
    "MLFLOW_TRACKING_PASSWORD": "planted-password-000005",
}


def leaks(texts: Mapping[str, bytes]) -> list[str]:
    """Where a planted value stands, each with the name of its variable."""
    return [
        f"{place} holds {name}"
        for place, content in texts.items()
        for name, value in PLANTED.items()
        if value.encode() in content
    ]


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_planted_value_would_be_found(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(f'{{"key": "{PLANTED["HF_TOKEN"]}"}}')
    assert leaks(files_below(tmp_path)) == [f"{tmp_path / 'config.json'} holds HF_TOKEN"]


def test_a_run_on_s3_writes_and_says_nothing_of_its_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    write_toy_shop(str(data), ToyShopConfig(num_items=240, num_users=60))
    with running_store(monkeypatch) as store:
        command = [
            sys.executable, "-m", "karma_ray.runs", "--data", str(data),
            "--out", f"s3://{BUCKET}/runs/first", "--recipe", "karma_text",
            *settings("training.num_workers=0", "training.checkpoint_every=3"),
        ]  # fmt: skip
        environment = {**os.environ, **store.environment, **PLANTED, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr.decode()[-2000:]
        client = boto3.client("s3")
        written = {
            found["Key"]: client.get_object(Bucket=BUCKET, Key=found["Key"])["Body"].read()
            for page in client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET)
            for found in page.get("Contents", [])
        }
    assert {"runs/first/config.json", "runs/first/report/report.html"} <= set(written)
    said = {"stdout": done.stdout, "stderr": done.stderr}
    assert leaks({**written, **files_below(tmp_path), **said}) == []


def test_the_environment_of_workers_names_none_of_the_drivers_variables(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A runtime environment is shown by the job server and written to Ray's logs."""
    import ray

    from karma_ray.cluster.session import connect

    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    asked: dict[str, object] = {}
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: asked.update(options))
    connect()
    assert set(asked["runtime_env"]) == {"env_vars"}  # type: ignore[call-overload]
    assert leaks({"runtime environment": repr(asked).encode()}) == []
