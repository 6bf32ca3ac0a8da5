"""The log of a run (JSON lines and TensorBoard scalars), and the progress line that reads it.

Workers may run on other machines with hidden output. The driver therefore shows the content of
RUN/metrics.jsonl, which it shares with every worker.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from karma_ray.artifacts import (
    RunFolder,
    join,
    open_filesystem,
    read_lines,
    write_bytes,
    write_lines,
)
from karma_ray.errors import StorageError
from karma_ray.evaluation.alarm import messages
from karma_ray.training.checkpoints.files import CheckpointFiles
from karma_ray.training.checkpoints.outage import reason, redacted, retried

LOG = logging.getLogger(__name__)

FLUSH_SECONDS = 5.0
"""Time between two writes of a run log to an object store."""


class RunLog:
    """Appends records of one stage to RUN/metrics.jsonl and, for local runs, to TensorBoard.

    When a run is continued, `earlier` holds the records of the stage so far. No failure here ends
    the training: lines that cannot be written are kept for the next write that succeeds.
    """

    def __init__(self, run: str, stage: str, start_step: int = 0) -> None:
        """Open the log; raises StorageError when its existing lines cannot be read."""
        self._stage = stage
        uri = RunFolder(run).metrics_lines
        try:
            kept, self._seconds, dropped = retried(lambda: _kept_lines(uri, stage, start_step))
            self._lines: _LocalLines | _RemoteLines
            if "://" in run:
                self._lines = _RemoteLines(uri, kept)
            else:
                self._lines = _LocalLines(uri, kept if dropped else None)
        except Exception as error:
            raise StorageError("run log", redacted(uri), reason(error)) from error
        lines = (json.loads(text) for text in kept)
        self.earlier: list[dict[str, Any]] = [line for line in lines if line.get("stage") == stage]
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
        self._lines.add(json.dumps(line) + "\n")
        try:
            if self._writer is not None:
                for name, value in record.items():
                    if name != "step":
                        self._writer.add_scalar(f"{stage}/{name}", value, int(record["step"]))
                self._writer.flush()
        except OSError as error:
            LOG.warning("no more is written to the TensorBoard file: %s", reason(error))
            self._writer = None
        return line

    def flush(self) -> None:
        """Let waiting lines be written soon, as before a checkpoint from which a run may go on."""
        self._lines.flush()

    def close(self) -> None:
        """Write the waiting lines, and close the TensorBoard file."""
        self._lines.close()
        if self._writer is not None:
            self._writer.close()


def note_start(run: str, stage: str, machines: Sequence[str]) -> None:
    """Append to RUN/starts.jsonl that the workers of a stage start, on these machines by rank.

    `step` is that of the newest checkpoint, after which they go on. No failure here ends the run.
    """
    uri = RunFolder(run).path("starts.jsonl")
    try:
        steps = CheckpointFiles(join(run, "checkpoints", stage)).steps()
        start = {"stage": stage, "step": max(steps, default=0), "at": round(time.time(), 1),
                 "machines": list(machines)}  # fmt: skip
        write_lines([*read_lines(uri), start], uri)
    except Exception as error:
        LOG.warning("%s cannot be written: %s", redacted(uri), reason(error))


class _LocalLines:
    """Appends to a local file; lines that a full disk refused are written with the next line."""

    def __init__(self, path: str, lines: list[str] | None) -> None:
        """Open the file; `lines`, if given, replace its content."""
        self._path = path
        self._waiting = ""
        self._warned = False
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        if lines is not None:
            write_bytes("".join(lines).encode(), path)

    def add(self, line: str) -> None:
        self._waiting += line
        try:
            with open(self._path, "ab", buffering=0) as sink:
                begin = sink.tell()
                content = self._waiting.encode()
                if sink.write(content) < len(content):  # the disk filled up during the write
                    sink.truncate(begin)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._waiting = ""
        except OSError as error:
            if not self._warned:
                LOG.warning("%s cannot be written yet: %s", self._path, reason(error))
            self._warned = True

    def flush(self) -> None:
        if self._waiting:
            self.add("")

    def close(self) -> None:
        self.flush()


class _RemoteLines:
    """A log on an object store: kept in memory, and replaced as a whole by a thread.

    Appending would read and rewrite the whole object for every line, and an unavailable store
    would block the training until its client gives up.
    """

    def __init__(self, uri: str, lines: list[str]) -> None:
        self._fs, self._path = open_filesystem(uri)
        self._uri, self._lines, self._written = uri, lines, len(lines)
        self._closed, self._woken = threading.Event(), threading.Event()
        self._warned = False
        self._thread = threading.Thread(target=self._run, name="run log", daemon=True)
        self._thread.start()

    def add(self, line: str) -> None:
        self._lines.append(line)

    def flush(self) -> None:
        self._woken.set()

    def close(self) -> None:
        self._closed.set()
        self._woken.set()
        self._thread.join()
        try:
            retried(self._flush)
        except Exception as error:
            lost = len(self._lines) - self._written
            LOG.warning("%s lacks %d lines: %s", redacted(self._uri), lost, reason(error))

    def _run(self) -> None:
        while True:
            self._woken.wait(FLUSH_SECONDS)
            self._woken.clear()
            if self._closed.is_set():
                return
            try:
                self._flush()
            except Exception as error:
                if not self._warned:
                    LOG.warning("%s cannot be written yet: %s", redacted(self._uri), reason(error))
                self._warned = True

    def _flush(self) -> None:
        count = len(self._lines)
        if count > self._written:
            self._fs.pipe_file(self._path, "".join(self._lines[:count]).encode())
            self._written = count


def _kept_lines(uri: str, stage: str, start_step: int) -> tuple[list[str], float, bool]:
    """Return the lines to keep, the stage's training time so far, and whether any was dropped.

    Kept are the lines of other stages and of steps up to `start_step`; half-written ones are not.
    """
    fs, path = open_filesystem(uri)
    try:
        lines = fs.cat_file(path).decode(errors="replace").splitlines()
    except FileNotFoundError:
        return [], 0.0, False
    kept, seconds = [], 0.0
    for text in lines:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        mine = stage in (line.get("stage"), line.get("of"))
        if mine and line.get("step", 0) > start_step:
            continue
        kept.append(text + "\n")
        if mine:
            seconds = max(seconds, line.get("seconds", 0.0))
    return kept, seconds, len(kept) < len(lines)


class ProgressLine:
    """A tqdm line on stderr, updated by polling RUN/metrics.jsonl while workers train."""

    def __init__(self, run: str, stage: str, steps: int, shown: bool = True) -> None:
        self._uri = RunFolder(run).metrics_lines
        self._stage = stage
        self._period = 5.0 if "://" in run else 1.0
        self._done = threading.Event()
        self._told: set[str] = set()  # alarms already shown, also before the run was continued
        with suppress(Exception):  # unreadable now: these alarms are shown once more
            self._told = set().union(*read_lines(self._uri))
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
        except Exception:  # a half-written line or an unavailable store: try again next time
            return
        for line in mine:
            alarms = {name for name in line if name.startswith("alarm/")}
            if not alarms <= self._told:
                self._told |= alarms
                for message in messages(line):
                    LOG.warning("%s", message)
        if mine and mine[-1]["step"] != self._bar.n:
            self._bar.set_postfix_str(describe(mine[-1]), refresh=False)
            # The difference is negative after a worker has restarted from a checkpoint.
            self._bar.update(mine[-1]["step"] - self._bar.n)


def describe(record: Mapping[str, Any]) -> str:
    """Return the loss and speed as a short text."""
    parts = [f"loss {record['loss/total']:.3f}"] if "loss/total" in record else []
    for name, unit in (("examples_per_s", "examples/s"), ("tokens_per_s", "tokens/s")):
        if name in record:
            parts.append(f"{record[name]:.0f} {unit}")
    return ", ".join(parts)
