"""Ownership of a run: only the process that started or continued it last may write to it.

Every start draws a random number and writes it to a file. A process that finds another number
there was left over by a killed driver, or another person has continued the run; it must stop.
"""

from __future__ import annotations

import json
import threading
import time

from karma_ray.errors import StorageError
from karma_ray.training.checkpoints.files import CheckpointFiles
from karma_ray.training.checkpoints.outage import PATIENCE_S, reason, redacted, retried

REMOTE_CHECK_S = 10.0
"""Time between two checks of an object store; a local file is checked every time."""


class Ownership:
    """One start's claim to a run; with `uri` None nothing is claimed or lost."""

    def __init__(self, uri: str | None, start: int, patience: float = PATIENCE_S) -> None:
        self._uri, self._start, self._patience = uri, start, patience
        self._is_local = uri is None or CheckpointFiles(uri).is_local
        self._held = True
        self._looked = time.monotonic()
        self._thread: threading.Thread | None = None

    def claim(self) -> None:
        """Write the number of this start; raises StorageError."""
        if self._uri is None:
            return
        uri, content = self._uri, json.dumps({"start": self._start}).encode()
        try:
            retried(lambda: CheckpointFiles.put(uri, content), seconds=self._patience)
        except Exception as error:
            raise StorageError("run folder", redacted(uri), reason(error)) from error

    def look(self) -> bool:
        """Whether the file still has this start's number; unchanged if the store is away."""
        if self._uri is not None:
            try:
                self._held = bool(
                    json.loads(CheckpointFiles.get(self._uri))["start"] == self._start
                )
            except Exception:
                return self._held
        return self._held

    def is_held(self) -> bool:
        """The same without waiting for an object store: the result of a recent background check."""
        if self._is_local:
            return self.look()
        due = time.monotonic() > self._looked + REMOTE_CHECK_S
        if due and (self._thread is None or not self._thread.is_alive()):
            self._looked = time.monotonic()
            self._thread = threading.Thread(target=self.look, name="ownership", daemon=True)
            self._thread.start()
        return self._held
