"""The handlers of the search page. They belong to it alone and are no part of the interface.

Everything but recall is computed in one thread of its own, one call after another.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
import re
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from karma_ray.errors import KarmaRayError
from karma_ray.retrieval.requests import Request as Asked
from karma_ray.serving import schemas
from karma_ray.serving.batching import Overloaded
from karma_ray.serving.guards import RETRY_AFTER_S
from karma_ray.serving.page.reference import reference_page
from karma_ray.serving.page.run_data import NO_DATA, RunData
from karma_ray.serving.page.thought import Thoughts, speaks
from karma_ray.serving.refusals import name_the_field
from karma_ray.serving.service import Service

LOG = logging.getLogger(__name__)
Answer = TypeVar("Answer")
Body = TypeVar("Body", bound=BaseModel)

MAX_WAITING = 16
"""Calls that may wait for the page's thread."""
NO_USERS = (
    "People of the test split are shown on 127.0.0.1, or to callers with a bearer token: "
    "others should not read what they clicked."
)


class PictureRequest(BaseModel):
    """Items whose pictures are wanted."""

    model_config = ConfigDict(extra="forbid")
    item_ids: Annotated[list[schemas.ItemId], Field(max_length=200)]


class UserRequest(BaseModel):
    """A person of the test split."""

    model_config = ConfigDict(extra="forbid")
    user_id: schemas.UserId


class SearchPage:
    """What the page shows beside recall, and the thread that computes it."""

    def __init__(
        self, run: str | None = None, *, show_users: bool = False, other: Service | None = None
    ) -> None:
        """Show what belongs to `run`; by default to the run that answers, also after a publication.

        `other` answers beside it, to compare the two.
        """
        self.other, self.show_users = other, show_users
        self._run = run
        self._data = RunData(run)
        self._thoughts: Thoughts | None = None
        self._thoughts_of: tuple[str, ...] = ()
        self._thread = ThreadPoolExecutor(1, "page")
        self._num_waiting = 0

    def data(self, service: Service) -> RunData:
        """Return what there is beside the run that answers now."""
        run = self._run or service.engine.run
        if run != self._data.run:
            self._data = RunData(run)
        return self._data

    async def compute(self, work: Callable[[], Answer]) -> Answer:
        """Return what `work` returns in the page's thread; raises Overloaded if many wait."""
        if self._num_waiting >= MAX_WAITING:
            raise Overloaded("the page has too many questions at once")
        self._num_waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        finally:
            self._num_waiting -= 1

    def about(self, service: Service) -> dict[str, Any]:
        """Return what the page can show, and why not the rest."""
        data = self.data(service)
        users = data.source is not None and self.show_users and bool(data.users)
        no_users = None if users else NO_USERS
        if data.source is None:
            no_users = NO_DATA
        elif self.show_users and not users:
            no_users = "The test split holds nobody with a history."
        other = None if self.other is None else RunData(self.other.engine.run).name
        return {
            "run": data.name, "num_items": service.num_items, "users": users, "no_users": no_users,
            "no_floors": data.no_floors, "pictures": data.thumbnails is not None,
            "other": other, "speaks": speaks(data.run), **service.engine.version,
        }  # fmt: skip

    def thought(self, asked: Asked, service: Service) -> str | None:
        """Return h_t as text if the run can say it; the decoder is loaded at the first question."""
        engine, run = service.engine, self.data(service).run
        if run is None or not speaks(run):
            return None
        wanted = (run, *engine.version.values())
        if self._thoughts is None or self._thoughts_of != wanted:
            self._thoughts = Thoughts(run, engine.retriever.table)
            self._thoughts_of = wanted
        return self._thoughts.of(asked)

    def close(self) -> None:
        """End the thread once it is idle, and the service of the other run."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        if self.other is not None:
            self.other.close()


def shows_users(host: str, token: str | None) -> bool:
    """Whether people's clicks may be shown: on this machine alone, or to callers with a token."""
    return token is not None or host in ("127.0.0.1", "localhost", "::1")


def add_page(app: FastAPI, service: Service, page: SearchPage) -> None:
    """Add the page at `/`, what it asks under `/page/`, and the calls for a reader at `/docs`."""
    content = (Path(__file__).parent / "search.html").read_bytes()
    headers = _headers(content)

    @app.get("/", include_in_schema=False)
    async def search_page() -> Response:
        return Response(content, media_type="text/html; charset=utf-8", headers=headers)

    @app.get("/docs", include_in_schema=False)
    async def reference() -> Response:
        html = reference_page(app.openapi()).encode()
        return Response(html, media_type="text/html; charset=utf-8", headers=_headers(html))

    @app.get("/page/about", include_in_schema=False)
    async def about() -> Response:
        return await _answered(page.compute(lambda: page.about(service)))

    @app.get("/page/users", include_in_schema=False)
    async def users() -> Response:
        return await _answered(page.compute(lambda: _users(page, service)))

    async def user(body: UserRequest) -> Any:
        return await page.compute(lambda: _user(page, service, body.user_id))

    async def pictures(body: PictureRequest) -> Any:
        return await page.compute(lambda: {"pictures": page.data(service).pictures(body.item_ids)})

    async def floors(body: schemas.RecallRequest) -> Any:
        asked = _asked(body)
        return await page.compute(
            lambda: page.data(service).floors(asked, body.k, body.exclude_history)
        )

    async def thought(body: schemas.RecallRequest) -> Any:
        asked = _asked(body)
        return await page.compute(lambda: {"text": page.thought(asked, service)})

    async def other(body: schemas.RecallRequest) -> Any:
        if page.other is None:
            raise KarmaRayError("no second run is served")
        return await page.other.recall(body)

    _add(app, "user", UserRequest, user)
    _add(app, "pictures", PictureRequest, pictures)
    for handle in (floors, thought, other):
        _add(app, handle.__name__, schemas.RecallRequest, handle)


def _add(
    app: FastAPI, name: str, body: type[Body], handle: Callable[[Body], Awaitable[Any]]
) -> None:
    async def call(request: Request) -> Response:
        try:
            parsed = body.model_validate_json(await request.body())
        except ValidationError as error:
            return name_the_field(error)
        return await _answered(handle(parsed))

    app.add_api_route(f"/page/{name}", call, methods=["POST"], include_in_schema=False)


async def _answered(answer: Awaitable[Any]) -> Response:
    try:
        return JSONResponse(await answer)
    except Overloaded as error:
        headers = {"retry-after": str(RETRY_AFTER_S)}
        return JSONResponse({"detail": str(error)}, 503, headers)
    except Exception:  # whatever a folder may hold, recall goes on, and no path is told
        LOG.exception("the search page has no answer")
        return JSONResponse({"detail": "this part of the page cannot be computed"}, 500)


def _asked(body: schemas.RecallRequest) -> Asked:
    return Asked(body.query, [entry.click() for entry in body.history or []])


def _users(page: SearchPage, service: Service) -> dict[str, Any]:
    found = page.data(service).users if page.show_users else {}
    return {
        "users": [
            {"user_id": user, "query": row["query"], "num_clicks": len(row["history_item_ids"])}
            for user, row in found.items()
        ]
    }


def _user(page: SearchPage, service: Service, user_id: str) -> dict[str, Any]:
    """Return a test example: what the model may read, and the item that was clicked next."""
    row = page.data(service).users.get(user_id) if page.show_users else None
    if row is None:
        return {"found": False}
    table = service.engine.retriever.table
    columns = (row["history_item_ids"], row["history_queries"], row["history_timestamps"])

    def titled(item_id: str) -> dict[str, Any]:
        place = table.row(item_id)
        return {"item_id": item_id, "title": table.titles[place] if place >= 0 else None}

    history = [
        {**titled(item_id), "query": query, "timestamp": at.isoformat() if at else None}
        for item_id, query, at in zip(*columns, strict=True)
    ]
    clicked = titled(row["positive_item_id"])
    return {"found": True, "query": row["query"], "history": history, "next": clicked}


def _headers(content: bytes) -> dict[str, str]:
    """Return headers that let a page run its own script and style, and no others."""

    def hashes(tag: str) -> str:
        parts = re.findall(rf"<{tag}>(.*?)</{tag}>".encode(), content, flags=re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(part).digest()).decode() for part in parts)
        return " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"

    policy = (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; "
        "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    return {
        "content-security-policy": policy, "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer", "cache-control": "no-cache",
    }  # fmt: skip
