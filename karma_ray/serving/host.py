"""The application in this process, behind uvicorn: a laptop, or one machine without Ray."""

from __future__ import annotations

import gc
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from karma_ray.errors import InputError
from karma_ray.serving.app import build_app
from karma_ray.serving.client import TOKEN
from karma_ray.serving.live import check_source
from karma_ray.serving.page.routes import SearchPage, shows_users
from karma_ray.serving.process import check_port, held_port
from karma_ray.serving.request_log import LogSettings
from karma_ray.serving.service import Service
from karma_ray.serving.slow_clients import TimedProtocol

SWITCH_INTERVAL_S = 0.0005
"""How long one thread may keep the other from running; Python's 5 ms would be most of a request."""
STOP_S = 5
"""Seconds in which requests in flight are answered when the process is asked to end."""
IDLE_S = 30
"""Seconds after which an idle connection is closed."""


def token_from_environment() -> str | None:
    """Return the bearer token that callers must send, if KARMA_RAY_TOKEN is set.

    Raises InputError on an empty one.
    """
    token = os.environ.get(TOKEN)
    if token is not None and not token.strip():
        raise InputError(TOKEN, "", "is set but empty; unset it to let everyone ask")
    return token


def curl_example(url: str, item_ids: list[str]) -> str:
    """Return a command to paste that sends a request with a history of `item_ids`."""
    body = {"query": "", "history": [{"item_id": i} for i in item_ids], "k": 10}
    return f"curl -s -X POST {url}/v1/recall -d {shlex.quote(json.dumps(body, ensure_ascii=False))}"


def settle() -> None:
    """Prepare this process, once all is loaded, for threads that share it and never wait long."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    # A full collection walks over every object of the loaded packages: half a second, in which
    # nobody is answered. What is there now will stay, so it need not be looked at again; an engine
    # that is replaced later holds no cycles and is freed all the same.
    gc.collect()
    gc.freeze()


@dataclass(frozen=True)
class Options:
    """What can be said of an endpoint beside what it serves and where it listens."""

    compare: str | None = None
    """A second run that the search page shows beside the first."""
    precision: str = "auto"
    """In which the user decoder computes; see `precision.py`."""
    log: LogSettings | None = None
    """Where requests are logged."""
    ranker: str | None = None
    """The run of a CTR model that orders candidates at `/v1/rank`."""
    channels: str = "auto"
    """Which lists answer: `dense`, `blend`, or `auto`, what validation prefers."""


PLAIN = Options()
"""Nothing beside."""


def load_app(run: str, host: str, options: Options, **loading: Any) -> FastAPI:
    """Load a finished run, or what a live folder names, and prepare this process for requests.

    `host` is the address that is listened on, which decides what the search page may show;
    `loading` goes to `Service.load`. Raises InputError, SkewError or KarmaRayError.
    """
    token, loading = token_from_environment(), {**loading, "precision": options.precision}
    loading["channels"] = options.channels
    if options.compare is not None:
        check_source(options.compare)  # fails here, not after the first run has been loaded
    service = Service.load(run, ranker=options.ranker, **loading)
    other = Service.load(options.compare, **loading) if options.compare is not None else None
    page = SearchPage(show_users=shows_users(host, token), other=other)
    app = build_app(service, token, page, options.log)
    settle()
    return app


def serve_here(
    run: str, host: str, port: int, on_ready: Callable[[str], None] | None = None,
    options: Options = PLAIN,
) -> None:  # fmt: skip
    """Serve a finished run, or a live folder, from this process until SIGINT or SIGTERM.

    Raises InputError, SkewError or KarmaRayError when a run or the port cannot be used.
    """
    check_port(port)
    # From before the model is loaded: that may take minutes, and would be in vain.
    with held_port(host, port):
        settings = uvicorn.Config(
            load_app(run, host, options), host, port, log_level="warning", access_log=False,
            server_header=False, timeout_keep_alive=IDLE_S, timeout_graceful_shutdown=STOP_S,
            http=TimedProtocol,
        )  # fmt: skip
        url = f"http://{host}:{port}"
        _Announced(settings, lambda: on_ready(url) if on_ready else None).run()


class _Announced(uvicorn.Server):
    """Says when the port is open."""

    def __init__(self, config: uvicorn.Config, announce: Callable[[], None]) -> None:
        super().__init__(config)
        self._announce = announce

    async def startup(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]
        await super().startup(sockets)  # type: ignore[arg-type]
        if self.started:
            self._announce()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop when requests in flight are answered; a second Ctrl-C does not wait for them.

        The base class also raises the signal again at the end, and the exit code would say so.
        """
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True
