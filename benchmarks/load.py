"""Load on an HTTP endpoint, from a process of its own: requests per second and latencies.

    python benchmarks/load.py URL REQUESTS.jsonl --clients 16 --seconds 4
    python benchmarks/load.py URL REQUESTS.jsonl --rate 500 --seconds 4
    python benchmarks/load.py URL /v1/healthz --rate 50 --seconds 4

`--clients` is a closed loop: every client sends its next request when it has an answer. `--rate` is
an open loop: requests are due at fixed times whatever the endpoint does, and a latency counts from
the moment the request was due, so that a stalled endpoint cannot hide the requests that it delayed.
`late_p99_ms` is by how much the sender itself missed those times: where it is much, the latencies
are the sender's, and the rate is too high for this machine. Each line of the file is the JSON body
of one POST to /v1/recall, drawn at random, or with `--once` sent once and in order. A path instead
of a file is asked with GET. Prints one JSON object.
"""

from __future__ import annotations

import asyncio
import gc
import json
import random
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import uvloop

from karma_ray import cli

LOST = 0
"""The status of a request whose connection was closed."""
READY = 32
"""Connections that the open loop has at its start."""


class Client(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._answered: Callable[[int], None] | None = None

    @property
    def is_closed(self) -> bool:
        """Whether another connection is needed."""
        return self._transport.is_closing()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the way to send."""
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        """Collect an answer, and tell its status."""
        self._data += data
        end = self._data.find(b"\r\n\r\n")
        if end < 0 or self._answered is None:
            return
        head = bytes(self._data[:end]).lower()
        at = head.find(b"content-length:")
        if at < 0:  # sent in chunks, as Ray Serve does when it refuses a request
            ended = self._data.endswith(b"0\r\n\r\n")
        else:
            ended = len(self._data) >= end + 4 + int(head[at + 15 :].split(b"\r\n", 1)[0])
        if ended:
            self._data = bytearray()
            self._tell(int(head[9:12]))

    def connection_lost(self, error: Exception | None) -> None:
        """Tell that a request in flight is lost."""
        if self._answered is not None:
            self._tell(LOST)

    def send(self, request: bytes, answered: Callable[[int], None]) -> None:
        """Send a request; `answered` is told the status, or LOST if the connection was closed."""
        self._answered = answered
        self._transport.write(request)

    def _tell(self, status: int) -> None:
        answered, self._answered = self._answered, None
        assert answered is not None
        answered(status)


def get(path: str, host: str) -> bytes:
    """Return the bytes of a request without a body."""
    return f"GET {path} HTTP/1.1\r\nhost: {host}\r\n\r\n".encode()


def post(body: str, host: str) -> bytes:
    """Return the bytes of a request."""
    content = body.encode()
    head = (
        f"POST /v1/recall HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


async def connections(url: str, count: int) -> list[Client]:
    """Open connections; done before the clock starts, as it is no part of what is measured."""
    place, loop = urlsplit(url), asyncio.get_running_loop()
    return [
        (await loop.create_connection(Client, place.hostname, place.port))[1] for _ in range(count)
    ]


@dataclass
class Sent:
    """What became of requests."""

    seconds: float
    """Time in which they were sent."""
    done: list[tuple[int, float, float]] = field(default_factory=list)
    """Status and latency in seconds of each, and when it was answered."""
    begin: float = field(default_factory=time.perf_counter)
    late: list[float] = field(default_factory=list)
    """Seconds by which the sender missed the time of each; the open loop only."""

    def note(self, status: int, begin: float) -> None:
        """Note an answer to a request that was due at `begin`."""
        now = time.perf_counter()
        self.done.append((status, now - begin, now - self.begin))


async def closed(url: str, requests: Iterator[bytes], clients: int, seconds: float) -> Sent:
    """Let `clients` send one request after another."""
    loop, ready = asyncio.get_running_loop(), await connections(url, clients)
    sent = Sent(seconds)
    until = sent.begin + seconds

    async def one(client: Client) -> None:
        while (begin := time.perf_counter()) < until and (request := next(requests, None)):
            try:
                if client.is_closed:
                    client = (await connections(url, 1))[0]
                answer: asyncio.Future[int] = loop.create_future()
                client.send(request, answer.set_result)
                status = await answer
            except OSError:  # no further connection was accepted
                status = LOST
            sent.note(status, begin)

    await asyncio.gather(*(one(client) for client in ready))
    return sent


class Opened:
    """Requests at a fixed rate, over at most `most` connections.

    One that finds none free waits, and its wait counts. A request is no task of its own, which
    would cost more than sending it does.
    """

    def __init__(self, url: str, requests: Iterator[bytes], most: int) -> None:
        self._url, self._requests, self._most = url, requests, most
        self._free: deque[Client] = deque()
        self._waiting: deque[float] = deque()
        self._opening: set[asyncio.Task[None]] = set()
        self._num_open = 0

    async def run(self, rate: float, total: int) -> Sent:
        """Send `total` requests, and wait for their answers."""
        self._free.extend(await connections(self._url, min(self._most, READY)))
        self._num_open, self._sent = len(self._free), Sent(total / rate)
        begin, n = self._sent.begin, 0
        while n < total:
            now = time.perf_counter()
            while n < total and (due := begin + n / rate) <= now:
                self._sent.late.append(time.perf_counter() - due)
                self._place(due)
                n += 1
            await asyncio.sleep(max(0.0, begin + n / rate - time.perf_counter()))
        self._sent.seconds = max(total / rate, time.perf_counter() - begin)
        while len(self._sent.done) < total:
            await asyncio.sleep(0.01)
        return self._sent

    def _place(self, due: float) -> None:
        while self._free:
            client = self._free.pop()
            if not client.is_closed:
                client.send(next(self._requests), partial(self._answered, client, due))
                return
            self._num_open -= 1
        if self._num_open == self._most:
            self._waiting.append(due)
            return
        self._num_open += 1
        task = asyncio.ensure_future(self._open(due))
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    async def _open(self, due: float) -> None:
        try:
            client = (await connections(self._url, 1))[0]
            client.send(next(self._requests), partial(self._answered, client, due))
        except OSError:  # no further connection was accepted
            self._num_open -= 1
            self._sent.note(LOST, due)

    def _answered(self, client: Client, due: float, status: int) -> None:
        self._sent.note(status, due)
        self._free.append(client)
        if self._waiting:
            self._place(self._waiting.popleft())


def summary(sent: Sent) -> dict:
    """Return requests per second, counts by status, and latencies of answered ones in ms."""
    good = np.sort([latency for status, latency, _ in sent.done if status == 200]) * 1e3
    in_time = sum(status == 200 and at <= sent.seconds for status, _, at in sent.done)
    found = {
        "per_second": round(in_time / sent.seconds, 1),
        "offered_per_second": round(len(sent.done) / sent.seconds, 1),
        "statuses": dict(Counter(status for status, _, _ in sent.done)),
    }
    if sent.late:
        found["late_p99_ms"] = round(float(np.percentile(sent.late, 99)) * 1e3, 2)
    if len(good):
        for name, share in (("p50_ms", 50), ("p90_ms", 90), ("p99_ms", 99), ("max_ms", 100)):
            found[name] = round(float(np.percentile(good, share)), 2)
    return found


def main() -> None:
    """Parse the arguments, send, and print."""
    flags = cli.parser(__doc__ or "")
    flags.add_argument("url")
    flags.add_argument("requests", help="file with one JSON body per line, or a path to GET")
    flags.add_argument("--clients", type=int, default=16)
    flags.add_argument("--rate", type=float, default=0.0, help="requests per second; open loop")
    flags.add_argument("--connections", type=int, default=512, help="at most, in the open loop")
    flags.add_argument("--seconds", type=float, default=4.0)
    flags.add_argument("--once", action="store_true", help="every line once, in order")
    given = flags.parse_args()
    host = urlsplit(given.url).netloc
    if given.requests.startswith("/v1/"):
        requests = [get(given.requests, host)]
    else:
        lines = Path(given.requests).read_text(encoding="utf-8").splitlines()
        requests = [post(body, host) for body in lines]
    draw, total = random.Random(0), int(given.rate * given.seconds)
    if given.once:
        source, total = iter(requests), min(total, len(requests))
    else:
        source = iter(lambda: draw.choice(requests), None)
    gc.disable()  # a collection here would look like a stall of the endpoint
    if given.rate:
        run = Opened(given.url, source, given.connections).run(given.rate, total)
    else:
        run = closed(given.url, source, given.clients, given.seconds)
    print(json.dumps(summary(uvloop.run(run))))


if __name__ == "__main__":
    main()
