"""A headless Chromium over the DevTools protocol on a pipe: nothing to install beside the browser itself."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

NAMES = (
    "chromium-headless-shell",
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "chrome",
    "chrome-headless-shell",
)
PATIENCE = 60.0
"""Seconds to wait for an answer; a busy machine starts a browser slowly."""
_ON_PIPE = 'exec "$0" "$@" 3<&0 4>&1 </dev/null >/dev/null 2>&1'
_OPTIONS = (
    "--headless",
    "--remote-debugging-pipe",
    "--no-sandbox",  # the only page it opens is our own
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--host-resolver-rules=MAP * ~NOTFOUND",
)
Scheme = Literal["light", "dark"]


def find_chromium() -> str | None:
    """The browser in CHROME_BIN, on the PATH, or where Playwright keeps its own; None when there is none."""
    named = os.environ.get("CHROME_BIN")
    on_path = (shutil.which(name) for name in NAMES)
    kept = sorted(Path.home().glob(".cache/ms-playwright/chromium*/chrome-*/*chrome*"), reverse=True)
    own = (str(path) for path in kept if path.name in ("chrome", "headless_shell", "chrome-headless-shell"))
    return next((each for each in (named, *on_path, *own) if each), None)


class Browser:
    """One running browser with one page; every `open` starts it afresh."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process, self._last, self._buffer = process, 0, b""
        self.events: list[dict[str, Any]] = []
        target = self._call("Target.createTarget", {"url": "about:blank"})["targetId"]
        self._session = self._call("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def open(self, path: Path, width: int, scheme: Scheme = "light", height: int = 800) -> None:
        """Load a file on a screen of this width; `events` holds what happened since."""
        self.events.clear()
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 700}
        self.send("Emulation.setDeviceMetricsOverride", **metrics)
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.send("Page.navigate", url=path.as_uri())
        self._until(lambda: any(event["method"] == "Page.loadEventFired" for event in self.events))

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """The whole page as a PNG file."""
        answer = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(answer["data"]))

    def requests(self) -> list[str]:
        """Addresses asked for since `open`."""
        return [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]

    def complaints(self) -> list[str]:
        """Console messages and exceptions since `open`."""
        methods = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [json.dumps(event["params"]) for event in self.events if event["method"] in methods]

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """A command to the page, and its answer."""
        return self._call(method, params, self._session)

    def _call(self, method: str, params: dict[str, Any], session: str | None = None) -> dict[str, Any]:
        self._last += 1
        message = {"id": self._last, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message).encode() + b"\0")
        self._process.stdin.flush()
        answer: dict[str, Any] = {}

        def answered() -> bool:
            found = [event for event in self.events if event.get("id") == self._last]
            answer.update(found[0] if found else {})
            return bool(found)

        self._until(answered)
        self.events = [event for event in self.events if "id" not in event]
        assert "error" not in answer, (method, answer)
        result: dict[str, Any] = answer["result"]
        return result

    def _until(self, done: Any) -> None:
        """Read messages until a condition holds."""
        assert self._process.stdout is not None
        stream = self._process.stdout.fileno()
        deadline = time.monotonic() + PATIENCE
        while not done():
            ready, _, _ = select.select([stream], [], [], max(deadline - time.monotonic(), 0))
            piece = os.read(stream, 1 << 20) if ready else b""
            assert piece, "the browser does not answer" if not ready else "the browser has ended"
            *whole, self._buffer = (self._buffer + piece).split(b"\0")
            self.events += [{"method": "", **json.loads(message)} for message in whole]


@contextmanager
def browser(executable: str, profile: Path) -> Iterator[Browser]:
    """A browser, ended at the end. `profile` is a folder of its own."""
    command = ["sh", "-c", _ON_PIPE, executable, *_OPTIONS, f"--user-data-dir={profile}", "about:blank"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        yield Browser(process)
    finally:
        process.kill()
        process.communicate()
