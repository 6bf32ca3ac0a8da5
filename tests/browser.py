"""A headless Chromium, spoken to over a pipe with its DevTools protocol: no driver, no package."""

from __future__ import annotations

import base64
import fcntl
import io
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from PIL import Image

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
WAIT_S = 60.0
"""Longest wait for anything; a loaded machine is slow, and nothing here is timed."""
KEYS = {
    "Enter": (13, "\r"), "Escape": (27, None), "Tab": (9, None), "ArrowLeft": (37, None),
    "ArrowUp": (38, None), "ArrowRight": (39, None), "ArrowDown": (40, None), "Space": (32, " "),
}  # fmt: skip


def find() -> str | None:
    """Return the program, installing the system's package if this user may; None without one."""
    for name in NAMES:
        if path := shutil.which(name):
            return path
    if os.geteuid() == 0 and shutil.which("apt-get"):
        for command in (["update", "-qq"], ["install", "-y", "-qq", "chromium"]):
            subprocess.run(["apt-get", *command], capture_output=True, timeout=300, check=False)
    return shutil.which("chromium")


class Browser:
    """One process; each tab has cookies and a session of its own."""

    def __init__(self, program: str) -> None:
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        to_browser, from_browser = os.pipe(), os.pipe()
        # Chromium reads from 3 and writes to 4; higher copies are not overwritten on the way.
        ends = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (to_browser[0], from_browser[1])]
        self._process = subprocess.Popen(
            [
                program, "--headless=new", "--remote-debugging-pipe", "--no-sandbox",
                "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--mute-audio",
                "--disable-background-networking", "--disable-extensions", "--hide-scrollbars",
                f"--user-data-dir={self._profile.name}", "about:blank",
            ],
            preexec_fn=lambda: (os.dup2(ends[0], 3), os.dup2(ends[1], 4)),
            pass_fds=(3, 4, *ends), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        for fd in (to_browser[0], from_browser[1], *ends):
            os.close(fd)
        self._write, self._read = to_browser[1], from_browser[0]
        self._buffer, self._last, self._answers = b"", 0, {}
        self.events: list[dict[str, Any]] = []

    def send(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Return the answer to a command; events that come before it are kept."""
        self._last += 1
        number = self._last
        command = {"id": number, "method": method, "params": params}
        if session:
            command["sessionId"] = session
        os.write(self._write, json.dumps(command).encode() + b"\0")
        end = time.monotonic() + WAIT_S
        while number not in self._answers:
            if time.monotonic() > end:
                raise TimeoutError(f"{method} was not answered")
            self._receive(1.0)
        answer = self._answers.pop(number)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        found: dict[str, Any] = answer["result"]
        return found

    def _receive(self, seconds: float) -> None:
        if not select.select([self._read], [], [], seconds)[0]:
            return
        content = os.read(self._read, 1 << 20)
        if not content:
            raise RuntimeError("the browser has ended")
        *messages, self._buffer = (self._buffer + content).split(b"\0")
        for message in map(json.loads, messages):
            if "id" in message:
                self._answers[message["id"]] = message
            else:
                self.events.append(message)

    def tab(self, width: int, height: int, *, dark: bool = False, phone: bool = False) -> Tab:
        """Open an empty tab."""
        return Tab(self, width, height, dark=dark, phone=phone)

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        os.close(self._write)
        os.close(self._read)
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._profile.cleanup()


class Tab:
    """A page of a given size."""

    def __init__(
        self, browser: Browser, width: int, height: int, *, dark: bool, phone: bool
    ) -> None:
        self._browser = browser
        context = browser.send("Target.createBrowserContext")["browserContextId"]
        target = browser.send("Target.createTarget", url="about:blank", browserContextId=context)
        attached = browser.send(
            "Target.attachToTarget", targetId=target["targetId"], flatten=True
        )  # fmt: skip
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._send(f"{domain}.enable")
        self._send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height,
            deviceScaleFactor=1, mobile=phone,
        )  # fmt: skip
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self._send("Emulation.setEmulatedMedia", features=scheme)

    def _send(self, method: str, **params: Any) -> dict[str, Any]:
        return self._browser.send(method, self._session, **params)

    def go(self, url: str) -> None:
        """Open an address."""
        self._send("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def ask(self, script: str) -> Any:
        """Return the value of an expression; of a promise, what it becomes."""
        answer = self._send(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{script}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def wait(self, script: str) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + WAIT_S
        while not self.ask(f"Boolean({script})"):
            if time.monotonic() > end:
                raise TimeoutError(f"not so: {script}\n{self.ask('document.body.innerText')}")
            time.sleep(0.05)

    def press(self, key: str) -> None:
        """Press a key where the focus is."""
        code, text = KEYS[key]
        name = {"Space": " "}.get(key, key)
        fields = {"key": name, "code": key, "windowsVirtualKeyCode": code}
        down = {"text": text} if text else {}
        self._send("Input.dispatchKeyEvent", type="keyDown", **fields, **down)
        self._send("Input.dispatchKeyEvent", type="keyUp", **fields)

    def type(self, text: str) -> None:
        """Type a text where the focus is."""
        self._send("Input.insertText", text=text)

    def click(self, selector: str) -> None:
        """Click the middle of the first element of a selector with the mouse."""
        self.ask(
            f"document.querySelector({json.dumps(selector)}).scrollIntoView({{block: 'center'}})"
        )
        # The mouse finds what is on the screen, so the page must have been drawn where it is now.
        self.ask("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        place = self.ask(
            f"(() => {{ const b = document.querySelector({json.dumps(selector)})"
            ".getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        where = {"x": place[0], "y": place[1], "button": "left", "clickCount": 1}
        self._send("Input.dispatchMouseEvent", type="mouseMoved", x=place[0], y=place[1])
        self._send("Input.dispatchMouseEvent", type="mousePressed", **where)
        self._send("Input.dispatchMouseEvent", type="mouseReleased", **where)

    def complaints(self) -> list[str]:
        """Return what was said in the console as an error or a warning."""
        found = []
        for event in self._browser.events:
            if event.get("sessionId") != self._session:
                continue
            params, method = event["params"], event["method"]
            if method == "Runtime.exceptionThrown":
                found.append(json.dumps(params["exceptionDetails"]))
            elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
                found.append(json.dumps(params["args"]))
            elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
                found.append(json.dumps(params["entry"]))
        return found

    def picture(self, path: Path | None = None, *, whole: bool = False) -> Image.Image:
        """Return a screenshot, and write it with 256 colours if there is a path."""
        data = self._send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        image = Image.open(io.BytesIO(base64.b64decode(data["data"]))).convert("RGB")
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            image.quantize(256).save(path, optimize=True)
        return image
