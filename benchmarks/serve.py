"""The endpoint of a finished run under load, behind several hosts side by side.

    python benchmarks/serve.py RUN [--hosts uvicorn,serve] [--against RUN] [--quick]

Hosts: `single` (uvicorn, one request at a time and nothing stored), `uvicorn` (one process with
batches and stored histories: `jobs/serve.py RUN --without-ray`), `half` (the same with `--precision
bfloat16`), `serve` (Ray Serve: `jobs/serve.py RUN`), `serve2` (two replicas behind Serve's proxy:
`--replicas 2`), and with `--against` another run behind `uvicorn`. Every round asks all hosts in
turn; printed are medians over the rounds, as JSON lines: requests per second, latencies in ms, the
ratio to `uvicorn`, and the share of histories that were found stored. The parts:

- `--clients`: so many clients, each sending its next request when it has an answer;
- `--lengths`: one client, histories of so many clicks;
- `--rates`: requests due at fixed times (an open loop); a latency counts from then;
- `--overload`: ten times as many requests as the most clients got answered, or a half, a quarter or
  an eighth of that, until the sender keeps the times (`times`); latencies are those of accepted
  requests, and `p50_ratio` is their p50 over that of the most clients;
- `--healthz`: `/v1/healthz` beside the most clients, and beside that overload;
- `--cold`: at a fixed rate (`--cold-rate`), as many users as requests, then few users again and
  again;
- `--stored`: one client, the shortest and the longest of `--lengths`, sent in the body, and named
  by `user_id` after `/v1/events` was told the clicks: what a longer body costs, and what the rest.

An empty list, or `--no-PART`, leaves a part out. The last line has the headline figures. Load comes
from a process of its own (benchmarks/load.py), on the same machine, and the item ids from the run's
index.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.endpoints import (
    bodies,
    endpoint,
    healthz_under_load,
    histories,
    load,
    store_clicks,
    stored,
)
from benchmarks.headline import headline
from karma_ray import cli

LATENCIES = ("p50_ms", "p99_ms", "max_ms")
TIMES = (10.0, 5.0, 2.5, 1.25)
"""How often the requests that are answered are sent in overload: the first that can be sent."""
LATE_MS = 5.0
"""99th percentile of the lateness with which the sender still keeps the times."""
STORED_USERS = 20
"""Users whose clicks are told to the endpoint."""
Line = dict[str, Any]


class Bench:
    """Hosts of a run, and what is measured of them."""

    def __init__(
        self, urls: dict[str, str], folder: str, run: str, given: argparse.Namespace
    ) -> None:
        self.urls, self.given, self.lines = urls, given, list[Line]()
        self.hosts = [name for name in urls if name != "against"]
        self._folder, self._run = folder, run

    def run(self) -> list[Line]:
        """Measure all parts; returns the printed lines."""
        given, lengths = self.given, numbers(self.given.lengths)
        for history in numbers(given.history):
            requests = self._requests(history)
            full: dict[str, Line] = {}
            for clients in numbers(given.clients):
                full = self._measure(
                    list(self.urls), [requests], "clients", history, "clients", clients
                )
            for rate in numbers(given.rates):
                self._measure(self.hosts, [requests], "rates", history, "rate", rate)
            for host in self.hosts if full else ():
                self._overload(host, requests, history, full[host])
            if given.cold and history:
                self._cold(requests, history)
        for history in lengths:
            requests = self._requests(history)
            self._measure(self.hosts, [requests], "lengths", history, "clients", 1)
        for history in {min(lengths), max(lengths)} if lengths and given.stored else ():
            self._stored(history)
        return self.lines

    def _overload(self, host: str, requests: str, history: int, full: Line) -> None:
        """Measure a host that is asked more than it answers, and `/v1/healthz` meanwhile."""
        given, url, clients = self.given, self.urls[host], full["clients"]
        beside = {"clients": clients}
        if given.overload:
            for times in TIMES:
                rate = round(times * full["per_second"])
                tried = load(url, requests, 1.0, "--rate", str(rate))
                if tried["late_p99_ms"] <= LATE_MS:
                    break
            found = self._measure([host], [requests], "overload", history, "rate", rate, say=False)
            line = found[host]
            line["times"] = round(line["offered_per_second"] / full["per_second"], 1)
            line["p50_ratio"] = round(line["p50_ms"] / full["p50_ms"], 2)
            print(json.dumps(line), flush=True)
            beside["rate"] = rate
        for option, value in beside.items() if given.healthz else ():
            rounds = [
                healthz_under_load(url, requests, given.seconds, f"--{option}", str(value))
                for _ in range(given.rounds)
            ]
            latencies = {
                n: statistics.median(r["healthz"].get(n, math.inf) for r in rounds)
                for n in LATENCIES
            }
            self._keep({
                "part": "healthz", "host": host, option: value, "history": history, **latencies,
                "per_second": statistics.median(r["per_second"] for r in rounds),
            })  # fmt: skip

    def _cold(self, warm: str, history: int) -> None:
        """Measure users that come for the first time, and users that come again."""
        given = self.given
        count, cold = math.ceil(given.cold_rate * given.seconds), []
        for number in range(given.rounds):
            users = histories(self._run, history, count, seed=1 + number)
            cold.append(self._write(f"cold-{history}-{number}", bodies(users, given.k, queries=1)))
        for part, requests in (("cold", cold), ("warm", [warm])):
            options = ["--once"] if part == "cold" else []
            self._measure(
                self.hosts, requests, part, history, "rate", given.cold_rate, options=options
            )

    def _stored(self, history: int) -> None:
        """Measure clicks that are sent with each request, and clicks that the endpoint keeps."""
        users = histories(self._run, history, STORED_USERS)
        sent = self._write(f"body-{history}", bodies(users, self.given.k))
        named = ""
        for host in self.hosts:
            named = self._write(
                f"stored-{history}", store_clicks(self.urls[host], users, self.given.k)
            )
        for part, requests in (("body", sent), ("stored_clicks", named)):
            self._measure(self.hosts, [requests], part, history, "clients", 1)

    def _requests(self, history: int) -> str:
        users = histories(self._run, history, self.given.users)
        return self._write(str(history), bodies(users, self.given.k))

    def _write(self, name: str, lines: Sequence[str]) -> str:
        path = Path(self._folder, f"{name}.jsonl")
        path.write_text("\n".join(lines))
        return str(path)

    def _keep(self, line: Line, say: bool = True) -> None:
        self.lines.append(line)
        if say:
            print(json.dumps(line), flush=True)

    def _measure(
        self, hosts: Sequence[str], requests: Sequence[str], part: str, history: int, option: str,
        value: float, *, options: Sequence[str] = (), say: bool = True,
    ) -> dict[str, Line]:  # fmt: skip
        """Ask hosts in turn, with so many clients or at this rate, and print the medians.

        Each round sends the next file of `requests`.
        """
        rounds: dict[str, list[Line]] = {host: [] for host in hosts}
        before = {host: stored(self.urls[host]) for host in hosts}
        for number in range(self.given.rounds):
            for host in hosts:
                rounds[host].append(load(
                    self.urls[host], requests[number % len(requests)], self.given.seconds,
                    f"--{option}", str(value), *options,
                ))  # fmt: skip
        middle = {h: _middle(found, "per_second") for h, found in rounds.items()}
        first = middle.get("uvicorn")
        lines = {}
        for host, found in rounds.items():
            rates = [r["per_second"] for r in found]
            hits = {n: v - before[host].get(n, 0) for n, v in stored(self.urls[host]).items()}
            statuses: Counter[str] = Counter()
            for r in found:
                statuses.update(r["statuses"])
            lines[host] = {
                "part": part, "host": host, option: value, "history": history,
                "per_second": middle[host], "spread": [min(rates), max(rates)],
                "offered_per_second": _middle(found, "offered_per_second"),
                "to_uvicorn": round(middle[host] / first, 3) if first else None,
                **{n: _middle(found, n) for n in LATENCIES},
                **({"late_p99_ms": _middle(found, "late_p99_ms")} if option == "rate" else {}),
                "stored": round(hits.get("whole", 0) / max(1.0, sum(hits.values())), 3),
                "refused": statuses.pop("503", 0),
                "failed": statuses.total() - statuses["200"],
            }  # fmt: skip
            self._keep(lines[host], say)
        return lines


def _middle(found: Sequence[Line], name: str) -> float:
    return statistics.median(one.get(name, math.inf) for one in found)


def numbers(text: str) -> list[int]:
    """Return the numbers of a list with commas."""
    return [int(number) for number in text.split(",") if number]


def main() -> None:
    """Start the hosts, and print a line per host, number of clients and length of history."""
    flags = cli.parser(__doc__ or "")
    flags.add_argument("run", metavar="RUN")
    flags.add_argument("--hosts", default="single,uvicorn,serve")
    flags.add_argument("--against", metavar="RUN", help="another run, e.g. of action_only")
    flags.add_argument("--clients", default="1,8,16")
    flags.add_argument("--lengths", default="1,2,5,10,20,50,100,200")
    flags.add_argument("--rates", default="100,200,400,800", help="requests per second")
    flags.add_argument("--history", default="0,20,50")
    flags.add_argument("--users", type=int, default=200, help="distinct histories")
    flags.add_argument("--cold-rate", type=int, default=100, help="requests per second")
    flags.add_argument("--k", type=int, default=50)
    flags.add_argument("--rounds", type=int, default=3)
    flags.add_argument("--seconds", type=float, default=4.0)
    for part in ("overload", "healthz", "cold", "stored"):
        flags.add_argument(f"--{part}", action=argparse.BooleanOptionalAction, default=True)
    flags.add_argument("--quick", action="store_true", help="fewer points, about five minutes")
    given = flags.parse_args()
    if given.quick:
        given.hosts, given.clients, given.lengths = "uvicorn,serve", "1,16", "1,200"
        given.history, given.rates, given.rounds, given.seconds = "0,50", "200,800", 2, 2.0
    run = str(Path(given.run).resolve())
    with ExitStack() as stack:
        urls = {host: stack.enter_context(endpoint(host, run)) for host in given.hosts.split(",")}
        if given.against:
            other = str(Path(given.against).resolve())
            urls["against"] = stack.enter_context(endpoint("uvicorn", other))
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        lines = Bench(urls, folder, run, given).run()
    print(json.dumps(headline(lines)), flush=True)


if __name__ == "__main__":
    main()
