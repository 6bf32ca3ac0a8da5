"""The endpoint: one Ray Serve deployment that contains the model and the index.

Encoder and index are in the same replica, because each hop between deployments costs milliseconds.
`build_app` is the whole HTTP interface and needs no cluster; Serve only hosts it.
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
from karma_ray.cluster.accelerators import share_of_gpus_up
from karma_ray.cluster.endpoint_process import held_port, raise_on_signals, run_until_signal
from karma_ray.cluster.session import connect, joins_a_cluster
from karma_ray.errors import InputError, KarmaRayError
from karma_ray.retrieval.encode import load_embeddings
from karma_ray.retrieval.requests import HistoryItem
from karma_ray.retrieval.retriever import Retriever, check_run

APPLICATION = "karma_ray"
MAX_K = 5000
"""Largest number of retrieved items; the paper measures HR@5000 (method 1.13)."""
MAX_ONGOING = 4
"""Requests in a replica at once: one is computed while the others are parsed and wait."""
MAX_QUEUED = 64
"""Requests that may wait for a replica; further ones get the status 503."""
RETRY_AFTER_S = 1.0
"""Value of `Retry-After` on a 503."""
STOP_LOCAL_S = 5.0
"""Seconds in which a local Ray must answer the last requests and end."""
STOP_CLUSTER_S = 30.0
"""Seconds in which a shared cluster must remove the application."""

ItemId = Annotated[str, Field(min_length=1, max_length=512)]
Query = Annotated[str | None, Field(max_length=4096)]


class _Body(BaseModel):
    # Unknown fields are refused, so that a misspelt `exclude_histroy` is not silently ignored.
    model_config = ConfigDict(extra="forbid")


class HistoryEntry(_Body):
    """One past click. Oldest first, or in any order if every entry has a timestamp."""

    item_id: ItemId
    query: Query = None
    timestamp: datetime | None = None


class _RequestBody(_Body):
    query: Query = None
    history: Annotated[list[HistoryEntry], Field(max_length=10_000)] = []
    user_id: str | None = None
    """Accepted for the caller's logs; the answer depends only on query and history."""

    def items(self) -> list[HistoryItem]:
        return [HistoryItem(e.item_id, e.query, _utc(e.timestamp)) for e in self.history]


class RecallRequest(_RequestBody):
    """The current query of a user, and past clicks."""

    k: Annotated[int, Field(ge=1, le=MAX_K)] = 10
    exclude_history: bool = False


class ScoreRequest(_RequestBody):
    """Candidates to score for a user."""

    item_ids: Annotated[list[ItemId], Field(min_length=1, max_length=20_000)]


class Item(BaseModel):
    """One retrieved item."""

    item_id: str
    score: float
    title: str


class Version(BaseModel):
    """Content hashes of the model and the index that answered."""

    model_config = ConfigDict(protected_namespaces=())

    model_version: str
    index_version: str


class RecallResponse(Version):
    """The best items, best first."""

    items: list[Item]
    ignored_item_ids: list[str]


class ScoreResponse(Version):
    """One score per requested item, in order; null for an unknown item."""

    scores: list[float | None]
    ignored_item_ids: list[str]


class _JsonBodies:
    """Reads every body as JSON, because `curl -d` without a header claims to send a form."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = [pair for pair in scope["headers"] if pair[0] != b"content-type"]
            scope = {**scope, "headers": [*headers, (b"content-type", b"application/json")]}
        await self.app(scope, receive, send)


class Health(BaseModel):
    """The answer once model and index are loaded."""

    status: str
    num_items: int


class Versions(Version):
    """The versions of the running endpoint."""

    karma_ray: str
    index_kind: str


def build_app(retriever: Retriever) -> FastAPI:
    """Build the HTTP application for a loaded retriever.

    Handlers are coroutines that compute directly: a replica has one compute thread, and the
    tokenizer must not be used by two threads at once.
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
        """Return the k best items of the whole catalogue for a query and a history."""
        answer = retriever.recall(body.query, body.items(), body.k, body.exclude_history)
        items = [Item(item_id=i.item_id, score=i.score, title=i.title) for i in answer.items]
        return RecallResponse(items=items, ignored_item_ids=answer.ignored_item_ids, **version)

    @app.post("/v1/score")
    async def score(body: ScoreRequest) -> ScoreResponse:
        """Score given candidates (pre-ranking) with the same scores that recall sorts by."""
        answer = retriever.score_items(body.query, body.items(), body.item_ids)
        return ScoreResponse(
            scores=answer.scores, ignored_item_ids=answer.ignored_item_ids, **version
        )

    @app.get("/v1/healthz")
    async def healthz() -> Health:
        """Return `ok` if requests are answered."""
        return Health(status="ok", num_items=retriever.index.num_items)

    @app.get("/v1/version")
    async def versions() -> Versions:
        """Return the content hashes of model and index."""
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
    """Serve a finished run; returns its base URL, or runs until Ctrl-C when `blocking`.

    `on_ready` is called with the URL once the endpoint answers. The run and the port are checked
    first, so that a missing part, a mismatch of model and index or a used port gives an error
    message instead of a replica that fails again and again. When `blocking`, SIGINT or SIGTERM
    ends this process. Raises KarmaRayError.
    """
    if not 0 < port < 65536:
        raise InputError("--port", port, "must lie between 1 and 65535")
    if num_replicas < 1:
        raise InputError("--replicas", num_replicas, "must be at least 1")
    check_run(run)
    load_embeddings(RunFolder(run).item_embeddings)  # fails here instead of in a replica
    # Replicas have another working directory, where a relative path would not be found.
    run = run if "://" in run else str(Path(run).resolve())
    url = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"

    def start() -> None:
        # In an existing cluster the head node opens the port, whichever node asks.
        with nullcontext() if joins_a_cluster() else held_port(host, port):
            connect()
            if blocking:
                raise_on_signals()
            _start(host, port, application_of(run, num_replicas, max_queued_requests))
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
    """Remove this application only; other applications of the cluster stay."""
    if ray.is_initialized():  # otherwise deleting would start Ray
        serve.delete(APPLICATION)
        ray.shutdown()


def curl_example(url: str, item_ids: list[str]) -> str:
    """Return a command to paste that sends a request with a history of `item_ids`."""
    body = {"query": "", "history": [{"item_id": i} for i in item_ids], "k": 10}
    return f"curl -s -X POST {url}/v1/recall -d {shlex.quote(json.dumps(body, ensure_ascii=False))}"


def application_of(run: str, num_replicas: int, max_queued_requests: int) -> serve.Application:
    """Return the Serve application of a finished run, a path or URI that every node can read."""

    def build() -> FastAPI:
        # Runs in the replica. Parallelism comes from replicas, with one thread each.
        torch.set_num_threads(1)
        return build_app(Retriever.load(run))

    deployment = serve.deployment(
        serve.ingress(build)(),
        name="retriever",
        num_replicas=num_replicas,
        max_ongoing_requests=MAX_ONGOING,
        max_queued_requests=max_queued_requests,
        backpressure_config=BackpressureConfig(status_code=503, retry_after_s=RETRY_AFTER_S),
        ray_actor_options={"num_cpus": 0.1, "num_gpus": share_of_gpus_up(num_replicas)},
    )
    return deployment.bind()


def _utc(moment: datetime | None) -> datetime | None:
    """Treat a time without a zone as UTC."""
    if moment is not None and moment.tzinfo is None:
        return moment.replace(tzinfo=UTC)
    return moment


async def _say_why(_: Request, error: Exception) -> JSONResponse:
    """Answer 500 with the error message, for instance if the model's output is not finite."""
    return JSONResponse({"detail": str(error)}, status_code=500)


async def _name_the_field(_: Request, error: Exception) -> JSONResponse:
    """Answer 422 without the refused value: it may be large, private, or not valid UTF-8."""
    assert isinstance(error, RequestValidationError)
    detail = [{name: e[name] for name in ("loc", "msg", "type")} for e in error.errors()]
    return JSONResponse({"detail": detail}, status_code=422)
