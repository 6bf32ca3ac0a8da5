"""What a store out of reach looks like, and waiting until it is back."""

from __future__ import annotations

import errno
import re
import threading
import time
from collections.abc import Callable
from typing import TypeVar

PATIENCE_S = 300.0
"""How long a store may be away before a write, or a read at the start, is given up."""
LONGEST_WAIT_S = 10.0
"""Between two tries: an outage costs at most so much longer than it lasted."""

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""No room: waiting seldom helps, and the half-written files are what has to go first."""
LASTING = FULL | {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR,
    errno.ENAMETOOLONG, errno.EEXIST,
}  # fmt: skip
CLIENT_ERRORS = frozenset(
    {"botocore.HTTPClientError", "botocore.ConnectionError", "botocore.IncompleteReadError",
     "aiohttp.ClientError", "urllib3.HTTPError", "requests.ConnectionError"}
)  # fmt: skip
"""Base classes by package and name: the clients of object stores raise no OSError."""

Result = TypeVar("Result")


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed later: refused, reset, timed out, answered with 5xx."""
    if isinstance(error, FileNotFoundError | PermissionError | FileExistsError):
        return False  # also when a client built them from a message, without a number
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
    """`action()`, again after each transient error, waiting twice as long each time.

    Raises the last error when `seconds` are over, any other error at once. Once `hurried` is
    set, the next failure is the last.
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
    """An error in one line, without the credentials that a URI may carry."""
    return redacted(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def redacted(text: str) -> str:
    """`text` without what stands between `://` and `@`."""
    return re.sub(r"://[^/@\s]+@", "://***@", text)
