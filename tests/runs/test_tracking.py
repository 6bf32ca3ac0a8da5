"""Runs in MLflow, with the real package and a server in a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from karma_ray import recipes
from karma_ray.artifacts import read_json, read_lines, write_json
from karma_ray.config import Config, override
from karma_ray.errors import InputError, KarmaRayError
from karma_ray.runs import tracking
from karma_ray.runs.tracking import send_run, tracked
from tests.tiny_run import SMALL_STUDY


def config() -> Config:
    return override(recipes.build("toy"), [*SMALL_STUDY])


def test_without_a_server_nothing_is_sent_or_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(tracking, "find_spec", lambda name: pytest.fail("looked for mlflow"))
    write_json({}, str(tmp_path / "config.json"))
    send_run(str(tmp_path), "FINISHED")
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_server_without_the_package_is_said(
    tmp_path: Path, mlflow_server: str, caplog, monkeypatch
) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    write_json({}, str(tmp_path / "config.json"))
    send_run(str(tmp_path), "FINISHED")
    assert "mlflow is not installed" in caplog.text


def test_a_run_is_sent_as_it_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[str, str]] = []
    monkeypatch.setattr(tracking, "send_run", lambda run, status: sent.append((run, status)))
    raised: list[BaseException | None] = [
        None, InputError("--out", "run"), KeyboardInterrupt(), KarmaRayError("disk"),
    ]  # fmt: skip

    @tracked
    def train(config: Config, data: str | None, out: str) -> dict[str, float]:
        if (error := raised.pop(0)) is not None:
            raise error
        return {"HR@50": 1.0}

    out = str(tmp_path / "run")
    assert train(config(), None, out) == {"HR@50": 1.0}
    for kind in (InputError, KeyboardInterrupt, KarmaRayError):
        with pytest.raises(kind):
            train(config(), None, out)
    assert sent == [(out, "FINISHED"), (out, "KILLED"), (out, "FAILED")]


def test_a_run_and_its_repetition_are_one_in_mlflow(
    shop: str, tmp_path: Path, mlflow_server: str, caplog
) -> None:
    import mlflow

    from karma_ray.runs.pipeline import train_run

    run = str(tmp_path / "search" / "first")
    metrics = train_run(config(), shop, run, cache=str(tmp_path / "cache"))
    assert "not in MLflow" not in caplog.text
    send_run(run, "FINISHED")
    client = mlflow.MlflowClient()
    (found,) = client.search_runs([client.get_experiment_by_name("karma_ray").experiment_id])
    assert found.info.run_id == read_json(f"{run}/mlflow.json")["run_id"]
    assert (found.info.run_name, found.info.status) == ("first", "FINISHED")
    assert found.data.tags["folder"].endswith("/search")
    assert found.data.params["training.steps"] == "6"
    assert found.data.metrics["final/HR_at_50"] == pytest.approx(metrics["HR@50"])
    curve = client.get_metric_history(found.info.run_id, "joint/loss/total")
    lines = [line for line in read_lines(f"{run}/metrics.jsonl") if line["stage"] == "joint"]
    assert [(m.step, m.value) for m in curve] == [(n["step"], n["loss/total"]) for n in lines]
    parts = {part.path for part in client.list_artifacts(found.info.run_id)}
    assert parts == {"report", "bundle"}
    kept = {part.path for part in client.list_artifacts(found.info.run_id, "bundle")}
    assert "bundle/manifest.json" in kept


def test_a_server_that_fails_does_not_end_the_run(tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "unknown://nowhere")
    write_json({}, str(tmp_path / "config.json"))
    send_run(str(tmp_path), "FINISHED")
    assert "the run is not in MLflow" in caplog.text
