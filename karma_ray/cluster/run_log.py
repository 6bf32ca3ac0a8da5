"""The run's own record: JSON lines and TensorBoard scalars, and a progress line that reads it.

Workers may be on other machines and their output hidden, so the driver shows what stands in
RUN/metrics.jsonl, the one thing that it shares with every worker.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from tqdm import tqdm

from karma_ray.artifacts import RunFolder, open_filesystem, read_lines


class RunLog:
    """Appends records of one stage to RUN/metrics.jsonl and to TensorBoard (local runs)."""

    def __init__(self, run: str, stage: str, start_step: int = 0) -> None:
        self._stage = stage
        self._uri = RunFolder(run).metrics_lines
        self._seconds = _drop_after(self._uri, stage, start_step)
        self._writer: Any = None
        if "://" not in run:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(run)

    def add(self, record: Mapping[str, float], stage: str | None = None) -> dict[str, Any]:
        """Append a record; `seconds` becomes the training time of the stage so far."""
        stage = stage or self._stage
        self._seconds += record.get("seconds", 0.0)
        line = {"stage": stage, **record, "seconds": round(self._seconds, 3)}
        if stage != self._stage:
            line["of"] = self._stage
        fs, path = open_filesystem(self._uri)
        fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
        with fs.open(path, "ab") as sink:
            sink.write((json.dumps(line) + "\n").encode())
        if self._writer is not None:
            for name, value in record.items():
                if name != "step":
                    self._writer.add_scalar(f"{stage}/{name}", value, int(record["step"]))
            self._writer.flush()
        return line

    def close(self) -> None:
        """Close the TensorBoard file."""
        if self._writer is not None:
            self._writer.close()


def _drop_after(uri: str, stage: str, start_step: int) -> float:
    """Drop the stage's lines after the step resumed from; returns its training time so far."""
    lines = list(read_lines(uri))
    kept, seconds = [], 0.0
    for line in lines:
        mine = stage in (line.get("stage"), line.get("of"))
        if mine and line.get("step", 0) > start_step:
            continue
        kept.append(line)
        if mine:
            seconds = max(seconds, line.get("seconds", 0.0))
    if len(kept) < len(lines):
        fs, path = open_filesystem(uri)
        with fs.open(path, "wb") as sink:
            sink.write("".join(json.dumps(line) + "\n" for line in kept).encode())
    return seconds


class ProgressLine:
    """A tqdm line on stderr, fed by polling RUN/metrics.jsonl while workers train elsewhere."""

    def __init__(self, run: str, stage: str, steps: int, shown: bool = True) -> None:
        self._uri = RunFolder(run).metrics_lines
        self._stage = stage
        self._period = 5.0 if "://" in run else 1.0
        self._done = threading.Event()
        self._bar: Any = tqdm(
            total=steps,
            unit="step",
            desc=stage,
            file=sys.stderr,
            disable=not shown,
            mininterval=0.5 if sys.stderr.isatty() else 10.0,
            dynamic_ncols=True,
        )
        self._thread = threading.Thread(target=self._poll, daemon=True)

    def __enter__(self) -> ProgressLine:
        if not self._bar.disable:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10)
        self._bar.close()

    def _poll(self) -> None:
        while not self._done.wait(self._period):
            self._show()
        self._show()

    def _show(self) -> None:
        try:
            mine = [line for line in read_lines(self._uri) if line["stage"] == self._stage]
        except (OSError, ValueError):  # a line half written, or a store out of reach: next time
            return
        if mine and mine[-1]["step"] != self._bar.n:
            self._bar.set_postfix_str(describe(mine[-1]), refresh=False)
            # Negative after a worker was restarted from a checkpoint.
            self._bar.update(mine[-1]["step"] - self._bar.n)


def describe(record: Mapping[str, Any]) -> str:
    """Loss and speed in a few words."""
    parts = [f"loss {record['loss/total']:.3f}"] if "loss/total" in record else []
    for name, unit in (("examples_per_s", "examples/s"), ("tokens_per_s", "tokens/s")):
        if name in record:
            parts.append(f"{record[name]:.0f} {unit}")
    return ", ".join(parts)
