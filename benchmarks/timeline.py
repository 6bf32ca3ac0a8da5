"""Draw who ran where on a cluster, and when its nodes came and went, from JSON lines of events.

    python benchmarks/timeline.py EVENTS [--out PICTURE.svg] [--title TEXT]

An event is {"t": seconds, "event": "joined", "node": name, "what": text}: a node has `joined` or
`left`, or `what` has `started` or `ended` on it. A node that leaves takes its work with it, and
the `what` of its leaving says why. Other lines are skipped, so the output of a benchmark that also
prints its results can be drawn as it is. The same events give the same bytes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from karma_ray.cli import parser, run
from karma_ray.errors import InputError

EVENTS = ("joined", "left", "started", "ended")
UP, COLOURS = "#e6eaee", ("#1f6feb", "#d1582b", "#2da44e", "#8250df", "#9a6700", "#57606a")


@dataclass(frozen=True)
class Span:
    """A time from `start` to `end`, in seconds, and what it was spent on."""

    start: float
    end: float
    what: str = ""


@dataclass(frozen=True)
class Node:
    """A row of the picture: when the node was up, what ran on it, and why it left."""

    name: str
    up: list[Span]
    work: list[Span]


def read_events(lines: Iterable[str]) -> list[dict[str, Any]]:
    """Return the events among JSON lines, in their order in time; raises InputError."""
    found = []
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if not isinstance(value, dict) or "event" not in value:
            continue
        if value["event"] not in EVENTS:
            raise InputError(f"EVENTS: line {number}: event", value["event"], choices=EVENTS)
        if not {"t", "node"} <= set(value):
            raise InputError(f"EVENTS: line {number}", line.strip(), "has no t or no node")
        found.append(value)
    if not found:
        raise InputError("EVENTS", len(found), "events: there is nothing to draw")
    return sorted(found, key=lambda event: float(event["t"]))


def nodes_of(events: Sequence[Mapping[str, Any]]) -> list[Node]:
    """Return the rows, in the order in which the nodes joined; what is open ends with the last
    event."""
    last = float(events[-1]["t"])
    nodes: dict[str, Node] = {}
    joined: dict[str, float] = {}
    running: dict[tuple[str, str], list[float]] = {}
    for event in events:
        moment, name, what = float(event["t"]), str(event["node"]), str(event.get("what", ""))
        node = nodes.setdefault(name, Node(name, [], []))
        if event["event"] == "joined":
            joined[name] = moment
        elif event["event"] == "started":
            running.setdefault((name, what), []).append(moment)
        elif event["event"] == "ended":
            if started := running.get((name, what)):
                node.work.append(Span(started.pop(0), moment, what))
        else:
            node.up.append(Span(joined.pop(name, 0.0), moment, what))
            _cut(node, running, moment)
    for name, node in nodes.items():
        if name in joined:
            node.up.append(Span(joined[name], last))
        _cut(node, running, last)
        node.work.sort(key=lambda span: (span.start, span.end, span.what))
    return list(nodes.values())


def _cut(node: Node, running: dict[tuple[str, str], list[float]], moment: float) -> None:
    """End the work of a node."""
    for name, what in [key for key in running if key[0] == node.name]:
        for start in running.pop((name, what)):
            node.work.append(Span(start, moment, what))


def lanes(spans: Sequence[Span]) -> list[int]:
    """Return for each span, ordered by start, the first lane that is free when it starts."""
    ends: list[float] = []
    found = []
    for span in spans:
        free = next((lane for lane, end in enumerate(ends) if end <= span.start), len(ends))
        ends[free : free + 1] = [span.end]
        found.append(free)
    return found


def draw(nodes: Sequence[Node], path: Path, title: str = "") -> None:
    """Write the picture as SVG, with text as text."""
    names = list(dict.fromkeys(span.what for node in nodes for span in node.work))
    colours = {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(names)}
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "timeline"}):
        figure = Figure(figsize=(8.0, 1.0 + 0.5 * len(nodes)), layout="constrained")
        axes = figure.subplots()
        for row, node in enumerate(nodes):
            _draw_node(axes, row, node, colours)
        axes.set_yticks(range(len(nodes)), [node.name for node in nodes])
        axes.set_ylim(len(nodes) - 0.5, -0.5)
        axes.set_xlim(left=0)
        axes.set_xlabel("seconds")
        axes.set_title(title, fontsize=10)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        handles = [Patch(color=colour, label=name) for name, colour in colours.items()]
        if handles:
            figure.legend(
                handles=handles, loc="outside lower right", ncols=len(handles), frameon=False,
                fontsize=8,
            )  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", metadata={"Date": None})


def _draw_node(axes: Axes, row: int, node: Node, colours: Mapping[str, str]) -> None:
    for span in node.up:
        axes.barh(row, span.end - span.start, left=span.start, height=0.8, color=UP)
        if span.what:
            axes.annotate(
                f"× {span.what}", (span.end, row), xytext=(3, 0), textcoords="offset points",
                va="center", fontsize=8,
            )  # fmt: skip
    placed = lanes(node.work)
    height = 0.6 / (max(placed, default=0) + 1)
    for span, lane in zip(node.work, placed, strict=True):
        middle = row - 0.3 + height * (lane + 0.5)
        axes.barh(
            middle, span.end - span.start, left=span.start, height=0.9 * height,
            color=colours[span.what],
        )  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Read the events and write the picture."""
    flags = parser(__doc__ or "")
    flags.add_argument("events", metavar="EVENTS", help="file of JSON lines, or - to read them")
    flags.add_argument("--out", default="timeline.svg", help="file to write (timeline.svg)")
    flags.add_argument("--title", default="", help="text above the picture")
    arguments = flags.parse_args(argv)
    try:
        text = sys.stdin.read() if arguments.events == "-" else Path(arguments.events).read_text()
    except OSError as error:
        raise InputError("EVENTS", arguments.events, f"cannot be read ({error})") from None
    draw(nodes_of(read_events(text.splitlines())), Path(arguments.out), arguments.title)
    print(f"wrote    {arguments.out}")


if __name__ == "__main__":
    run(main)
