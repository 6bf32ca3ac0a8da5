"""The checkpoint store: writes in the background, commits by a marker, reads complete ones only.

    FOLDER/ step-0000200/ parts of every worker, done-RANK.json, at last checkpoint.json
            best.json     {checkpoint, metric, value}

* `save` copies the state to CPU memory on the training thread; another thread writes it. Only one
  write is in flight: a second `save` waits for it. No thread uses a collective: worker r writes
  `done-r.json`, and rank 0's thread waits for all of these files and commits.
* `checkpoint.json` lists every file with its size and checksum. A folder without it, or with
  other files, is incomplete: `restore` warns and uses the next older one.
* Nothing is renamed and the marker is written last, so the scheme works on object stores.
* Writes are retried while a store is unavailable (outage.py). A checkpoint that finally fails
  causes a warning and does not stop the training.
* A process left over by a killed driver can no longer commit anything (ownership.py).
"""

from __future__ import annotations

import errno
import json
import logging
import math
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from karma_ray.errors import StorageError
from karma_ray.training.checkpoints.checkpoint import MARKER, Progress, Snapshot, take_snapshot
from karma_ray.training.checkpoints.files import (
    CheckpointFiles,
    IncompleteCheckpoint,
    checksum,
    fetched,
    step_name,
    step_of,
)
from karma_ray.training.checkpoints.outage import PATIENCE_S, reason, redacted, retried
from karma_ray.training.checkpoints.ownership import Ownership
from karma_ray.training.parallel import is_parallel, rank

LOG = logging.getLogger(__name__)

COMMIT_TIMEOUT_S = 600.0
"""How long rank 0 waits for the parts of the other workers."""
HURRIED_TIMEOUT_S = 20.0
"""The same after the training has ended with an error."""


class CheckpointStore:
    """The checkpoints of one stage, from the view of one worker."""

    def __init__(
        self,
        folder: str,
        *,
        keep: int = 2,
        best_metric: str = "",
        owner: str | None = None,
        device: torch.device | str = "cpu",
        patience: float = PATIENCE_S,
        commit_timeout: float = COMMIT_TIMEOUT_S,
    ) -> None:
        """Every worker must create one at the same time, with the same arguments.

        The `keep` newest checkpoints are kept, and the best by `best_metric` (higher is better).
        `owner` is the file for the number of this start; without it no other start is excluded.
        Raises StorageError when it cannot be written.
        """
        self._folder, self._files = folder, CheckpointFiles(folder)
        self._keep, self._best_metric = max(1, keep), best_metric
        self._device, self._patience, self._timeout = device, patience, commit_timeout
        self._hurried = threading.Event()
        self._writer: threading.Thread | None = None
        self._restored, self._committed = -1, set[int]()
        self._best: tuple[int, float] | None = None
        self.stall_seconds = 0.0
        """Time that `save` cost the training: copying, and waiting for the previous write."""
        self.failed: list[int] = []
        """Steps whose checkpoint could not be written (on rank 0)."""
        self._start = self._agreed(secrets.randbits(62))
        self._ownership = Ownership(owner, self._start, patience)
        if rank() == 0:
            self._ownership.claim()

    def is_owner(self) -> bool:
        """Whether no other process has started this training since (ownership.py)."""
        return self._ownership.is_held()

    def restore(self, read: Callable[[Path], Progress]) -> Progress | None:
        """Call `read(local folder)` for the newest complete checkpoint, the same on all workers.

        Raises StorageError when the store stays unavailable.
        """
        with ExitStack() as opened:
            step, folder = -1, None
            try:
                if rank() == 0:
                    step, folder = self._newest(opened)
                step = self._restored = self._agreed(step)
                if step < 0:
                    return None
                name = step_name(step)
                folder = folder or self._retried(partial(fetched, self._files, name, opened, False))
            except Exception as error:
                raise StorageError("checkpoint", redacted(self._folder), reason(error)) from error
            return read(folder)

    def save(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        progress: Progress,
        *,
        score: float | None = None,
        generator: np.random.Generator | None = None,
    ) -> None:
        """Copy this worker's part and write it in the background; every worker must call it.

        `score` is the value of `best_metric` at this step, if it was measured.
        """
        started = time.perf_counter()
        self.wait()
        snapshot = take_snapshot(model, optimizer, progress, generator=generator)
        self.stall_seconds += time.perf_counter() - started
        # A daemon thread, so that an interrupted process can end while a store is unavailable.
        self._writer = threading.Thread(
            target=self._write, args=(snapshot, score), name="checkpoint", daemon=True
        )
        self._writer.start()

    def wait(self) -> None:
        """Wait for the write in flight."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None

    def finish(self, hurried: bool = False) -> None:
        """Wait for the write in flight; `hurried` (after an error) stops further retries."""
        if hurried:
            self._hurried.set()
        self.wait()

    def _agreed(self, value: int) -> int:
        """Return rank 0's value on every worker."""
        if not is_parallel():
            return value
        shared = torch.tensor([value], dtype=torch.int64, device=self._device)
        dist.broadcast(shared, 0)
        return int(shared.item())

    def _retried(self, action: Callable[[], Any]) -> Any:
        return retried(action, seconds=self._patience, hurried=self._hurried)

    def _newest(self, opened: ExitStack) -> tuple[int, Path | None]:
        for step in reversed(self._retried(self._files.steps)):
            name = step_name(step)
            try:
                folder = self._retried(partial(fetched, self._files, name, opened))
            except IncompleteCheckpoint as reason:
                LOG.warning(
                    "checkpoint %s is incomplete (%s); the next older one is used", name, reason
                )
                continue
            self._read_best(step)
            return step, folder
        return -1, None

    def _read_best(self, newest: int) -> None:
        """Load the best score so far, unless it belongs to a step after the restored one."""
        found = self._retried(lambda: self._files.document("best.json"))
        step = step_of(str((found or {}).get("checkpoint")))
        if found and step is not None and found.get("metric") == self._best_metric:
            self._best = (step, float(found["value"])) if step <= newest else None

    def _write(self, snapshot: Snapshot, score: float | None) -> None:
        """Run in the background: write this worker's part and, on rank 0, commit."""
        name = step_name(snapshot.step)
        try:
            if not self._ownership.look():
                return
            self._write_part(name, snapshot)
            if snapshot.rank == 0:
                self._commit(name, snapshot)
        except Exception as error:
            self._give_up(name, snapshot, error)
            return
        if snapshot.rank == 0:
            self._committed.add(snapshot.step)
            self._tidy(snapshot.step, score)

    def _write_part(self, name: str, snapshot: Snapshot) -> None:
        if snapshot.rank == 0:
            # An earlier start may have committed this step, whose files are now overwritten.
            self._retried(lambda: self._files.remove(f"{name}/{MARKER}"))
        files: dict[str, Any] = {}
        for file, content in snapshot.files():
            self._retried(partial(self._files.write, f"{name}/{file}", content))
            files[file] = {"size": len(content), "blake2b": checksum(content)}
        self._say_done(name, snapshot.rank, {"files": files})

    def _say_done(self, name: str, of: int, facts: dict[str, Any]) -> None:
        content = json.dumps({"start": self._start, **facts}).encode()
        self._retried(lambda: self._files.write(f"{name}/done-{of}.json", content))

    def _commit(self, name: str, snapshot: Snapshot) -> None:
        files: dict[str, Any] = {}
        begun = time.monotonic()
        for other in range(snapshot.num_workers):
            while (done := self._done(name, other)) is None:
                limit = HURRIED_TIMEOUT_S if self._hurried.is_set() else self._timeout
                if time.monotonic() - begun > limit:
                    raise TimeoutError(f"worker {other} has not written its part")
                time.sleep(self._files.poll_seconds)
            if "failed" in done:
                raise OSError(errno.ENOSPC, f"worker {other}: {done['failed']}")
            files |= done["files"]
        if not self._ownership.look():
            raise PermissionError("another process continues this run")
        manifest = {"step": snapshot.step, "num_workers": snapshot.num_workers, "files": files}
        content = json.dumps(manifest, indent=2).encode()
        self._retried(lambda: self._files.write(f"{name}/{MARKER}", content))

    def _done(self, name: str, of: int) -> dict[str, Any] | None:
        """Return what worker `of` wrote in this start; files of earlier starts are ignored."""
        found: dict[str, Any] | None = self._retried(
            lambda: self._files.document(f"{name}/done-{of}.json")
        )
        return found if found and found.get("start") == self._start else None

    def _give_up(self, name: str, snapshot: Snapshot, error: Exception) -> None:
        """Remove the partial files, tell the waiting rank 0, and warn once."""
        if snapshot.rank > 0:
            try:
                self._files.remove_parts(name, snapshot.rank)
                self._say_done(name, snapshot.rank, {"failed": reason(error)})
            except Exception as second:
                LOG.warning("checkpoint %s: %s; then %s", name, reason(error), reason(second))
            return
        self.failed.append(snapshot.step)
        try:
            self._files.remove(name)
        except Exception:
            LOG.debug("could not remove the partial %s", name, exc_info=True)
        last = max([self._restored, *self._committed])
        resumed = step_name(last) if last >= 0 else "the start"
        LOG.warning(
            "checkpoint %s was not saved: %s; training continues, and if it is interrupted it will "
            "be resumed from %s", name, reason(error), resumed,
        )  # fmt: skip

    def _tidy(self, step: int, score: float | None) -> None:
        """Record the best checkpoint, and remove those older than the newest `keep`."""
        try:
            if score is not None and math.isfinite(score):
                self._point_at_best(step, score)
            # Steps after the restored one are from this start, or were incomplete.
            whole = [
                s for s in self._retried(self._files.steps)
                if s in self._committed or (s <= self._restored and self._files.has_marker(s))
            ]  # fmt: skip
            kept = {*sorted(whole)[-self._keep :], *([self._best[0]] if self._best else [])}
            for other in self._files.steps():
                # Other workers may already be writing a newer one.
                if other < step and other not in kept:
                    self._retried(partial(self._files.remove, step_name(other)))
        except Exception as error:
            LOG.warning("older checkpoints could not be removed: %s", reason(error))

    def _point_at_best(self, step: int, score: float) -> None:
        if self._best is not None and score <= self._best[1]:
            return
        best = {"checkpoint": step_name(step), "metric": self._best_metric, "value": score}
        self._retried(lambda: self._files.write("best.json", json.dumps(best, indent=2).encode()))
        self._best = (step, score)
