"""benchmarks/timeline.py: the picture of who ran where, from hand-made events."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.timeline import Node, Span, lanes, main, nodes_of, read_events
from karma_ray.errors import InputError


def event(t: float, event: str, node: str, what: str = "") -> dict[str, Any]:
    return {"t": t, "event": event, "node": node, "what": what}


EVENTS = [
    event(0, "joined", "head"),
    event(5, "joined", "a"),
    event(6, "started", "a", "training"),
    event(7, "started", "a", "training"),
    event(9, "ended", "a", "training"),
    event(12, "left", "a", "killed"),
    event(15, "joined", "a"),
    event(16, "started", "a", "embedding"),
    event(20, "ended", "head", "what never started"),
]


def test_a_node_that_leaves_takes_its_work_with_it_and_may_join_again() -> None:
    head, a = nodes_of(EVENTS)
    assert head == Node("head", [Span(0, 20)], [])
    assert a.up == [Span(5, 12, "killed"), Span(15, 20)]
    assert a.work == [
        Span(6, 9, "training"), Span(7, 12, "training"), Span(16, 20, "embedding")
    ]  # fmt: skip


def test_work_at_the_same_time_is_drawn_side_by_side() -> None:
    assert lanes([Span(0, 5), Span(1, 9), Span(5, 7), Span(6, 8), Span(9, 10)]) == [0, 1, 0, 2, 0]


def test_lines_that_are_no_events_are_skipped_and_events_are_put_in_order() -> None:
    lines = ["a word", '{"result": 3}', "[1]", *(json.dumps(one) for one in EVENTS[::-1])]
    assert read_events(lines) == EVENTS


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"t": 1, "event": "gone", "node": "a"}', "gone"),
        ('{"t": 1, "event": "left"}', "no node"),
        ("{}", "nothing to draw"),
    ],
)
def test_what_cannot_be_drawn_is_refused_by_name(line: str, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        read_events([line])


def test_the_picture_names_nodes_and_work_and_is_the_same_every_time(tmp_path: Path) -> None:
    source = tmp_path / "events.jsonl"
    source.write_text("\n".join(json.dumps(one) for one in EVENTS))
    pictures = []
    for name in ("one.svg", "two.svg"):
        main([str(source), "--out", str(tmp_path / name), "--title", "A run"])
        pictures.append((tmp_path / name).read_bytes())
    assert pictures[0] == pictures[1] and len(pictures[0]) < 16_000
    for text in ("head", "training", "embedding", "× killed", "A run", "seconds"):
        assert f">{text}</text>" in pictures[0].decode()
