"""The endpoint on Ray Serve: one deployment that contains the model and the index.

Decoder and index are in the same replica, because each hop between deployments costs milliseconds.
What several replicas must know of users is elsewhere (`clicks.py`).
The HTTP interface is `karma_ray.serving`; Serve only hosts it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import ray
from ray import serve
from ray.serve.config import BackpressureConfig, HTTPOptions, ProxyLocation

from karma_ray.artifacts import absolute
from karma_ray.cluster.accelerators import share_of_gpus_up
from karma_ray.cluster.clicks import SharedUsers, clicks_deployment
from karma_ray.cluster.measures import Mirror
from karma_ray.cluster.session import connect, joins_a_cluster
from karma_ray.errors import InputError, KarmaRayError
from karma_ray.retrieval.encode import load_embeddings
from karma_ray.serving.client import TOKEN
from karma_ray.serving.guards import RETRY_AFTER_S
from karma_ray.serving.host import IDLE_S, PLAIN, Options, load_app, token_from_environment
from karma_ray.serving.live import check_source
from karma_ray.serving.process import (
    check_port,
    free_port,
    held_port,
    raise_on_signals,
    run_until_signal,
)
from karma_ray.serving.slow_clients import CALLBACK

APPLICATION = "karma_ray"
MAX_QUEUED = 64
"""Requests that Serve lets wait for a replica unless told: the application refuses before."""
TARGET_ONGOING = 16
"""Requests in a replica at once, to which the number of replicas is fitted."""
GROW_AFTER_S, SHRINK_AFTER_S = 5.0, 60.0
"""Seconds for which more or fewer replicas must have been right."""
STOP_LOCAL_S = 5.0
"""Seconds in which a local Ray must answer the last requests and end."""
STOP_CLUSTER_S = 30.0
"""Seconds in which a shared cluster must remove the application."""


@dataclass(frozen=True)
class Replicas:
    """How many copies of decoder and index; by load between the two numbers."""

    fewest: int = 1
    most: int = 1

    @classmethod
    def parse(cls, text: str) -> Replicas:
        """Read `N` or `N-M`; raises InputError."""
        found = re.fullmatch(r"([1-9][0-9]*)(?:-([1-9][0-9]*))?", text)
        if found is None:
            raise InputError("--replicas", text, "must be a number, or two as in 1-4")
        fewest, most = int(found[1]), int(found[2] or found[1])
        if most < fewest:
            raise InputError("--replicas", text, "names fewer at most than at least")
        return cls(fewest, most)


def serve_run(
    run: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    replicas: Replicas = Replicas(),
    *,
    blocking: bool = False,
    max_queued_requests: int | None = None,
    on_ready: Callable[[str], None] | None = None,
    options: Options = PLAIN,
) -> str:
    """Serve a finished run or a live folder; returns its base URL, or runs until Ctrl-C.

    `on_ready` is called with the URL once the endpoint answers. The port and the run are checked
    first, so that a missing part, a mismatch of model and index or a used port gives an error
    message instead of a replica that fails again and again. When `blocking`, it runs until SIGINT
    or SIGTERM, which end this process. Raises KarmaRayError.
    """
    check_port(port)
    # Replicas have another working directory, where a relative path would not be found.
    run = absolute(run)
    options = _absolute(options)
    # In an existing cluster the head node opens the port, whichever node asks.
    reserved = nullcontext if joins_a_cluster() else partial(held_port, host, port)
    with reserved():
        for source, ranker in ((run, options.ranker), (options.compare, None)):
            if source is not None:  # fails here instead of in a replica
                load_embeddings(check_source(source, ranker).item_embeddings)
    url = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"

    def start() -> None:
        with reserved():
            proxy = port
            if not joins_a_cluster() and not ray.is_initialized():
                os.environ.update(CALLBACK)
                if replicas.most == 1:
                    os.environ.update(_direct(port))
                    proxy = free_port()
            connect()
            if blocking:
                raise_on_signals()
            application = application_of(run, replicas, max_queued_requests, options, host)
            _start(host, proxy, application)
        if on_ready is not None:
            on_ready(url)

    if blocking:
        run_until_signal(start, _take_down, STOP_CLUSTER_S if joins_a_cluster() else STOP_LOCAL_S)
    start()
    return url


def _absolute(options: Options) -> Options:
    """Return options whose runs are found from any working directory."""
    compare, ranker = (
        None if run is None else absolute(run) for run in (options.compare, options.ranker)
    )
    return replace(options, compare=compare, ranker=ranker)


def _direct(port: int) -> dict[str, str]:
    """Return the switches with which the only replica of a machine opens the port itself.

    Serve's proxy, a Python process that copies every request, costs three quarters of what a
    replica can answer (benchmarks/serve.py). It still runs, on another port of this machine.
    """
    return {
        "RAY_SERVE_ENABLE_DIRECT_INGRESS": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(port),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(port + 1),
        # A replica that replaces a lost one must get its port at once.
        "RAY_SERVE_PORT_QUARANTINE_S": "0",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
    }


def _start(host: str, port: int, application: serve.Application) -> None:
    quiet = {"log_level": "WARNING", "enable_access_log": False}
    serve.start(
        proxy_location=ProxyLocation.HeadOnly,
        http_options=HTTPOptions(host=host, port=port, keep_alive_timeout_s=IDLE_S),
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


def application_of(
    run: str,
    replicas: Replicas,
    max_queued_requests: int | None = None,
    options: Options = PLAIN,
    host: str = "",
) -> serve.Application:
    """Return the Serve application of a finished run, a path or URI that every node can read.

    `host` is the address that is listened on, which decides what the search page may show. Without
    `max_queued_requests` as many may wait as keep the time of each short (serving/batching.py).
    """
    needs_token = token_from_environment() is not None

    def build() -> Any:
        # Runs in the replica. The token is read there too, so that it is in no stored setting.
        if needs_token and token_from_environment() is None:
            raise InputError(TOKEN, "", "is set here but not where the replicas run; set it there")
        users = SharedUsers() if replicas.most > 1 else None
        app = load_app(run, host, options, users=users, max_waiting=max_queued_requests)
        if replicas.most > 1:
            Mirror(app.state.measures).start()
        return app

    scaling: dict[str, Any] = {"num_replicas": replicas.fewest}
    if replicas.most > replicas.fewest:
        scaling = {
            "autoscaling_config": {
                "min_replicas": replicas.fewest, "max_replicas": replicas.most,
                "target_ongoing_requests": TARGET_ONGOING,
                "upscale_delay_s": GROW_AFTER_S, "downscale_delay_s": SHRINK_AFTER_S,
            }
        }  # fmt: skip
    deployment = serve.deployment(
        serve.ingress(build)(),
        name="retriever",
        # The application refuses before this number is reached, and says so in fewer steps.
        max_ongoing_requests=2 * (max_queued_requests or MAX_QUEUED),
        max_queued_requests=max_queued_requests or MAX_QUEUED,
        backpressure_config=BackpressureConfig(status_code=503, retry_after_s=float(RETRY_AFTER_S)),
        ray_actor_options={"num_cpus": 1, "num_gpus": share_of_gpus_up(replicas.most)},
        **scaling,
    )
    return deployment.bind(*[clicks_deployment()] if replicas.most > 1 else [])
