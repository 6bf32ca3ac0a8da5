"""The process of an endpoint: reserving its port, and ending on a signal."""

from __future__ import annotations

import errno
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from karma_ray.errors import InputError

LOG = logging.getLogger(__name__)


def check_port(port: int) -> None:
    """Raise InputError unless `port` is the number of one."""
    if not 0 < port < 65536:
        raise InputError("--port", port, "must lie between 1 and 65535")


def free_port() -> int:
    """Return a port of this machine that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def held_port(host: str, port: int) -> Iterator[None]:
    """Reserve `port` of `host` for the endpoint that is started in the block.

    Serve opens its port as shareable, so a second endpoint would start silently and both would
    answer in turn. Binding the port exclusively first fails if any program listens on it. A name
    that belongs to the port, and is freed with the block, shows that an endpoint is still
    starting. Raises InputError.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise InputError("--host", host, f"is not an address ({error})") from None
    with socket.socket(socket.AF_UNIX) as name, socket.socket(family) as probe:
        # Ignore connections of an endpoint that has just ended, which linger on its port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            if sys.platform == "linux":
                name.bind(f"\0karma_ray/port/{port}")
            probe.bind(address)
        except OSError as error:
            raise _refusal(host, port, error) from None
        probe.close()
        yield


def run_until_signal(
    start: Callable[[], None], take_down: Callable[[], None], within_s: float
) -> NoReturn:
    """Call `start`, wait for SIGINT or SIGTERM, call `take_down`, and end this process.

    The exit code is 0 after `start` has returned, and 128 + signal before. A signal to the whole
    process group also ends Ray's processes; `take_down` would then wait a minute for their answer
    and abort. It is therefore given `within_s` seconds, and the rest ends with this process.
    """
    raise_on_signals()
    code = 0
    try:
        start()
        _wait()
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except SystemExit:
        code = 128 + signal.SIGTERM
    _ignore_signals()
    LOG.info("stopping")
    ending = threading.Thread(target=take_down, daemon=True)
    ending.start()
    ending.join(within_s)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # Ray's own exit handlers would wait for its processes again


def raise_on_signals() -> None:
    """Let SIGINT raise KeyboardInterrupt and SIGTERM SystemExit; call it again after Ray starts.

    Ray installs a handler that aborts with a stack of addresses.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


def _wait() -> None:
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    while not stop.wait(1.0):
        pass


def _ignore_signals() -> None:
    """Ignore further signals: `timeout` signals its child first and then the child's group."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _refusal(host: str, port: int, error: OSError) -> InputError:
    if error.errno == errno.EADDRINUSE:
        return InputError("--port", port, f"is used by another program on {host}; name a free one")
    if error.errno == errno.EACCES:
        return InputError("--port", port, "may not be opened by this user; use one above 1023")
    return InputError("--host", host, f"cannot be listened on ({error.strerror})")
