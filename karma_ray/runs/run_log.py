"""The run's own record: JSON lines and TensorBoard scalars, and a progress line that reads it.

Workers may be on other machines and their output hidden, so the driver shows what stands in
RUN/metrics.jsonl, the one thing that it shares with every worker.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from karma_ray.artifacts import RunFolder, open_filesystem, read_lines
from karma_ray.errors import StorageError
from karma_ray.evaluation.alarm import messages
from karma_ray.training.checkpoints.outage import reason, redacted, retried

LOG = logging.getLogger(__name__)

FLUSH_SECONDS = 5.0
"""Between two writes of a run log on an object store."""


class RunLog:
    """Appends records of one stage to RUN/metrics.jsonl and to TensorBoard (local runs).

    `earlier` are the stage's records so far, of a run that is continued. Nothing here ends a
    training: lines that cannot be written wait for the next that can be.
    """

    def __init__(self, run: str, stage: str, start_step: int = 0) -> None:
        """Raises StorageError when the lines so far cannot be read."""
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
            LOG.warning("TensorBoard's file ends here: %s", reason(error))
            self._writer = None
        return line

    def close(self) -> None:
        """Write what waits, and close the TensorBoard file."""
        self._lines.close()
        if self._writer is not None:
            self._writer.close()


class _LocalLines:
    """Appends to a local file; what a full disk refused is written with the next line."""

    def __init__(self, path: str, lines: list[str] | None) -> None:
        """`lines` replace the file."""
        self._path = path
        self._waiting = ""
        self._warned = False
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        if lines is not None:
            temporary = f"{path}.{os.getpid()}.tmp"
            Path(temporary).write_text("".join(lines), encoding="utf-8")
            os.replace(temporary, path)

    def add(self, line: str) -> None:
        self._waiting += line
        try:
            with open(self._path, "ab", buffering=0) as sink:
                begin = sink.tell()
                content = self._waiting.encode()
                if sink.write(content) < len(content):  # the disk became full on the way
                    sink.truncate(begin)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._waiting = ""
        except OSError as error:
            if not self._warned:
                LOG.warning("%s waits to be written: %s", self._path, reason(error))
            self._warned = True

    def close(self) -> None:
        if self._waiting:
            self.add("")


class _RemoteLines:
    """An object: held in memory and replaced as a whole, by a thread, every few seconds.

    Appending would read and write it all for every line, and a store that is away would stop
    the training for as long as its client tries.
    """

    def __init__(self, uri: str, lines: list[str]) -> None:
        self._fs, self._path = open_filesystem(uri)
        self._uri, self._lines, self._written = uri, lines, len(lines)
        self._closed = threading.Event()
        self._warned = False
        self._thread = threading.Thread(target=self._run, name="run log", daemon=True)
        self._thread.start()

    def add(self, line: str) -> None:
        self._lines.append(line)

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
        try:
            retried(self._flush)
        except Exception as error:
            lost = len(self._lines) - self._written
            LOG.warning("%s lacks %d lines: %s", redacted(self._uri), lost, reason(error))

    def _run(self) -> None:
        while not self._closed.wait(FLUSH_SECONDS):
            try:
                self._flush()
            except Exception as error:
                if not self._warned:
                    LOG.warning("%s waits to be written: %s", redacted(self._uri), reason(error))
                self._warned = True

    def _flush(self) -> None:
        count = len(self._lines)
        if count > self._written:
            self._fs.pipe_file(self._path, "".join(self._lines[:count]).encode())
            self._written = count


def _kept_lines(uri: str, stage: str, start_step: int) -> tuple[list[str], float, bool]:
    """The lines of other stages and of steps up to the one resumed from, the stage's training
    time so far, and whether any line was left out (a half-written one is)."""
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
    """A tqdm line on stderr, fed by polling RUN/metrics.jsonl while workers train elsewhere."""

    def __init__(self, run: str, stage: str, steps: int, shown: bool = True) -> None:
        self._uri = RunFolder(run).metrics_lines
        self._stage = stage
        self._period = 5.0 if "://" in run else 1.0
        self._done = threading.Event()
        self._told: set[str] = set()  # alarms, also those of the run that is continued
        with suppress(Exception):  # out of reach: they are told once more
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
        except Exception:  # a line half written, or a store out of reach: next time
            return
        for line in mine:
            alarms = {name for name in line if name.startswith("alarm/")}
            if not alarms <= self._told:
                self._told |= alarms
                for message in messages(line):
                    LOG.warning("%s", message)
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
