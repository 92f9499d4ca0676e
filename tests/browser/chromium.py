"""A real Chromium, driven over its DevTools protocol: opened at an address, pressed keys in, asked what it shows."""

from __future__ import annotations

import base64
import itertools
import json
import shutil
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

from websockets.sync.client import connect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--remote-debugging-port=0", "--remote-allow-origins=*",
)  # fmt: skip
_KEYS = {"ArrowRight": 39, "ArrowLeft": 37, "Tab": 9, "Enter": 13, "Escape": 27}


class Page:
    """One page. `console` gathers what the browser complains of."""

    def __init__(self, socket):
        self._socket, self._numbers, self.console = socket, itertools.count(1), []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv(timeout=60))
            self._hear(message)
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]

    def _hear(self, message):
        match message.get("method"):
            case "Log.entryAdded":
                self.console.append(message["params"]["entry"]["text"])
            case "Runtime.exceptionThrown":
                self.console.append(message["params"]["exceptionDetails"]["text"])
            case "Runtime.consoleAPICalled":
                self.console.append(str(message["params"]["args"]))

    def shape(self, width, height, *, dark=False):
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, url):
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def ask(self, script):
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, script, seconds=20):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                if self.ask(script):
                    return
            except AssertionError:  # the page is being left
                pass
            time.sleep(0.03)
        raise AssertionError(f"it did not come to this: {script}; at {self.ask('location.href')}")

    def press(self, key):
        text = {"text": key} if len(key) == 1 else {"windowsVirtualKeyCode": _KEYS[key]}
        text |= {"text": "\r"} if key == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def picture(self, path, *, whole=False):
        shown = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        Path(path).write_bytes(base64.b64decode(shown["data"]))


@contextmanager
def browsing(profile):
    """A page of a browser of its own, whose files are in the folder `profile`."""
    with subprocess.Popen(
        [CHROMIUM, *_FLAGS, f"--user-data-dir={profile}", "about:blank"], stderr=subprocess.DEVNULL
    ) as process:
        try:
            with connect(_find_page(profile), max_size=None, compression=None, proxy=None) as socket:
                yield Page(socket)
        finally:
            process.terminate()


def _find_page(profile):
    import urllib.request

    told = Path(profile) / "DevToolsActivePort"
    for _ in range(600):
        if told.is_file() and (lines := told.read_text().splitlines()):
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            pages = json.load(opener.open(f"http://127.0.0.1:{lines[0]}/json"))
            if found := [page for page in pages if page["type"] == "page"]:
                return found[0]["webSocketDebuggerUrl"]
        time.sleep(0.1)
    raise AssertionError("the browser did not start")
