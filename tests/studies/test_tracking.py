"""What a search and a study find is a run of its own in MLflow, beside their runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from karma_ray.artifacts import exists, read_json, write_json
from karma_ray.config import to_dict
from karma_ray.studies.ledger import Compared, Ledger, Measured
from karma_ray.studies.tracking import send_search, send_study
from tests.studies.searches import METRIC, search
from tests.studies.study_records import outcomes, write_record


def test_a_search_is_sent_with_its_winner_and_a_repetition_replaces_it(
    tmp_path: Path, mlflow_server: str
) -> None:
    import mlflow

    compared = Compared("HR@50", 10.0, 12.5, 2.5, (1.0, 4.0), "*")
    out, found = str(tmp_path / "search"), replace(
        search(), measured=Measured("003", (1, 2), (compared,))
    )  # fmt: skip
    Ledger(out).finish(found, "spaces/mine.py")
    write_json({}, f"{out}/report.html")
    for _ in range(2):
        send_search(found, "spaces/mine.py", out)
    client = mlflow.MlflowClient()
    (sent,) = client.search_runs([client.get_experiment_by_name("karma_ray").experiment_id])
    assert sent.info.run_id == read_json(f"{out}/mlflow.json")["run_id"]
    assert (sent.info.run_name, sent.info.status) == ("search", "FINISHED")
    assert sent.data.tags["kind"] == "search"
    rate = found.best.values["training.learning_rate"]
    assert float(sent.data.params["training.learning_rate"]) == rate
    assert sent.data.params["recipe"] == to_dict(found.config())["recipe"]
    assert "FloatDistribution" in sent.data.params["drawn/training.learning_rate"]
    at = METRIC.replace("@", "_at_")
    assert sent.data.metrics[f"best/{at}"] == 14.0
    assert sent.data.metrics["test/HR_at_50/difference"] == 2.5
    assert sent.data.metrics["trials/stopped_early"] == 2
    parts = {part.path for part in client.list_artifacts(sent.info.run_id)}
    assert parts == {"report.html", "best.json", "trials.json"}


def test_a_study_is_sent_with_its_report(tmp_path: Path, mlflow_server: str) -> None:
    import mlflow

    results = tmp_path / "results"
    for seed in (0, 1):
        write_record(results, "karma_text", seed, outcomes(2))
    (results / "report").mkdir()
    (results / "report" / "report.html").write_text("<html>")
    send_study(results)
    client = mlflow.MlflowClient()
    (sent,) = client.search_runs([client.get_experiment_by_name("karma_ray").experiment_id])
    assert sent.data.tags["kind"] == "study" and sent.data.params == {"data": "toy"}
    assert sent.data.metrics == {"records/toy": 2.0}
    assert [part.path for part in client.list_artifacts(sent.info.run_id)] == ["report"]


def test_without_a_server_nothing_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    send_search(search(), "spaces/mine.py", str(tmp_path))
    send_study(tmp_path)
    assert not exists(str(tmp_path / "mlflow.json"))
