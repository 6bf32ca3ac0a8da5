"""The figures by which runs of benchmarks/serve.py are compared."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

P99_MS = 20.0
Line = dict[str, Any]


def headline(lines: Sequence[Line]) -> Line:
    """Return the figures; those of other hosts than uvicorn end with the host's name.

    `throughput_over_uvicorn` is of Ray Serve at the most clients and `added_p50_ms` at one client,
    both for the history that is worst. `latency_200_over_1_history` is of the longest and the
    shortest of `--lengths`, `stored_clicks_...` the same for clicks that the endpoint keeps, and
    `karma_over_action_only` of RUN and the run of `--against`. `requests_per_s` is the highest rate
    whose p99 stayed below 20 ms. `p50_ratio` is of accepted requests under overload, of `times` as
    many requests as the most clients got answered; it and `healthz_p99_ms` are the worst ones.
    """
    found = _of_serve(lines)
    for part in ("lengths", "body", "stored_clicks"):
        measured = _of(lines, part, "uvicorn")
        if len(measured) > 1:
            short, long = (pick(measured, key=_history) for pick in (min, max))
            name = "latency" if part == "lengths" else part
            name = f"{name}_{_history(long)}_over_{_history(short)}_history"
            found[name] = round(long["p50_ms"] / short["p50_ms"], 3)
    for host in dict.fromkeys(line["host"] for line in lines if line["host"] != "against"):
        end = "" if host == "uvicorn" else f"_{host}"
        found |= {f"{name}{end}": value for name, value in _of_host(lines, host).items()}
    return found


def _history(line: Line) -> int:
    return int(line["history"])


def _of(lines: Sequence[Line], part: str, host: str, **fields: float) -> list[Line]:
    return [
        line
        for line in lines
        if (line["part"], line["host"]) == (part, host)
        and all(line.get(name) == value for name, value in fields.items())
    ]


def _of_serve(lines: Sequence[Line]) -> Line:
    """Return Ray Serve beside uvicorn, and a run beside another one."""
    found: Line = {}
    most = max((line["clients"] for line in lines if line["part"] == "clients"), default=0)
    if ratios := [line["to_uvicorn"] for line in _of(lines, "clients", "serve", clients=most)]:
        found["throughput_over_uvicorn"] = min(ratios)
    alone = _of(lines, "clients", "uvicorn", clients=1)
    pairs = zip(_of(lines, "clients", "serve", clients=1), alone, strict=False)
    if added := [serve["p50_ms"] - other["p50_ms"] for serve, other in pairs]:
        found["added_p50_ms"] = round(max(added), 2)
    pairs = zip(alone, _of(lines, "clients", "against", clients=1), strict=False)
    if ratios := [ours["p50_ms"] / theirs["p50_ms"] for ours, theirs in pairs]:
        found["karma_over_action_only"] = round(statistics.median(ratios), 3)
    return found


def _of_host(lines: Sequence[Line], host: str) -> Line:
    found: Line = {}
    if rates := _of(lines, "rates", host):
        held = [line for line in rates if line["p99_ms"] < P99_MS]
        best = max(held, key=lambda line: line["rate"], default=None)
        found["requests_per_s"] = best["per_second"] if best else 0.0
        found["p99_ms"] = best["p99_ms"] if best else None
    if overload := _of(lines, "overload", host):
        found["p50_ratio"] = max(line["p50_ratio"] for line in overload)
        found["times"] = min(line["times"] for line in overload)
    for name, option in (("healthz_p99_ms", "clients"), ("healthz_p99_ms_overload", "rate")):
        if probes := [line for line in _of(lines, "healthz", host) if option in line]:
            found[name] = max(line["p99_ms"] for line in probes)
    pairs = zip(_of(lines, "cold", host), _of(lines, "warm", host), strict=True)
    if ratios := [cold["p99_ms"] / warm["p99_ms"] for cold, warm in pairs]:
        found["cold_over_warm_p99"] = round(max(ratios), 2)
    return found
