"""The HTTP interface, for any host: uvicorn, Ray Serve, or a test.

Handlers parse and write; everything else happens in the compute thread of a `Service`, so that
the event loop is always free to answer `/v1/healthz`.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, TypeAdapter, ValidationError

from karma_ray import __version__
from karma_ray.errors import InputError, KarmaRayError
from karma_ray.serving import schemas
from karma_ray.serving.batching import Overloaded
from karma_ray.serving.guards import RETRY_AFTER_S, Guards
from karma_ray.serving.page.routes import SearchPage, add_page
from karma_ray.serving.ranking import NotRanked
from karma_ray.serving.refusals import name_the_field
from karma_ray.serving.request_log import LogSettings, NamedRequests, RequestLog, facts_of
from karma_ray.serving.service import Facts, Service

Body = TypeVar("Body", bound=BaseModel)


def build_app(
    service: Service, token: str | None = None, page: SearchPage | None = None,
    log: LogSettings | None = None,
) -> FastAPI:  # fmt: skip
    """Build the application of a service.

    With a `token`, callers must send it as a bearer; with `log`, each request is logged. `page`
    says what the search page shows beside recall; by default nothing.
    """
    page = page or SearchPage()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()
        page.close()

    app = FastAPI(
        title="karma_ray", version=__version__, description="Personalized recall.",
        lifespan=lifespan, docs_url=None, redoc_url=None,
    )  # fmt: skip
    app.state.measures = service.measures  # for a host that gathers those of several processes
    app.add_middleware(Guards, token=token, is_full=lambda: service.is_full)
    opened = None if log is None else RequestLog(log, service.salt)
    app.add_middleware(NamedRequests, measures=service.measures, log=opened)
    app.add_exception_handler(KarmaRayError, _say_why)
    _add_calls(app, service)
    add_page(app, service, page)

    @app.get("/v1/healthz", response_model=schemas.Health)
    async def healthz() -> Response:
        """Return `ok` if requests are answered."""
        return JSONResponse({"status": "ok", "num_items": service.num_items})

    @app.get("/v1/version", response_model=schemas.Versions)
    async def versions() -> Response:
        """Return the content hashes of model and index."""
        live = service.arms
        first = live.first.engine
        arms = [{"arm": arm.name, "share": arm.share, **arm.engine.version} for arm in live.arms]
        found = {
            "index_kind": first.retriever.index.kind,
            "channels": "dense" if first.retriever.blended is None else "blend",
            "precision": first.precision,
            "ranker_version": None if first.ranker is None else first.ranker.version,
        }
        return JSONResponse({"karma_ray": __version__, **found, **first.version, "arms": arms})

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Return counters in the text format of Prometheus."""
        return Response(service.measures.text(), media_type="text/plain; version=0.0.4")

    return app


def _add_calls(app: FastAPI, service: Service) -> None:
    """Add what users ask. Bodies are parsed here, once, without FastAPI's intermediate steps."""
    add = _Calls(app, service)
    add(
        "/v1/recall", schemas.RecallRequest, schemas.RecallResponse, service.recall,
        "Return the k best items of the whole catalogue for a query and a history.",
    )  # fmt: skip
    add(
        "/v1/score", schemas.ScoreRequest, schemas.ScoreResponse, service.score,
        "Score given candidates (pre-ranking) by the model alone: by what recall sorts by, unless "
        "it blends several lists (`channels` of /v1/version).",
    )  # fmt: skip
    add(
        "/v1/rank", schemas.RankRequest, schemas.RankResponse, service.rank,
        "Order candidates, given ones or those of recall, by their chance of a click.",
    )  # fmt: skip
    add(
        "/v1/features", schemas.FeaturesRequest, schemas.FeaturesResponse, service.features,
        "Return similarities of candidates to the history, as features of a ranking model.",
    )  # fmt: skip
    add(
        "/v1/events", schemas.EventRequest, schemas.EventResponse, service.event,
        "Store a click of a user, for later requests of the user that send no history.",
    )  # fmt: skip


class _Calls:
    """Adds routes whose bodies and answers are typed."""

    def __init__(self, app: FastAPI, service: Service) -> None:
        self._app, self._service = app, service

    def __call__(
        self, path: str, body: type[Body], answer: type[Any],
        handle: Callable[[Body, Facts], Awaitable[Any]], summary: str,
    ) -> None:  # fmt: skip
        writer = TypeAdapter(answer)

        async def call(request: Request) -> Response:
            begin = time.perf_counter()
            status, facts = 500, facts_of(request.scope)  # what is our mistake counts as it is
            try:
                content = writer.dump_json(await handle(body.model_validate_json(
                    await request.body()
                ), facts))  # fmt: skip
                status = 200
                return Response(content, media_type="application/json")
            except ValidationError as error:
                status = 422
                return name_the_field(error)
            except Overloaded as error:
                status = 503
                headers = {"retry-after": str(RETRY_AFTER_S)}
                return JSONResponse({"detail": str(error)}, status, headers)
            except InputError as error:
                status = 422
                place = ["body", error.field]
                detail = [{"loc": place, "msg": error.problem, "type": "value_error"}]
                return JSONResponse({"detail": detail}, status)
            except NotRanked as error:
                status = 404
                return JSONResponse({"detail": str(error)}, status)
            except KarmaRayError as error:
                return await _say_why(request, error)
            finally:
                seconds, arm = time.perf_counter() - begin, facts.get("arm", "")
                self._service.measures.answered(path, status, seconds, arm)

        schema = {"required": True, "content": {"application/json": {
            "schema": _inlined(body.model_json_schema())}}}  # fmt: skip
        self._app.add_api_route(
            path, call, methods=["POST"], response_model=answer, description=summary,
            name=path.rsplit("/", 1)[-1], openapi_extra={"requestBody": schema},
            responses={
                422: {"description": "The body is wrong; `detail[].loc` names the field."},
                503: {"description": "Too many requests wait; see `Retry-After`."},
            },
        )  # fmt: skip


def _inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a JSON schema with its references replaced by what they name."""
    parts = schema.pop("$defs", {})
    text = json.dumps(schema)
    for name, part in parts.items():
        text = text.replace(json.dumps({"$ref": f"#/$defs/{name}"}), json.dumps(part))
    found: dict[str, Any] = json.loads(text)
    return found


async def _say_why(_: Request, error: Exception) -> JSONResponse:
    """Answer 500 with the error message, for instance if the model's output is not finite."""
    return JSONResponse({"detail": str(error)}, status_code=500)
