"""Headless Chromium over its debugging pipe: enough of a browser to open a page, look at it and press its keys."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)


class Page:
    """One tab: what it is asked, and what it reported meanwhile."""

    def __init__(self, browser: _Pipe, session: str) -> None:
        self._browser = browser
        self._session = session
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._browser.call(method, self._session, **parameters)

    def view(self, width: int, height: int = 900, dark: bool = False) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, address: str, until: str = "true") -> None:
        """Go to an address and wait until an expression holds there."""
        self.call("Page.navigate", url=address)
        self.wait(f"document.readyState === 'complete' && location.href === {json.dumps(address)} && ({until})")

    def wait(self, expression: str, seconds: float = 60.0) -> None:
        """Wait until an expression holds; the page may be loaded again meanwhile, and lack what it asks for."""
        end = time.monotonic() + seconds
        while self.call("Runtime.evaluate", expression=f"!!({expression})")["result"].get("value") is not True:
            assert time.monotonic() < end, f"waited {seconds} s for {expression}; {self.complaints()}"
            time.sleep(0.05)

    def ask(self, expression: str) -> Any:
        """The value of an expression on the page, as JSON can hold it."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, key: str, code: int) -> None:
        text = {"text": "\r"} if key == "Enter" else {}
        common = {"key": key, "code": key, "windowsVirtualKeyCode": code, **text}
        self.call("Input.dispatchKeyEvent", type="keyDown", **common)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def picture(self, path: Path, whole: bool = False) -> Path:
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))
        return path

    def requests(self) -> list[str]:
        """The addresses that the page asked for."""
        sent = self._browser.events("Network.requestWillBeSent", self._session)
        return [event["request"]["url"] for event in sent]

    def forget(self) -> None:
        """Drop what was reported so far."""
        self._browser.drop()

    def complaints(self) -> list[str]:
        """What the console said: errors, warnings, exceptions."""
        entries = [e["entry"] for e in self._browser.events("Log.entryAdded", self._session)]
        found = [entry["text"] for entry in entries if entry["level"] in ("error", "warning")]
        for event in self._browser.events("Runtime.consoleAPICalled", self._session):
            found.append(" ".join(str(a.get("value", a)) for a in event["args"]))
        thrown = self._browser.events("Runtime.exceptionThrown", self._session)
        return found + [str(event["exceptionDetails"]) for event in thrown]


class _Pipe:
    """Messages to and from the browser: JSON, each ended by a zero byte."""

    def __init__(self, reading: int, writing: int) -> None:
        self._reading, self._writing = reading, writing
        self._buffer = b""
        self._sent = 0
        self._events: list[dict[str, Any]] = []

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        self._sent += 1
        message: dict[str, Any] = {"id": self._sent, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        os.write(self._writing, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._sent:
                assert "error" not in answer, (method, answer["error"])
                return dict(answer["result"])
            self._events.append(answer)

    def events(self, method: str, session: str) -> list[dict[str, Any]]:
        return [e["params"] for e in self._events if e.get("method") == method and e.get("sessionId") == session]

    def drop(self) -> None:
        self._events.clear()

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._reading], [], [], 120)
            assert ready, "the browser did not answer for 120 s"
            received = os.read(self._reading, 1 << 20)
            assert received, "the browser ended"
            self._buffer += received
        message, self._buffer = self._buffer.split(b"\0", 1)
        answer: dict[str, Any] = json.loads(message)
        return answer


@contextmanager
def chromium(profile: Path) -> Iterator[Page]:
    """A page of a new headless browser that ends with the block; its profile is a folder of its own."""
    assert CHROMIUM is not None
    to_read, to_write = os.pipe()
    from_read, from_write = os.pipe()
    options = ("--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run")
    quiet = ("--disable-background-networking", "--disable-component-update", "--hide-scrollbars")
    # The browser reads what it is asked from descriptor 3 and answers on 4.
    shell = f'exec "$0" "$@" 3<&{to_read} 4>&{from_write}'
    process = subprocess.Popen(
        ["/bin/bash", "-c", shell, CHROMIUM, *options, *quiet, f"--user-data-dir={profile}", "about:blank"],
        pass_fds=(to_read, from_write),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(to_read)
    os.close(from_write)
    try:
        pipe = _Pipe(from_read, to_write)
        target = pipe.call("Target.createTarget", url="about:blank")["targetId"]
        session = pipe.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        yield Page(pipe, session)
        with suppress(AssertionError, OSError):
            pipe.call("Browser.close")
    finally:
        os.close(from_read)
        os.close(to_write)
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait()
