"""Chromium by its DevTools protocol, through a pipe: pages, keys and pictures without another package."""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Keys that type no text: their codes
NAMED = {"Enter": 13, "Backspace": 8, "Escape": 27, "ArrowDown": 40, "ArrowUp": 38, "Tab": 9}


class Browser:
    """
    A headless Chromium. `with Browser() as browser: page = browser.open(url)`.
    """

    def __enter__(self):
        self.folder = tempfile.mkdtemp()
        from_us, to_browser = os.pipe()
        from_browser, to_us = os.pipe()

        def connect():  # Chromium reads from descriptor 3 and writes to 4
            ours = [os.dup(from_us), os.dup(to_us)]
            for target, source in zip((3, 4), ours, strict=True):
                os.dup2(source, target)

        command = [PROGRAM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
        command += [f"--user-data-dir={self.folder}", "--remote-debugging-pipe", "about:blank"]
        self.process = subprocess.Popen(
            command, preexec_fn=connect, pass_fds=(3, 4), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(from_us)
        os.close(to_us)
        self.writer, self.reader = os.fdopen(to_browser, "wb", 0), os.fdopen(from_browser, "rb")
        self.number = 0
        return self

    def __exit__(self, *_):
        with contextlib.suppress(OSError):
            self.call("Browser.close")
        self.process.wait(timeout=20)
        self.writer.close()
        self.reader.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def call(self, method: str, session: str | None = None, **params):
        """Call a method of the protocol, and return its result. Events are ignored."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        self.writer.write(json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        while True:
            received = bytearray()
            while (byte := self.reader.read(1)) not in (b"\0", b""):
                received += byte
            if not byte:
                raise OSError("Chromium has ended")
            answer = json.loads(received)
            if answer.get("id") == self.number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def open(self, url: str, width: int = 1200, height: int = 860, dark: bool = False) -> "Page":
        """Open a page in a tab of its own, in a window of a width and a height."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        phone = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        page.call("Emulation.setDeviceMetricsOverride", **phone)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        page.call("Emulation.setEmulatedMedia", features=scheme)
        page.call("Page.navigate", url=url)
        page.wait("document.readyState === 'complete' && location.href !== 'about:blank'")
        return page


class Page:
    """A tab."""

    def __init__(self, browser: Browser, session: str):
        self.browser, self.session = browser, session

    def call(self, method: str, **params):
        return self.browser.call(method, self.session, **params)

    def run(self, script: str):
        """Return the value of an expression in JavaScript."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise RuntimeError(result["exceptionDetails"])
        return result["result"].get("value")

    def wait(self, condition: str, seconds: float = 30.0):
        """Wait until an expression in JavaScript is true, and return its value."""
        end = time.monotonic() + seconds
        while True:
            with contextlib.suppress(RuntimeError):  # in the middle of a navigation
                if value := self.run(condition):
                    return value
            assert time.monotonic() < end, f"{condition}: {self.run('document.body.innerText')}"
            time.sleep(0.02)

    def press(self, *keys: str):
        """Press keys: a character, or one of those above."""
        for key in keys:
            is_named = key in NAMED
            text = {} if is_named and key != "Enter" else {"text": "\r" if key == "Enter" else key}
            code = {"windowsVirtualKeyCode": NAMED.get(key, ord(key[0].upper()))}
            self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **code, **text)
            self.call("Input.dispatchKeyEvent", type="keyUp", key=key, **code)

    def picture(self, path: Path, whole: bool = True):
        """Write a PNG of the page, all of it or what the window shows."""
        if whole:
            height = self.run("Math.max(innerHeight, document.documentElement.scrollHeight)")
            width = self.run("innerWidth")
            clip = {"clip": {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}}
        data = self.call("Page.captureScreenshot", captureBeyondViewport=whole, **(clip if whole else {}))["data"]
        path.write_bytes(base64.b64decode(data))
