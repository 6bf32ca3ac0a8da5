"""Whatever a request holds, the endpoint answers it or says what is wrong with it.

Requests are drawn from the endpoint's own OpenAPI document, right and wrong ones, and each is sent
again broken in nine ways. KARMA_RAY_FUZZ sets how many of each call are drawn (25).
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import Iterator, Sequence

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import Case, GenerationMode

from karma_ray.ranking.config import RankingConfig
from karma_ray.serving.app import build_app
from karma_ray.serving.service import Service
from tests import tiny_ranker, tiny_run

ODD = (
    b"null", b"-1", b"1e999", b"NaN", b"9" * 400, b'"\\ud800"', b'""', b"[]", b"{}", b"[" * 5000,
    b"\xff", b"\x00", b'"9999-12-31T23:59:59+00:00"', b'"-271821-04-20"', b'"item_id":1,', b"true",
)  # fmt: skip
"""What parsers stumble over."""
NUM_BROKEN = 9
NUM_REQUESTS = int(os.environ.get("KARMA_RAY_FUZZ", "25"))


class Endpoint:
    """An application, and a client that asks it many things at once."""

    def __init__(self, service: Service, runner: asyncio.Runner) -> None:
        app = build_app(service)
        self.schema = schemathesis.openapi.from_dict(app.openapi())
        transport = httpx.ASGITransport(app)
        self._client = httpx.AsyncClient(transport=transport, base_url="http://endpoint")
        self._runner = runner

    def ask(self, path: str, bodies: Sequence[bytes]) -> list[httpx.Response]:
        async def all_at_once() -> list[httpx.Response]:
            return await asyncio.gather(*(self._client.post(path, content=b) for b in bodies))

        return self._runner.run(all_at_once())


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory) -> Iterator[Endpoint]:
    root = tmp_path_factory.mktemp("fuzz")
    run, config = tiny_run.write_run(root), RankingConfig(family="simtier", interest=True)
    ranker = tiny_ranker.write_ranker(root, run, config, tiny_ranker.write_items(root))
    service = Service.load(run, ranker=ranker)
    with asyncio.Runner() as runner:
        yield Endpoint(service, runner)
    service.close()


def broken(content: bytes) -> list[bytes]:
    """Return copies of a body that lack a part, have one twice, or an odd one in its place."""
    draw, found = random.Random(content), []
    for _ in range(NUM_BROKEN):
        begin = draw.randrange(len(content) + 1)
        end = min(len(content), begin + draw.choice((1, 4, 20, 200)))
        parts = [content[begin:end] * draw.choice((0, 2)), draw.choice(ODD), draw.choice(ODD)]
        found.append(content[:begin] + draw.choice(parts) + content[end:])
    return found


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
@pytest.mark.parametrize("path", ["recall", "score", "rank", "features", "events"])
def test_every_drawn_request_is_answered_or_named(endpoint: Endpoint, path: str, mode) -> None:
    operation = endpoint.schema[f"/v1/{path}"]["POST"]
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
        right = {200, 422} if mode.is_positive else {200, 400, 413, 422}
        bodies = [content, *broken(content)]
        for n, answer in enumerate(endpoint.ask(f"/v1/{path}", bodies)):
            statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
            # 503: a machine that other work holds up for 5 s.
            assert answer.status_code in (right if n == 0 else {200, 400, 413, 422}) | {503}, (
                bodies[n]
            )
            if answer.status_code == 422:
                assert all(error["loc"][0] == "body" for error in answer.json()["detail"])

    ask()
    print(path, mode.value, statuses, flush=True)
    assert sum(statuses.values()) >= min(NUM_REQUESTS, 10)
    assert statuses.get(200 if mode.is_positive else 422), statuses
