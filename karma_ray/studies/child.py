"""What a child process of a study does; little is imported here, so that it starts quickly."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from karma_ray.runs import stopping

LOG = logging.getLogger(__name__)


def work(
    pipe: Connection, threads: int, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    """Call a function, and send (result, None) or (None, reason) through the pipe."""
    import torch

    stopping.stop_on_signals()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    try:
        found = function(*arguments)
    except Exception as error:
        LOG.exception("%s failed", function.__name__)
        pipe.send((None, str(error) or type(error).__name__))
        return
    pipe.send((found, None))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
