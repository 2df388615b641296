"""A real Chromium, headless, driven over its debugging pipe."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-dev-shm-usage", "--remote-debugging-pipe")  # fmt: skip
PATIENCE = 60.0  # seconds for an answer


class Browser:
    """One page; messages as the DevTools protocol has them, ended by NUL, on descriptors 3 and 4."""

    def __init__(self, profile: Path):
        theirs_in, self.to = os.pipe()
        self.back, theirs_out = os.pipe()

        def place() -> None:
            high = [os.dup(theirs_in), os.dup(theirs_out)]
            os.dup2(high[0], 3), os.dup2(high[1], 4)

        self.process = subprocess.Popen(
            [PROGRAM, *FLAGS, f"--user-data-dir={profile}", "about:blank"], preexec_fn=place, close_fds=False,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs_in), os.close(theirs_out)
        self.number, self.rest, self.events, self.session = 0, b"", [], None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.to), os.close(self.back)

    def call(self, method: str, **values: object) -> dict:
        """A command's answer; events that come before it are kept."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": values}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while (told := self.read()).get("id") != self.number:
            self.events.append(told)
        assert "error" not in told, told
        return told["result"]

    def read(self) -> dict:
        end = time.monotonic() + PATIENCE
        while b"\0" not in self.rest:
            assert select.select([self.back], [], [], end - time.monotonic())[0], "the browser does not answer"
            data = os.read(self.back, 1 << 16)
            assert data, "the browser has ended"
            self.rest += data
        first, _, self.rest = self.rest.partition(b"\0")
        return json.loads(first)

    def open(self, path: Path, width: int = 1000, height: int = 900) -> None:
        """Show a file in a window of this size, until it has loaded."""
        self.events.clear()
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Page.navigate", url=path.resolve().as_uri())
        while not any(e.get("method") == "Page.loadEventFired" for e in self.events):
            self.events.append(self.read())

    def run(self, script: str) -> object:
        """The value of an expression on the page."""
        told = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    def media(self, scheme: str = "light", kind: str = "") -> None:
        """Prefer a colour scheme; be a printer when `kind` is print."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", media=kind, features=features)

    def point(self, selector: str) -> None:
        """Move the mouse to the middle of the first element that matches."""
        x, y = self.middle(selector)
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, selector: str) -> None:
        x, y = self.middle(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def middle(self, selector: str) -> list[float]:
        return self.run(f"""(() => {{ const e = document.querySelector({json.dumps(selector)});
            e.scrollIntoView({{block: "center"}}); const r = e.getClientRects()[0];
            return [r.x + r.width / 2, r.y + r.height / 2]; }})()""")

    def press(self, key: str) -> None:
        """A key by its name, such as Tab or ArrowRight."""
        code = {"Tab": 9, "ArrowLeft": 37, "ArrowRight": 39, "Enter": 13}[key]
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def photograph(self, path: Path) -> bytes:
        """The window as a PNG, also written to `path`."""
        data = base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])
        path.write_bytes(data)
        return data

    def faults(self) -> list[str]:
        """What the page complained of, and what it asked of any network."""
        found = []
        for event in self.events:
            method, values = event.get("method", ""), event.get("params", {})
            if method == "Runtime.exceptionThrown":
                found.append(str(values["exceptionDetails"]))
            elif method == "Runtime.consoleAPICalled" and values["type"] in ("error", "warning"):
                found.append(str(values["args"]))
            elif method == "Log.entryAdded" and values["entry"]["level"] in ("error", "warning"):
                found.append(values["entry"]["text"])
            elif method == "Network.requestWillBeSent" and not values["request"]["url"].startswith(("file:", "data:")):
                found.append(values["request"]["url"])
        return found


def contrast(browser: Browser, selector: str) -> float:
    """Ratio of luminance (WCAG 2) between an element's ink and what is painted behind it."""
    return browser.run(f"""(() => {{
      const rgb = c => (c.match(/[\\d.]+/g) || []).map(Number);
      const light = c => {{ const [r, g, b] = rgb(c).map(v => {{ v /= 255;
        return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; }}); return 0.2126*r + 0.7152*g + 0.0722*b; }};
      let e = document.querySelector({json.dumps(selector)}); const ink = light(getComputedStyle(e).color);
      const clear = e => {{ const c = rgb(getComputedStyle(e).backgroundColor); return c.length > 3 && c[3] == 0; }};
      while (clear(e) && e.parentElement) e = e.parentElement;
      const page = clear(e) ? 1 : light(getComputedStyle(e).backgroundColor);
      return (Math.max(ink, page) + 0.05) / (Math.min(ink, page) + 0.05); }})()""")
