"""A real browser for tests: Debian's headless Chromium over the DevTools protocol.

The protocol is spoken over a pair of pipes (`--remote-debugging-pipe`), so there is no port, no race for
one and no library; Chromium ends by itself when the pipes close, even if this process is killed. Every
page is in a storage of its own unless a test shares one, and no name outside this machine resolves.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

WAIT_S = 60.0  # far longer than anything takes, for machines with other work
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
    "--remote-debugging-pipe",
)
# `key` of the DOM to its `code`, where that is not the key itself, its number and the text that it types.
KEYS = {
    "Enter": ("Enter", 13, "\r"),
    "Tab": ("Tab", 9, ""),
    "Escape": ("Escape", 27, ""),
    "Backspace": ("Backspace", 8, ""),
    " ": ("Space", 32, " "),
    "ArrowLeft": ("ArrowLeft", 37, ""),
    "ArrowUp": ("ArrowUp", 38, ""),
    "ArrowRight": ("ArrowRight", 39, ""),
    "ArrowDown": ("ArrowDown", 40, ""),
}
MODIFIERS = {"Alt": 1, "Control": 2, "Meta": 4, "Shift": 8}
LOCAL = ("file:", "data:", "blob:", "about:")


def chromium() -> str:
    """Path of Chromium; skips the test without it, and fails in CI."""
    found = shutil.which("chromium")
    if found is None:
        if os.environ.get("CI") == "true":
            pytest.fail("CI needs chromium: apt install chromium")
        pytest.skip("chromium is not installed")
    return found


class Browser:
    """One Chromium with a new, empty profile; use it as a context manager."""

    def __init__(self) -> None:
        program = chromium()
        self.profile = Path(tempfile.mkdtemp(prefix="browser-"))
        self.downloads = self.profile / "downloads"
        theirs_in, self._to = os.pipe()
        self._from, theirs_out = os.pipe()
        # Chromium reads file descriptor 3 and writes 4.
        renumbered = ("bash", "-c", f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}', "bash")
        self.process = subprocess.Popen(
            [*renumbered, program, *FLAGS, f"--user-data-dir={self.profile}", "about:blank"],
            pass_fds=(theirs_in, theirs_out),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._number, self._read = 0, b""
        self._messages: deque[dict[str, Any]] = deque()
        self._pages: dict[str, Page] = {}
        self._downloaded: dict[str, Path] = {}
        self._finished: list[Path] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End Chromium and everything it started, and remove its profile."""
        os.close(self._to)
        os.close(self._from)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        shutil.rmtree(self.profile, ignore_errors=True)

    def open(
        self,
        where: Path | str,
        width: int = 1400,
        height: int = 900,
        dark: bool = False,
        sharing: Page | None = None,
    ) -> Page:
        """Open a file or address in a window of this size, and wait until it is loaded.

        Args:
            where: File, or address with its scheme.
            width: CSS pixels.
            height: CSS pixels.
            dark: What the page is told that the person prefers.
            sharing: A page, open or closed, whose local storage this one shall see.
        """
        context = sharing.context if sharing else self._new_context()
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self._pages[session] = Page(self, session, target, context)
        for domain in ("Page", "Runtime", "Log", "Network", "DOM"):
            page.call(f"{domain}.enable")
        page.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.call("Emulation.setEmulatedMedia", features=[scheme])
        page.go(where)
        return page

    def _new_context(self) -> str:
        context = str(self.call("Target.createBrowserContext")["browserContextId"])
        self.downloads.mkdir(exist_ok=True)
        self.call(
            "Browser.setDownloadBehavior",
            behavior="allowAndName",
            browserContextId=context,
            downloadPath=str(self.downloads),
            eventsEnabled=True,
        )
        return context

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Send a command of the protocol and wait for its answer; events on the way go to their pages."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._to, data) :]
        while True:
            answer = self.next_message(method)
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                result: dict[str, Any] = answer["result"]
                return result

    def next_message(self, what: str) -> dict[str, Any]:
        """Read one message, and tell the page whose event it is."""
        end = time.monotonic() + WAIT_S
        while not self._messages:
            ready, _, _ = select.select([self._from], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"chromium did not answer for {WAIT_S:.0f} s: {what}"
            chunk = os.read(self._from, 2**20)
            assert chunk, f"chromium ended: {what}"
            *whole, self._read = (self._read + chunk).split(b"\0")
            self._messages.extend(json.loads(one) for one in whole)
        message = self._messages.popleft()
        if "method" in message:
            self._note_download(message["method"], message["params"])
            page = self._pages.get(message.get("sessionId", ""))
            if page:
                page.note(message["method"], message["params"])
        return message

    def _note_download(self, method: str, params: dict[str, Any]) -> None:
        if method == "Browser.downloadWillBegin":
            self._downloaded[params["guid"]] = Path(params["suggestedFilename"])
        elif method == "Browser.downloadProgress" and params["state"] == "completed":
            folder = Path(tempfile.mkdtemp(dir=self.downloads))
            named = folder / self._downloaded[params["guid"]].name
            (self.downloads / params["guid"]).rename(named)
            self._finished.append(named)

    def wait_download(self) -> Path:
        """Wait for the next file that a page gives to the person, under the name it suggests."""
        while not self._finished:
            self.next_message("a download")
        return self._finished.pop(0)


class Page:
    """One tab.

    Attributes:
        requests: Every address that it asked for, in order, its own first.
        context: Name of the storage it is in.
    """

    def __init__(self, browser: Browser, session: str, target: str, context: str) -> None:
        self.browser, self.session, self.target, self.context = browser, session, target, context
        self.requests: list[str] = []
        self._errors: list[str] = []
        self._loads = 0

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command of the protocol to this page."""
        return self.browser.call(method, self.session, **params)

    def note(self, method: str, params: dict[str, Any]) -> None:
        """Keep what an event says."""
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Network.webSocketCreated":
            self.requests.append(params["url"])
        elif method == "Page.loadEventFired":
            self._loads += 1
        elif method == "Page.javascriptDialogOpening":
            self.call("Page.handleJavaScriptDialog", accept=True)
        elif method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self._errors.append(details.get("exception", {}).get("description") or details["text"])
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert"):
            said = [str(a.get("value", a.get("description", ""))) for a in params["args"]]
            self._errors.append(" ".join(said))
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            entry = params["entry"]
            self._errors.append(f"{entry['text']} {entry.get('url', '')}".strip())

    @property
    def console_errors(self) -> list[str]:
        """What a person would find in red in the console, up to now."""
        self.evaluate("new Promise(done => setTimeout(done))")
        return list(self._errors)

    @property
    def outside_requests(self) -> list[str]:
        """Addresses asked for that are neither on disk, nor inside the page, nor where the page is from."""
        self.evaluate("new Promise(done => setTimeout(done))")
        origin = str(self.evaluate("location.origin"))
        inside = (*LOCAL, f"{origin}/") if origin.startswith("http") else LOCAL
        return [url for url in self.requests if not url.startswith(inside)]

    def go(self, where: Path | str) -> None:
        """Load another file or address in this tab."""
        address = where.resolve().as_uri() if isinstance(where, Path) else where
        before = self._loads
        result = self.call("Page.navigate", url=address)
        assert "errorText" not in result, f"{address}: {result['errorText']}"
        while self._loads == before:
            self.browser.next_message(f"loading {address}")

    def evaluate(self, expression: str) -> Any:
        """Evaluate JavaScript, wait if it is a promise, and return its value as JSON has it."""
        result = self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True, userGesture=True
        )
        problem = result.get("exceptionDetails")
        assert problem is None, f"{expression}: {problem['exception'].get('description', problem['text'])}"
        return result["result"].get("value")

    def wait(self, condition: str) -> None:
        """Wait until a JavaScript expression is true."""
        end = time.monotonic() + WAIT_S
        while not self.evaluate(f"new Promise(done => setTimeout(() => done(Boolean({condition})), 10))"):
            assert time.monotonic() < end, f"never true: {condition}"

    def press(self, key: str, *modifiers: str) -> None:
        """Press a key: a character, or a name of the DOM such as `Tab` or `ArrowLeft`."""
        code, number, text = KEYS.get(key) or (
            f"Digit{key}" if key.isdigit() else f"Key{key.upper()}",
            ord(key.upper()),
            key,
        )
        same = {
            "key": key,
            "code": code,
            "windowsVirtualKeyCode": number,
            "modifiers": sum(MODIFIERS[name] for name in modifiers),
        }
        typed = {"type": "keyDown", "text": text} if text and not modifiers else {"type": "rawKeyDown"}
        self.call("Input.dispatchKeyEvent", **same, **typed)
        self.call("Input.dispatchKeyEvent", **same, type="keyUp")

    def type(self, text: str) -> None:
        """Type text into what has the focus."""
        self.call("Input.insertText", text=text)

    def click(self, selector: str) -> None:
        """Scroll to the first element that fits a CSS selector and click into its middle."""
        x, y = self.evaluate(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            " e.scrollIntoView({block: 'center', behavior: 'instant'});"
            " const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def choose_file(self, selector: str, path: Path) -> None:
        """Give a file to an `<input type=file>`, as its dialog would."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path.resolve())])

    def screenshot(self, path: Path, whole: bool = False) -> Path:
        """Write a PNG of the window, or of the whole page."""
        result = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(result["data"]))
        return path

    def print_pdf(self) -> bytes:
        """Print the page as a person would."""
        return base64.b64decode(self.call("Page.printToPDF", printBackground=True)["data"])

    def close(self) -> None:
        """Close the tab; its storage stays for pages that share it."""
        self.browser.call("Target.closeTarget", targetId=self.target)
