"""Load on an HTTP endpoint, from a process of its own: requests per second and latencies.

    python benchmarks/load.py URL REQUESTS.jsonl --clients 16 --seconds 4
    python benchmarks/load.py URL REQUESTS.jsonl --rate 500 --seconds 4

`--clients` is a closed loop: every client sends its next request when it has an answer. `--rate` is
an open loop: requests are due at fixed times whatever the endpoint does, and a latency counts from
the moment the request was due, so that a stalled endpoint cannot hide the requests that it delayed.
Each line of the file is the JSON body of one POST to /v1/recall. Prints one JSON object.
"""

from __future__ import annotations

import asyncio
import gc
import json
import random
import sys
import time
from collections import Counter, deque
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
        self._answer: asyncio.Future[int] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the way to send."""
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]
        self._place = transport.get_extra_info("peername")
        self._data = bytearray()

    def data_received(self, data: bytes) -> None:
        """Collect an answer; its status ends the wait."""
        self._data += data
        end = self._data.find(b"\r\n\r\n")
        if end < 0 or self._answer is None:
            return
        head = bytes(self._data[:end]).lower()
        at = head.find(b"content-length:")
        if at < 0:  # sent in chunks, as Ray Serve does when it refuses a request
            ended = self._data.endswith(b"0\r\n\r\n")
        else:
            ended = len(self._data) >= end + 4 + int(head[at + 15 :].split(b"\r\n", 1)[0])
        if ended:
            self._data = bytearray()
            self._answer.set_result(int(head[9:12]))

    def connection_lost(self, error: Exception | None) -> None:
        """Fail a request in flight."""
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error or ConnectionResetError())

    async def ask(self, request: bytes) -> int:
        """Send a request; returns the status of its answer, or LOST if the connection was closed.

        A closed connection is replaced by the next request.
        """
        loop = asyncio.get_running_loop()
        if self._transport.is_closing():
            try:
                await loop.create_connection(lambda: self, *self._place[:2])
            except OSError:
                return LOST
        self._answer = loop.create_future()
        self._transport.write(request)
        try:
            return await self._answer
        except OSError:
            return LOST


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


async def closed(url: str, requests: list[bytes], clients: int, seconds: float) -> list[tuple]:
    """Return (status, latency) of every request of `clients` that send one after another."""
    done: list[tuple] = []
    ready = await connections(url, clients)
    until = time.perf_counter() + seconds

    async def one(seed: int) -> None:
        draw, client = random.Random(seed), ready[seed]
        while (begin := time.perf_counter()) < until:
            status = await client.ask(draw.choice(requests))
            done.append((status, time.perf_counter() - begin))

    await asyncio.gather(*(one(seed) for seed in range(clients)))
    return done


async def opened(
    url: str, requests: list[bytes], rate: float, seconds: float, most: int
) -> list[tuple]:
    """Return (status, latency since it was due) of requests at a fixed rate.

    At most `most` connections are open; a request that finds none waits, and its wait counts.
    """
    done: list[tuple] = []
    draw = random.Random(0)
    free = deque(await connections(url, min(most, READY)))
    room = asyncio.Semaphore(most)

    async def one(due: float) -> None:
        async with room:
            try:
                client = free.pop() if free else (await connections(url, 1))[0]
                status = await client.ask(draw.choice(requests))
                free.append(client)
            except OSError:  # no further connection was accepted
                status = LOST
        done.append((status, time.perf_counter() - due))

    begin, tasks = time.perf_counter(), []
    for n in range(int(rate * seconds)):
        due = begin + n / rate
        if (wait := due - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        tasks.append(asyncio.ensure_future(one(due)))
    await asyncio.gather(*tasks)
    return done


def summary(done: list[tuple], seconds: float) -> dict:
    """Return requests per second, counts by status, and latencies of answered ones in ms."""
    good = np.sort([latency for status, latency in done if status == 200]) * 1e3
    found = {"per_second": round(len(good) / seconds, 1), "statuses": dict(Counter(
        status for status, _ in done))}  # fmt: skip
    if len(good):
        for name, share in (("p50_ms", 50), ("p90_ms", 90), ("p99_ms", 99), ("max_ms", 100)):
            found[name] = round(float(np.percentile(good, share)), 2)
    return found


def main() -> None:
    """Parse the arguments, send, and print."""
    flags = cli.parser(__doc__ or "")
    flags.add_argument("url")
    flags.add_argument("requests", help="file with one JSON body per line")
    flags.add_argument("--clients", type=int, default=16)
    flags.add_argument("--rate", type=float, default=0.0, help="requests per second; open loop")
    flags.add_argument("--connections", type=int, default=512, help="at most, in the open loop")
    flags.add_argument("--seconds", type=float, default=4.0)
    given = flags.parse_args()
    bodies = Path(given.requests).read_text(encoding="utf-8").splitlines()
    requests = [post(body, urlsplit(given.url).netloc) for body in bodies]
    gc.disable()  # a collection here would look like a stall of the endpoint
    if given.rate:
        run = opened(given.url, requests, given.rate, given.seconds, given.connections)
    else:
        run = closed(given.url, requests, given.clients, given.seconds)
    print(json.dumps(summary(uvloop.run(run), given.seconds)))


if __name__ == "__main__":
    main()
