"""The endpoint as an application that Serve builds from a file (deploy/serve.yaml).

`jobs/serve.py` is for a person who waits for it; here Serve, or KubeRay, starts, checks and
replaces the endpoint.
"""

from __future__ import annotations

import os
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from ray import serve

from karma_ray.cluster.serving import Replicas, application_of
from karma_ray.errors import InputError
from karma_ray.serving.host import Options
from karma_ray.serving.live import check_source
from karma_ray.serving.precision import Precision
from karma_ray.serving.request_log import LogSettings


class ServiceArguments(BaseModel):
    """What stands under `args` in the file."""

    model_config = ConfigDict(extra="forbid")

    run: str
    """URI of a finished run or a live folder, which every node can read."""
    num_replicas: int = Field(default=1, ge=1)
    """Copies of decoder and index."""
    max_replicas: int | None = Field(default=None, ge=1)
    """If larger, copies are added up to this number by load, and removed again."""
    max_queued_requests: int | None = Field(default=None, ge=1)
    """Requests that may wait for a replica; further ones get the status 503. By default a replica
    takes as many as it answers in twice the time that it takes with sixteen clients."""
    compare: str | None = None
    """URI of a second run that the search page shows beside the first."""
    ranker: str | None = None
    """URI of a finished run of a ctr_ recipe, which orders candidates at `/v1/rank`."""
    precision: Precision = "auto"
    """In which the user decoder computes; `auto` is bfloat16 on a GPU and float32 on a CPU."""
    channels: Literal["auto", "blend", "dense"] = "auto"
    """Which lists answer recall: `dense` is the model alone, `blend` words, tastes and popularity
    too, `auto` whichever validation prefers."""
    log_requests: str | None = None
    """A file on the node of each replica, to which a JSON line is appended for each request; `-`
    is what a replica prints, which Ray keeps among its logs."""
    log_raw: bool = False
    """Write user ids and queries to that log as they are."""

    def log(self) -> LogSettings | None:
        """Return where requests are logged; raises InputError."""
        path = self.log_requests
        if path is None:
            if self.log_raw:
                raise InputError("log_raw", True, "needs log_requests")
            return None
        if path != "-" and not os.path.isabs(path):
            raise InputError("log_requests", path, "must be an absolute path, or -")
        return LogSettings(path, self.log_raw)


def application(given: dict[str, Any]) -> serve.Application:
    """Return the application of a run; raises InputError or SkewError on one that cannot serve.

    `given` are `ServiceArguments`, unread: Serve would read them by the annotation, but sees only
    the text of one.
    """
    arguments = ServiceArguments.model_validate(given)
    log = arguments.log()
    for source, ranker in ((arguments.run, arguments.ranker), (arguments.compare, None)):
        if source is not None:
            check_source(source, ranker)
    most = max(arguments.num_replicas, arguments.max_replicas or 0)
    replicas = Replicas(arguments.num_replicas, most)
    options = Options(
        arguments.compare, arguments.precision, log, arguments.ranker, arguments.channels
    )  # fmt: skip
    return application_of(arguments.run, replicas, arguments.max_queued_requests, options)
