"""Who may write into a run: the process that started, or continued, it last.

Every start draws a number and leaves it in a file. Who finds another number there is a left-over
of a killed driver, or another person continues the run: it has to stop.
"""

from __future__ import annotations

import json
import threading
import time

from karma_ray.errors import StorageError
from karma_ray.training.checkpoints.files import CheckpointFiles
from karma_ray.training.checkpoints.outage import PATIENCE_S, reason, redacted, retried

REMOTE_CHECK_S = 10.0
"""Between two looks at an object store; a local file is looked at every time."""


class Ownership:
    """One start's claim; `uri` None claims nothing and is never lost."""

    def __init__(self, uri: str | None, start: int, patience: float = PATIENCE_S) -> None:
        self._uri, self._start, self._patience = uri, start, patience
        self._is_local = uri is None or CheckpointFiles(uri).is_local
        self._held = True
        self._looked = time.monotonic()
        self._thread: threading.Thread | None = None

    def claim(self) -> None:
        """Leave the number; raises StorageError."""
        if self._uri is None:
            return
        uri, content = self._uri, json.dumps({"start": self._start}).encode()
        try:
            retried(lambda: CheckpointFiles.put(uri, content), seconds=self._patience)
        except Exception as error:
            raise StorageError("run folder", redacted(uri), reason(error)) from error

    def look(self) -> bool:
        """Whether the number is still this start's; as before where the store does not answer."""
        if self._uri is not None:
            try:
                self._held = bool(
                    json.loads(CheckpointFiles.get(self._uri))["start"] == self._start
                )
            except Exception:
                return self._held
        return self._held

    def is_held(self) -> bool:
        """The same without waiting for an object store: as a thread found it lately."""
        if self._is_local:
            return self.look()
        due = time.monotonic() > self._looked + REMOTE_CHECK_S
        if due and (self._thread is None or not self._thread.is_alive()):
            self._looked = time.monotonic()
            self._thread = threading.Thread(target=self.look, name="ownership", daemon=True)
            self._thread.start()
        return self._held
