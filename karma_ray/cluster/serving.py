"""The endpoint: one Ray Serve deployment that holds the model and the index.

Encoder and index share a replica because every hop between deployments costs milliseconds.
`build_app` is the whole HTTP surface and needs no cluster; Serve only hosts it.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import ray
import torch
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve.config import BackpressureConfig, HTTPOptions, ProxyLocation
from starlette.types import ASGIApp, Receive, Scope, Send

from karma_ray import __version__
from karma_ray.artifacts import RunFolder
from karma_ray.cluster.endpoint_process import held_port, raise_on_signals, run_until_signal
from karma_ray.cluster.session import connect, joins_a_cluster
from karma_ray.errors import InputError, KarmaRayError
from karma_ray.retrieval.encode import load_embeddings
from karma_ray.retrieval.requests import HistoryItem
from karma_ray.retrieval.retriever import Retriever, check_run

APPLICATION = "karma_ray"
MAX_K = 5000
"""Deepest recall; the paper measures HR@5000 (method 1.13)."""
MAX_ONGOING = 4
"""Requests a replica holds at once: one computes, the others are parsed and waiting."""
MAX_QUEUED = 64
"""Requests that may wait in front of the replicas; further ones get 503."""
RETRY_AFTER_S = 1.0
"""Value of `Retry-After` on a 503."""
STOP_LOCAL_S = 5.0
"""Seconds that Ray of our own has to answer the last requests and end."""
STOP_CLUSTER_S = 30.0
"""Seconds that a cluster which goes on has to take the application down."""

ItemId = Annotated[str, Field(min_length=1, max_length=512)]
Query = Annotated[str | None, Field(max_length=4096)]


class _Body(BaseModel):
    # An unknown field is refused: a misspelt `exclude_histroy` must not be silently ignored.
    model_config = ConfigDict(extra="forbid")


class HistoryEntry(_Body):
    """One past click; oldest first, or in any order when every entry has a timestamp."""

    item_id: ItemId
    query: Query = None
    timestamp: datetime | None = None


class _RequestBody(_Body):
    query: Query = None
    history: Annotated[list[HistoryEntry], Field(max_length=10_000)] = []
    user_id: str | None = None
    """Accepted for the caller's logs; the answer depends on query and history only."""

    def items(self) -> list[HistoryItem]:
        return [HistoryItem(e.item_id, e.query, _utc(e.timestamp)) for e in self.history]


class RecallRequest(_RequestBody):
    """What a user asks now and what they clicked before."""

    k: Annotated[int, Field(ge=1, le=MAX_K)] = 10
    exclude_history: bool = False


class ScoreRequest(_RequestBody):
    """Candidates to be scored for a user."""

    item_ids: Annotated[list[ItemId], Field(min_length=1, max_length=20_000)]


class Item(BaseModel):
    """One recalled item."""

    item_id: str
    score: float
    title: str


class Version(BaseModel):
    """Content hashes of what answered."""

    model_config = ConfigDict(protected_namespaces=())

    model_version: str
    index_version: str


class RecallResponse(Version):
    """The best items, best first."""

    items: list[Item]
    ignored_item_ids: list[str]


class ScoreResponse(Version):
    """One score per asked item, in order; null where the item is unknown."""

    scores: list[float | None]
    ignored_item_ids: list[str]


class _JsonBodies:
    """Read every body as JSON: `curl -d` without a header says it sends a form."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = [pair for pair in scope["headers"] if pair[0] != b"content-type"]
            scope = {**scope, "headers": [*headers, (b"content-type", b"application/json")]}
        await self.app(scope, receive, send)


class Health(BaseModel):
    """Answered once model and index are loaded."""

    status: str
    num_items: int


class Versions(Version):
    """What runs here."""

    karma_ray: str
    index_kind: str


def build_app(retriever: Retriever) -> FastAPI:
    """The HTTP surface over a loaded retriever.

    Handlers are coroutines that compute in place: a replica has one compute thread, and the
    tokenizer may not be entered by two threads at once.
    """
    app = FastAPI(title="karma_ray", version=__version__, description="Personalized recall.")
    app.add_exception_handler(RequestValidationError, _name_the_field)
    app.add_exception_handler(KarmaRayError, _say_why)
    app.add_middleware(_JsonBodies)
    version = {
        "model_version": retriever.model_version,
        "index_version": retriever.index_version,
    }

    @app.post("/v1/recall")
    async def recall(body: RecallRequest) -> RecallResponse:
        """The k best items of the whole catalogue for a query and a history."""
        answer = retriever.recall(body.query, body.items(), body.k, body.exclude_history)
        items = [Item(item_id=i.item_id, score=i.score, title=i.title) for i in answer.items]
        return RecallResponse(items=items, ignored_item_ids=answer.ignored_item_ids, **version)

    @app.post("/v1/score")
    async def score(body: ScoreRequest) -> ScoreResponse:
        """Scores of given candidates (pre-ranking): the same numbers that recall sorts by."""
        answer = retriever.score_items(body.query, body.items(), body.item_ids)
        return ScoreResponse(
            scores=answer.scores, ignored_item_ids=answer.ignored_item_ids, **version
        )

    @app.get("/v1/healthz")
    async def healthz() -> Health:
        """Whether requests are answered."""
        return Health(status="ok", num_items=retriever.index.num_items)

    @app.get("/v1/version")
    async def versions() -> Versions:
        """Content hashes of model and index."""
        return Versions(karma_ray=__version__, index_kind=retriever.index.kind, **version)

    return app


def serve_run(
    run: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    num_replicas: int = 1,
    *,
    blocking: bool = False,
    max_queued_requests: int = MAX_QUEUED,
    on_ready: Callable[[str], None] | None = None,
) -> str:
    """Serve a finished run; returns its base URL, or stays until Ctrl-C when `blocking`.

    `on_ready` is called with the URL once it answers. The run and the port are checked here
    first, so that a missing part, a skew between model and index or a port that is held is an
    error message and not a replica that keeps dying. When `blocking`, SIGINT or SIGTERM ends
    this process. Raises KarmaRayError.
    """
    if not 0 < port < 65536:
        raise InputError("--port", port, "must lie between 1 and 65535")
    if num_replicas < 1:
        raise InputError("--replicas", num_replicas, "must be at least 1")
    check_run(run)
    load_embeddings(RunFolder(run).item_embeddings)  # refused here, not in a dying replica
    # Replicas start in a folder of their own, so a relative path would not be found there.
    run = run if "://" in run else str(Path(run).resolve())
    url = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"

    def start() -> None:
        # Of a cluster that runs already, the port is opened by the head node, whoever asks.
        with nullcontext() if joins_a_cluster() else held_port(host, port):
            connect()
            if blocking:
                raise_on_signals()
            _start(host, port, _application(run, num_replicas, max_queued_requests))
        if on_ready is not None:
            on_ready(url)

    if blocking:
        run_until_signal(start, _take_down, STOP_CLUSTER_S if joins_a_cluster() else STOP_LOCAL_S)
    start()
    return url


def _start(host: str, port: int, application: serve.Application) -> None:
    quiet = {"log_level": "WARNING", "enable_access_log": False}
    serve.start(
        proxy_location=ProxyLocation.HeadOnly,
        http_options=HTTPOptions(host=host, port=port),
        logging_config=quiet,
    )
    try:
        serve.run(application, name=APPLICATION, route_prefix="/", logging_config=quiet)
    except RuntimeError as error:
        raise KarmaRayError(f"the endpoint did not start: {error}") from None


def _take_down() -> None:
    """Only this application: what else runs on the cluster goes on."""
    if ray.is_initialized():  # deleting would start Ray when the signal came before it was up
        serve.delete(APPLICATION)
        ray.shutdown()


def curl_example(url: str, item_ids: list[str]) -> str:
    """A command that can be pasted, asking with a history of `item_ids`."""
    body = {"query": "", "history": [{"item_id": i} for i in item_ids], "k": 10}
    return f"curl -s -X POST {url}/v1/recall -d {shlex.quote(json.dumps(body, ensure_ascii=False))}"


def _application(run: str, num_replicas: int, max_queued_requests: int) -> serve.Application:
    def build() -> FastAPI:
        # Runs in the replica: replicas are the unit of parallelism, one thread each.
        torch.set_num_threads(1)
        return build_app(Retriever.load(run))

    deployment = serve.deployment(
        serve.ingress(build)(),
        name="retriever",
        num_replicas=num_replicas,
        max_ongoing_requests=MAX_ONGOING,
        max_queued_requests=max_queued_requests,
        backpressure_config=BackpressureConfig(status_code=503, retry_after_s=RETRY_AFTER_S),
        ray_actor_options={"num_cpus": 0.1},
    )
    return deployment.bind()


def _utc(moment: datetime | None) -> datetime | None:
    """A time without a zone is taken as UTC."""
    if moment is not None and moment.tzinfo is None:
        return moment.replace(tzinfo=UTC)
    return moment


async def _say_why(_: Request, error: Exception) -> JSONResponse:
    """500 with the sentence, as a model whose answer is not finite has no items to name."""
    return JSONResponse({"detail": str(error)}, status_code=500)


async def _name_the_field(_: Request, error: Exception) -> JSONResponse:
    """422 without the refused value: it may be large, private, or not even valid UTF-8."""
    assert isinstance(error, RequestValidationError)
    detail = [{name: e[name] for name in ("loc", "msg", "type")} for e in error.errors()]
    return JSONResponse({"detail": detail}, status_code=422)
