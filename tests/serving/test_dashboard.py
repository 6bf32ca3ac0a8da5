"""deploy/grafana and deploy/prometheus ask for what the endpoint measures, under its names."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from fastapi.testclient import TestClient

from karma_ray.ranking.config import RankingConfig
from karma_ray.serving.app import build_app
from karma_ray.serving.service import Service
from tests import tiny_ranker, tiny_run

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana/karma_ray.json").read_text())
RULES = yaml.safe_load((DEPLOY / "prometheus/alerts.yaml").read_text())["groups"][0]["rules"]
SCRAPES = yaml.safe_load((DEPLOY / "prometheus/prometheus.yaml").read_text())
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]] + [
    rule["expr"] for rule in RULES
]


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> str:
    """/metrics after a call of each kind."""
    root = tmp_path_factory.mktemp("measured")
    run = tiny_run.write_run(root)
    items = tiny_ranker.write_items(root)
    ranker = tiny_ranker.write_ranker(root, run, RankingConfig(family="din"), items)
    with TestClient(build_app(Service.load(run, ranker=ranker))) as client:
        body = {"query": "mug", "history": [{"item_id": "i3"}]}
        assert client.post("/v1/recall", json=body).status_code == 200
        assert client.post("/v1/rank", json=body).status_code == 200
        return client.get("/metrics").text


def names(text: str) -> set[str]:
    """Every name that a query may use; Prometheus makes three of a histogram's."""
    found = set()
    for name, kind in re.findall(r"^# TYPE (\w+) (\w+)$", text, re.MULTILINE):
        ends = ("_bucket", "_sum", "_count") if kind == "histogram" else ("",)
        found |= {name + end for end in ends}
    return found


def labels(text: str) -> dict[str, set[str]]:
    """The labels of every name."""
    return {
        name: set(re.findall(r'(\w+)="', given))
        for name, given in re.findall(r"^(\w+)\{(.*)\} ", text, re.MULTILINE)
    }


def asked(query: str) -> Iterator[tuple[str, set[str]]]:
    """Every name in a query, with the labels by which it is chosen or grouped."""
    groups = set(re.findall(r"\w+", ",".join(re.findall(r"by \(([^)]*)\)", query))))
    for name, chosen in re.findall(r"\b(karma_ray_\w+)(?:\{([^}]*)\})?", query):
        yield name, groups | set(re.findall(r"(\w+)!?=", chosen))


@pytest.mark.parametrize("query", QUERIES)
def test_a_query_asks_for_what_is_measured(measured: str, query: str) -> None:
    there, labelled = names(measured), labels(measured)
    used = list(asked(query))
    assert used and query.count("(") == query.count(")")
    for name, by in used:
        assert name in there
        assert by <= labelled.get(name, set())


def test_the_dashboard_shows_all_that_is_measured(measured: str) -> None:
    """A counter that nobody looks at is in vain."""
    shown = {name for query in QUERIES for name, _ in asked(query)}
    families = {re.sub("_(bucket|sum|count)$", "", name) for name in shown}
    kinds = re.findall(r"^# TYPE (\w+) (counter|gauge|histogram)$", measured, re.MULTILINE)
    assert families == {name for name, _ in kinds if not name.endswith("_created")}


def test_panels_have_places_of_their_own_and_a_source_that_is_chosen() -> None:
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in DASHBOARD["panels"]]
    assert len(set(places)) == len(places) == len({panel["id"] for panel in DASHBOARD["panels"]})
    (variable,) = DASHBOARD["templating"]["list"]
    assert variable["type"] == "datasource"
    for panel in DASHBOARD["panels"]:
        assert panel["datasource"] == {"type": "prometheus", "uid": f"${{{variable['name']}}}"}


def test_alerts_say_what_is_wrong_and_how_urgent_it_is() -> None:
    assert SCRAPES["rule_files"] == ["alerts.yaml"]
    for rule in RULES:
        assert rule["annotations"]["summary"].endswith(".")
        assert rule["labels"]["severity"] in ("page", "ticket")


def test_what_ray_gathers_has_the_names_of_the_queries() -> None:
    (relabel,) = SCRAPES["scrape_configs"][1]["metric_relabel_configs"]
    found = re.fullmatch(relabel["regex"], "ray_karma_ray_requests_total")
    assert found and relabel["replacement"] == "$1" and relabel["target_label"] == "__name__"
    assert found[1] == "karma_ray_requests_total"


def test_versions_of_arms_are_those_that_answer(tmp_path: Path) -> None:
    service = Service.load(tiny_run.write_run(tmp_path / "one"))
    other = Service.load(tiny_run.write_run(tmp_path / "two", seed=3))
    try:
        for arms in (service.arms, other.arms):
            service.swap(arms)
            shares = re.findall(r"^karma_ray_arm_share\{.*", service.measures.text().decode(), re.M)
            (line,) = shares
            version = arms.first.engine.version
            assert f'model_version="{version["model_version"]}"' in line and line.endswith(" 1.0")
    finally:
        service.close()
        other.close()
