"""The alarm against each bound, and a real tiny model that is made to collapse."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from karma_ray.artifacts import read_lines, write_json
from karma_ray.evaluation.alarm import KINDS, Alarm, messages
from karma_ray.objectives.losses import ObjectiveConfig
from karma_ray.report.page import render_report
from karma_ray.runs.batches import WorkerContext
from karma_ray.runs.training import run_training
from karma_ray.runs.worker import TrainJob
from karma_ray.training.config import TrainingConfig
from karma_ray.training.step import JointStep
from karma_ray.training.step_state import StepState
from tests import tiny

HEALTHY = {
    "collapse/effective_rank_e": 40.0, "collapse/effective_rank_h": 12.0,
    "collapse/mean_cosine_e": 0.3, "collapse/mean_cosine_h": 0.1, "negatives/surviving": 430.0,
    "negatives/pool": 450.0, "decode_gap": 0.15, "collapse/content_sink": 20.0,
}  # fmt: skip


def record(step: int = 10, **changes: float) -> dict[str, float]:
    names = {name.rsplit("/", 1)[-1]: name for name in HEALTHY}
    return {**HEALTHY, "step": step, **{names[key]: value for key, value in changes.items()}}


def alarm() -> Alarm:
    return Alarm(width=64, steps=100)


def test_a_healthy_training_is_left_in_peace() -> None:
    watched = alarm()
    assert [watched(record(step)) for step in range(10, 101, 10)] == [{}] * 10


@pytest.mark.parametrize(
    ("kind", "quantity", "just_there", "too_far", "bound"),
    [
        ("effective_rank_e", "effective_rank_e", 6.5, 6.3, 6.4),
        ("effective_rank_h", "effective_rank_h", 3.3, 3.1, 3.2),
        ("mean_cosine_e", "mean_cosine_e", 0.9, 0.91, 0.9),
        ("mean_cosine_h", "mean_cosine_h", 0.9, 0.99, 0.9),
        ("negatives", "surviving", 113.0, 112.0, 112.5),
        ("decode_gap", "decode_gap", 0.031, 0.029, 0.03),
        ("content_sink", "content_sink", 45.0, 45.5, 45.0),
    ],
)
def test_a_bound_is_told_once_with_the_numbers(
    kind: str, quantity: str, just_there: float, too_far: float, bound: float
) -> None:
    watched = alarm()
    assert watched(record(10)) == {}
    assert watched(record(20, **{quantity: just_there})) == {}
    for step in (30, 40):  # for a moment only
        assert watched(record(step, **{quantity: too_far})) == {}
    assert watched(record(50)) == {}
    for step in (60, 70):
        assert watched(record(step, **{quantity: too_far})) == {}
    crossed = record(80, **{quantity: too_far})
    found = watched(crossed)
    assert found == {f"alarm/{kind}": pytest.approx(bound)}
    (message,) = messages({**crossed, **found})
    assert f"at step 80: {KINDS[kind].name} is {too_far:.3g}" in message
    assert f"{bound:.3g}" in message and "What usually helps: " in message
    assert watched(record(90)) == {}
    assert [watched(record(step, **{quantity: too_far})) for step in range(91, 100)] == [{}] * 9


def test_few_items_bound_the_rank_that_can_be_asked_for() -> None:
    few = record(10, effective_rank_e=6.3, effective_rank_h=6.0, pool=20.0, surviving=19.0)
    assert alarm()(few) == {}


def test_a_gap_that_never_opens_is_told_in_the_second_half() -> None:
    watched = alarm()
    found = [watched(record(step, decode_gap=0.01)) for step in (40, 50, 60, 70, 80)]
    assert found == [{}, {}, {}, {}, {"alarm/decode_gap": 0.02}]


def test_sinks_that_the_checkpoint_brought_along_are_no_collapse() -> None:
    watched = alarm()
    assert watched(record(10, content_sink=80.0)) == watched(record(20, content_sink=90.0)) == {}


def test_what_was_not_measured_says_nothing() -> None:
    assert alarm()({"step": 10, "loss/total": 1.0}) == {}
    assert alarm()(record(10, mean_cosine_e=float("nan"))) == {}


def test_a_continued_training_knows_what_was_told() -> None:
    first, lines = alarm(), []
    for step, cosine in ((10, 0.3), (20, 0.95), (30, 0.95), (40, 0.95), (50, 0.95)):
        line = record(step, mean_cosine_e=cosine)
        lines.append({**line, **first(line)})
    model = tiny.model()
    again = Alarm.of(model, 100, lines)
    assert again is not None
    assert (again.width, again.told, again.highest) == (32, first.told, first.highest)
    assert first.told == {"mean_cosine_e"} and again(record(60, mean_cosine_e=0.95)) == {}
    cut = Alarm.of(model, 100, lines[:3])  # in the middle of a row
    assert cut is not None and cut(lines[3]).keys() == {"alarm/mean_cosine_e"}
    assert Alarm.of(nn.Linear(2, 2), 100, lines) is None


def build(collapsed: bool) -> nn.Module:
    """A tiny model, whitened; or one whose items are all but equal, and stay so."""
    model = tiny.model(decodes=False)
    tokens, lengths = tiny.item_tokens()
    encoder = model.interest.item_encoder
    encoder.whiten(
        torch.from_numpy(tokens).long(), torch.from_numpy(lengths), torch.arange(len(lengths))
    )
    if collapsed:
        encoder.mean += 1000.0
    return model


def batches(context: WorkerContext) -> Iterator[Any]:
    return (tiny.batch(tiny.shop(8, seed), seed) for seed in range(context.start_step, 6))


def job(run: str, collapsed: bool, steps: int = 4) -> TrainJob:
    step = JointStep(ObjectiveConfig(generation=0.0, reconstruction=0.0))
    return TrainJob(
        run=run,
        stage="joint",
        build=partial(build, collapsed),
        step=step,
        make_batches=batches,
        training=TrainingConfig(
            steps=steps, learning_rate=1e-5, report_every=1, checkpoint_every=2, num_workers=0,
            precision="float32",
        ),
        probe=step.probe,  # type: ignore[arg-type]
    )  # fmt: skip


def test_a_training_that_collapses_warns_once_in_log_record_and_report(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = str(tmp_path / "run")
    with caplog.at_level(logging.WARNING):
        run_training(job(run, collapsed=True), progress=False)
    lines = list(read_lines(f"{run}/metrics.jsonl"))
    told = [name for line in lines for name in line if name.startswith("alarm/")]
    assert {"alarm/effective_rank_e", "alarm/mean_cosine_e"} <= set(told)
    assert len(told) == len(set(told))
    assert {"alarm/effective_rank_e", "alarm/mean_cosine_e"} <= lines[2].keys()
    warnings = [message for message in caplog.messages if "collapse alarm" in message]
    assert warnings == [message for line in lines for message in messages(line)]
    write_json({"recipe": "action_only"}, f"{run}/config.json")
    text = Path(render_report(run)).read_text()
    assert "Collapse alarm at step 3: the effective rank of the items e is" in text


def test_a_training_that_does_not_collapse_does_not_warn(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = str(tmp_path / "run")
    run_training(job(run, collapsed=False), progress=False)
    told = {name for line in read_lines(f"{run}/metrics.jsonl") for name in line}
    # Nobody has trained its decoder: that there are no words in h is true.
    assert {name for name in told if name.startswith("alarm/")} <= {"alarm/decode_gap"}


def test_a_resumed_training_does_not_warn_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = str(tmp_path / "run")

    def cut(model: nn.Module, step: int, state: StepState) -> StepState:
        if step == 5:
            raise KeyboardInterrupt
        return state

    from dataclasses import replace

    with pytest.raises(KeyboardInterrupt):
        run_training(replace(job(run, True, steps=6), before_step=cut), progress=False)
    caplog.clear()
    run_training(job(run, True, steps=6), resume=True, progress=False)
    assert [line["step"] for line in read_lines(f"{run}/metrics.jsonl")][:6] == [1, 2, 3, 4, 5, 6]
    assert not [message for message in caplog.messages if "items e" in message]
