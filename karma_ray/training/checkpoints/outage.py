"""Outages of a store: which errors are transient, and retrying until the store is back."""

from __future__ import annotations

import errno
import re
import threading
import time
from collections.abc import Callable
from typing import TypeVar

PATIENCE_S = 300.0
"""How long a store may be unavailable before a write, or a read at the start, fails."""
LONGEST_WAIT_S = 10.0
"""Longest pause between two tries, which is the most that an outage costs beyond its length."""

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Errors of a full disk: waiting rarely helps, and the half-written files must go first."""
LASTING = FULL | {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR,
    errno.ENAMETOOLONG, errno.EEXIST,
}  # fmt: skip
CLIENT_ERRORS = frozenset(
    {"botocore.HTTPClientError", "botocore.ConnectionError", "botocore.IncompleteReadError",
     "aiohttp.ClientError", "urllib3.HTTPError", "requests.ConnectionError"}
)  # fmt: skip
"""Base classes by package and name, since clients of object stores do not raise OSError."""

Result = TypeVar("Result")


def is_transient(error: BaseException) -> bool:
    """Whether the request may succeed later: it was refused, reset, timed out or got a 5xx."""
    if isinstance(error, FileNotFoundError | PermissionError | FileExistsError):
        return False  # clients may build these from a message, without an error number
    if isinstance(error, OSError):
        return error.errno not in LASTING
    names = {f"{kind.__module__.split('.')[0]}.{kind.__name__}" for kind in type(error).__mro__}
    if names & CLIENT_ERRORS:
        return True
    response = getattr(error, "response", None)
    found = response.get("ResponseMetadata", {}) if isinstance(response, dict) else {}
    status = found.get("HTTPStatusCode", getattr(error, "code", None))
    return isinstance(status, int) and (status >= 500 or status == 429)


def retried(
    action: Callable[[], Result],
    *,
    seconds: float = PATIENCE_S,
    hurried: threading.Event | None = None,
) -> Result:
    """Call `action()` again after each transient error, doubling the pause each time.

    Raises the last error after `seconds`, and any other error at once. Once `hurried` is set,
    the next error is raised.
    """
    deadline, wait = time.monotonic() + seconds, 0.5
    hurried = hurried or threading.Event()
    while True:
        try:
            return action()
        except Exception as error:
            late = time.monotonic() + wait > deadline
            if late or hurried.is_set() or not is_transient(error):
                raise
        hurried.wait(wait)
        wait = min(2 * wait, LONGEST_WAIT_S)


def reason(error: BaseException) -> str:
    """Return an error as one line, without the credentials that a URI may contain."""
    return redacted(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def redacted(text: str) -> str:
    """Return `text` without the credentials between `://` and `@`."""
    return re.sub(r"://[^/@\s]+@", "://***@", text)
