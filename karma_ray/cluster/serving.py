"""The endpoint on Ray Serve: one deployment that contains the model and the index.

Decoder and index are in the same replica, because each hop between deployments costs milliseconds.
The HTTP interface is `karma_ray.serving`; Serve only hosts it.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.config import BackpressureConfig, HTTPOptions, ProxyLocation

from karma_ray.cluster.accelerators import share_of_gpus_up
from karma_ray.cluster.session import connect, joins_a_cluster
from karma_ray.errors import InputError, KarmaRayError
from karma_ray.retrieval.encode import load_embeddings
from karma_ray.serving.app import build_app
from karma_ray.serving.guards import RETRY_AFTER_S
from karma_ray.serving.host import SWITCH_INTERVAL_S, token_from_environment
from karma_ray.serving.live import check_source
from karma_ray.serving.process import held_port, raise_on_signals, run_until_signal
from karma_ray.serving.request_log import LogSettings
from karma_ray.serving.service import MAX_WAITING, Service

APPLICATION = "karma_ray"
MAX_QUEUED = MAX_WAITING
"""Requests that may wait for a replica; further ones get the status 503."""
STOP_LOCAL_S = 5.0
"""Seconds in which a local Ray must answer the last requests and end."""
STOP_CLUSTER_S = 30.0
"""Seconds in which a shared cluster must remove the application."""


def serve_run(
    run: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    num_replicas: int = 1,
    *,
    blocking: bool = False,
    max_queued_requests: int = MAX_QUEUED,
    on_ready: Callable[[str], None] | None = None,
    log: LogSettings | None = None,
) -> str:
    """Serve a finished run or a live folder; returns its base URL, or runs until Ctrl-C.

    `on_ready` is called with the URL once the endpoint answers. The run and the port are checked
    first, so that a missing part, a mismatch of model and index or a used port gives an error
    message instead of a replica that fails again and again. When `blocking`, it runs until SIGINT
    or SIGTERM, which end this process. Raises KarmaRayError.
    """
    if not 0 < port < 65536:
        raise InputError("--port", port, "must lie between 1 and 65535")
    if num_replicas < 1:
        raise InputError("--replicas", num_replicas, "must be at least 1")
    load_embeddings(check_source(run).item_embeddings)  # fails here instead of in a replica
    # Replicas have another working directory, where a relative path would not be found.
    run = run if "://" in run else str(Path(run).resolve())
    url = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"

    def start() -> None:
        # In an existing cluster the head node opens the port, whichever node asks.
        with nullcontext() if joins_a_cluster() else held_port(host, port):
            connect()
            if blocking:
                raise_on_signals()
            _start(host, port, application_of(run, num_replicas, max_queued_requests, log))
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


def application_of(
    run: str, num_replicas: int, max_queued_requests: int, log: LogSettings | None = None
) -> serve.Application:
    """Return the Serve application of a finished run, a path or URI that every node can read."""

    def build() -> Any:
        # Runs in the replica. Parallelism comes from replicas, with one compute thread each.
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        return build_app(Service.load(run, max_waiting=max_queued_requests), token, log)

    token = token_from_environment()
    deployment = serve.deployment(
        serve.ingress(build)(),
        name="retriever",
        num_replicas=num_replicas,
        max_ongoing_requests=2 * max_queued_requests,
        max_queued_requests=max_queued_requests,
        backpressure_config=BackpressureConfig(status_code=503, retry_after_s=float(RETRY_AFTER_S)),
        ray_actor_options={"num_cpus": 0.1, "num_gpus": share_of_gpus_up(num_replicas)},
    )
    return deployment.bind()
