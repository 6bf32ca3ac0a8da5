"""The models of benchmarks/rank.py: each plain, with MaRI, and with its weights in fragments."""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from karma_ray.ranking.config import RankingConfig
from karma_ray.ranking.families import Sizes, build_model
from karma_ray.ranking.features import num_features
from karma_ray.ranking.mari import Report, with_request_side

CANDIDATES = (1, 10, 50, 100, 200, 500, 1000)
SHARES = (0.1, 0.25, 0.5, 0.75, 0.9)
PIECES = (2, 8, 32, 64)
NUM_ITEMS, HISTORY, TERMS = 2000, 20, 8
WIDTH, UNITS = 768, 512
PEAK_SIZE = 512
BURST_S = 0.002
"""Calls are repeated until a measurement takes about this long."""
Line = dict[str, Any]
Inputs = tuple[Tensor, ...]


class Layers(nn.Module):
    """Layers over features of user and item, which alternate in `pieces`."""

    def __init__(self, user: int, pieces: int) -> None:
        super().__init__()
        self.user, self.pieces = user, pieces
        self.layers = nn.Sequential(
            nn.Linear(WIDTH, UNITS), nn.ReLU(), nn.Linear(UNITS, 64), nn.ReLU(), nn.Linear(64, 1)
        )

    def forward(self, user: Tensor, request: Tensor, item: Tensor) -> Tensor:
        """Return logits.  # [R, du], [N], [N, di] -> [N]"""
        mine, number = user.index_select(0, request), self.pieces // 2
        mixed = []
        for n in range(number):
            mixed.append(mine[:, n * self.user // number : (n + 1) * self.user // number])
            width = WIDTH - self.user
            mixed.append(item[:, n * width // number : (n + 1) * width // number])
        logits: Tensor = self.layers(torch.cat(mixed, 1)).squeeze(1)
        return logits


@dataclass(frozen=True)
class Case:
    """A model beside what MaRI makes of it."""

    models: dict[str, nn.Module]
    report: Report
    inputs: Callable[[int, int], Inputs]
    """(requests, candidates) -> arguments of `forward`."""

    @classmethod
    def of(
        cls, model: nn.Module, inputs: Callable[[int, int], Inputs], request_inputs: Sequence[str]
    ) -> Case:
        """Apply MaRI in both layouts."""
        found: dict[str, nn.Module] = {"plain": model}
        reports = []
        for name, contiguous in (("mari", True), ("fragmented", False)):
            found[name], report = with_request_side(
                model, inputs(3, 12), request_inputs=request_inputs, contiguous=contiguous
            )
            reports.append(report)
        return cls(found, reports[0], inputs)


def din() -> Case:
    """Return the model of ctr_simtier with initial weights."""
    features = num_features(interest=False)

    def inputs(requests: int, candidates: int) -> Inputs:
        draw = torch.Generator().manual_seed(0)
        return (
            torch.randint(0, NUM_ITEMS, (requests, HISTORY), generator=draw),
            torch.randint(1, 1000, (requests, TERMS), generator=draw),
            torch.arange(candidates) * requests // candidates,
            torch.randint(0, NUM_ITEMS, (candidates,), generator=draw),
            torch.rand(candidates, features, generator=draw),
        )

    model = build_model(RankingConfig(family="simtier"), Sizes(NUM_ITEMS, [20, 20])).eval()
    return Case.of(model, inputs, ("history", "query"))


def layers(share: float = 2 / 3, pieces: int = 2) -> Case:
    """Return layers over features of which `share` are of the user."""
    user = round(share * WIDTH)

    def inputs(requests: int, candidates: int) -> Inputs:
        draw = torch.Generator().manual_seed(0)
        return (
            torch.randn(requests, user, generator=draw),
            torch.arange(candidates) * requests // candidates,
            torch.randn(candidates, WIDTH - user, generator=draw),
        )

    torch.manual_seed(0)
    return Case.of(Layers(user, pieces).eval(), inputs, ("user",))


class Peak:
    """What a product of large matrices reaches."""

    def __init__(self) -> None:
        self._factors = torch.randn(2, PEAK_SIZE, PEAK_SIZE)
        self.rates: list[float] = []
        """Multiply-adds a millisecond."""

    def measure(self) -> None:
        """Multiply once."""
        begin = time.thread_time()
        self._factors[0] @ self._factors[1]
        self.rates.append(PEAK_SIZE**3 / (time.thread_time() - begin) / 1000)

    @property
    def rate(self) -> float:
        """The median."""
        return statistics.median(self.rates)


def seconds(call: Callable[[], object], times: int) -> float:
    """Return the CPU seconds of one of so many calls."""
    begin = time.thread_time()
    for _ in range(times):
        call()
    return (time.thread_time() - begin) / times


def measured(case: Case, candidates: int, rounds: int, peak: Peak) -> Line:
    """Let the models take turns; returns medians in ms."""
    inputs = case.inputs(1, candidates)
    calls = {name: lambda model=model: model(*inputs) for name, model in case.models.items()}
    first = {name: seconds(call, 3) for name, call in calls.items()}
    times = max(1, int(BURST_S / max(first.values())))
    found: dict[str, list[float]] = {name: [] for name in calls}
    order, draw = list(calls.items()), random.Random(0)
    for _ in range(rounds):
        peak.measure()
        draw.shuffle(order)  # whoever comes first leaves caches and heap to the next
        for name, call in order:
            call()
            found[name].append(1000 * seconds(call, times))
    line: Line = {"candidates": candidates}
    for name, values in found.items():
        line[f"{name}_ms"] = round(statistics.median(values), 4)
    for name in ("mari", "fragmented"):
        ratios = [a / b for a, b in zip(found["plain"], found[name], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        line[f"{name}_speedup"] = round(middle, 3)
        line[f"{name}_quartiles"] = [round(low, 3), round(high, 3)]
    work = case.report.before.of(1, candidates), case.report.after.of(1, candidates)
    line |= {"multiply_adds": work[0], "mari_multiply_adds": work[1]}
    line["fewer"] = round(work[0] / work[1], 3)
    return line


def with_limits(lines: list[Line], peak: Peak) -> None:
    """Add what the multiply-adds alone would take, and print."""
    for line in lines:
        line["limit_ms"] = round(line["mari_multiply_adds"] / peak.rate, 4)
        print(json.dumps(line), flush=True)


def models_alone(rounds: int, quick: bool) -> list[Line]:
    """Measure all three parts."""
    lines: list[Line] = []
    peak = Peak()

    def add(part: str, case: Case, candidates: int, **facts: Any) -> None:
        lines.append({"part": part, **facts, **measured(case, candidates, rounds, peak)})

    with torch.no_grad():
        for name, case in (("din", din()), ("layers", layers())):
            for candidates in (1, 100, 500) if quick else CANDIDATES:
                add("candidates", case, candidates, model=name)
        for pieces in (2, 32) if quick else PIECES:
            add("layout", layers(pieces=pieces), 500, model="layers", pieces=pieces)
        for share in (0.25, 0.75) if quick else SHARES:
            add("share", layers(share), 500, model="layers", share=share)
    with_limits(lines, peak)
    return lines
