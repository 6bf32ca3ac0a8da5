"""Whatever a request holds, the endpoint answers it or says what is wrong with it.

Requests are drawn from the endpoint's own OpenAPI document, right and wrong ones.
KARMA_RAY_FUZZ sets how many of each call (25).
"""

from __future__ import annotations

import json
import os

import pytest
import schemathesis
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from schemathesis import Case, GenerationMode

from karma_ray.serving.app import build_app
from karma_ray.serving.service import Service
from tests import tiny_run

NUM_REQUESTS = int(os.environ.get("KARMA_RAY_FUZZ", "25"))


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    service = Service.load(tiny_run.write_run(tmp_path_factory.mktemp("fuzz")))
    with TestClient(build_app(service)) as found:
        yield found


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
@pytest.mark.parametrize("path", ["recall", "score", "features", "events"])
def test_every_drawn_request_is_answered_or_named(client, path: str, mode) -> None:
    schema = schemathesis.openapi.from_dict(client.get("/openapi.json").json())
    operation = schema[f"/v1/{path}"]["POST"]
    statuses: dict[int, int] = {}

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=NUM_REQUESTS, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    def ask(case: Case) -> None:
        try:
            content = json.dumps(case.body).encode()
        except (TypeError, ValueError):
            content = b"\xff\xfe" + repr(case.body).encode()
        answer = client.post(f"/v1/{path}", content=content)
        statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
        assert answer.status_code in ({200, 422} if mode.is_positive else {200, 400, 413, 422})
        if answer.status_code == 422:
            assert all(error["loc"][0] == "body" for error in answer.json()["detail"])

    ask()
    assert sum(statuses.values()) >= min(NUM_REQUESTS, 10)
    assert statuses.get(200 if mode.is_positive else 422), statuses
