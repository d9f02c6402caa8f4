"""A real browser for tests of pages: Chromium through chromedriver, by the WebDriver protocol."""

import base64
import contextlib
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


KEYS = {"left": "\ue012", "up": "\ue013", "right": "\ue014", "down": "\ue015", "tab": "\ue004"}
KEYS |= {"enter": "\ue007", "space": " ", "home": "\ue011", "end": "\ue010"}
PATIENCE_S = 120
"""How long a script may take: on busy cores, rules over a long page take half a minute."""
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"


class Browser:
    """One window of a browser."""

    def __init__(self, address: str, options: dict[str, Any]) -> None:
        self._address = address
        capabilities = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        capabilities["timeouts"] = {"script": 1000 * PATIENCE_S}
        found = self._ask("POST", "/session", {"capabilities": {"alwaysMatch": capabilities}})
        self._address += f"/session/{found['sessionId']}"

    def open(self, page: Path, state: str = "") -> None:
        """Opens a page and waits until its scripts have drawn it."""
        self._ask("POST", "/url", {"url": "about:blank"})
        self._ask("POST", "/url", {"url": f"{page.as_uri()}{state}"})
        end = time.monotonic() + 30
        while not self.run("return document.documentElement.dataset.ready === 'yes'"):
            assert time.monotonic() < end, self.log()
            time.sleep(0.05)

    def show(self, address: str) -> None:
        """Opens a page without scripts of ours, and waits until it is loaded."""
        self._ask("POST", "/url", {"url": address})

    def wait_for(self, promise: str) -> Any:
        """Returns what a promise, the value of an expression, is kept with."""
        script = f"const done = arguments[arguments.length - 1]; ({promise}).then(done)"
        return self._ask("POST", "/execute/async", {"script": script, "args": []})

    def run(self, script: str, *args: Any) -> Any:
        """Returns what a script returns."""
        return self._ask("POST", "/execute/sync", {"script": script, "args": list(args)})

    def text(self, selector: str) -> str:
        return self.run("return document.querySelector(arguments[0]).textContent", selector)

    def click(self, selector: str) -> None:
        """Clicks the middle of an element, which must not be covered."""
        found = self._ask("POST", "/element", {"using": "css selector", "value": selector})
        self._ask("POST", f"/element/{found[_ELEMENT]}/click", {})

    def choose(self, selector: str, value: str) -> None:
        """Chooses an option of a select by a click."""
        self.click(f"{selector} option[value='{value}']")

    def press(self, *names: str) -> None:
        """Presses keys by name, one after the other, wherever the focus is."""
        keys = [KEYS.get(name, name) for name in names]
        moves = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self._ask(
            "POST", "/actions", {"actions": [{"type": "key", "id": "keys", "actions": moves}]}
        )

    def hover(self, selector: str) -> None:
        """Moves the pointer to the middle of an element."""
        found = self._ask("POST", "/element", {"using": "css selector", "value": selector})
        move = {"type": "pointerMove", "duration": 0, "x": 0, "y": 0, "origin": found}
        pointer = {"type": "pointer", "id": "mouse", "actions": [move]}
        self._ask("POST", "/actions", {"actions": [pointer]})

    def command(self, name: str, **params: Any) -> Any:
        """Returns what a command of Chromium's own protocol returns."""
        return self._ask("POST", "/goog/cdp/execute", {"cmd": name, "params": params})

    def picture(self, path: Path, *, width: int, dark: bool = False, height: int = 0) -> None:
        """Writes a PNG of the page at a width, of its whole height unless one is given."""
        self.as_seen(width=width, dark=dark)
        time.sleep(0.5)
        tall = height or self.run("return document.documentElement.scrollHeight")
        clip = {"x": 0, "y": 0, "width": width, "height": tall, "scale": 1}
        found = self.command("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))

    def as_seen(self, *, width: int, dark: bool = False, media: str = "") -> None:
        """Shows pages as a screen of this width does, or as `media` (print)."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.command("Emulation.setEmulatedMedia", media=media, features=[scheme])
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        self.command("Emulation.setDeviceMetricsOverride", **size)

    def log(self) -> list[str]:
        """Returns what the page reported since the last call: errors and warnings."""
        return [entry["message"] for entry in self._ask("POST", "/se/log", {"type": "browser"})]

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self._address}{path}", data, method=method)
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE_S + 10) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(json.load(error)["value"]["message"]) from None

    def close(self) -> None:
        self._ask("DELETE", "")


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """Yields a headless Chromium; skips the test where there is none, or no driver of it."""
    driver = shutil.which("chromedriver")
    browser = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
    if driver is None or browser is None:
        pytest.skip("needs Chromium and chromedriver, and they are not both on the path")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = subprocess.Popen(
        [driver, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        _wait_for(port)
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        made = Browser(f"http://127.0.0.1:{port}", {"binary": browser, "args": flags})
        try:
            yield made
        finally:
            made.close()
    finally:
        running.terminate()
        running.wait(10)


def _wait_for(port: int) -> None:
    end = time.monotonic() + 30
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            assert time.monotonic() < end, "chromedriver did not start"
            time.sleep(0.1)
