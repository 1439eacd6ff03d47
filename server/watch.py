"""`report RUN --watch`: the report of a run as one page over HTTP, which renews itself after each round.

Read-only: one page, at `/`, and nothing else; nothing is written, and nothing a browser sends is used
but the token and the name of the page it has. A local address needs no token, but refuses names that are
not this machine's: a foreign site's name may be made to point here (DNS rebinding). Any other address
needs a random token. Plain HTTP: who can listen on the way reads page and token.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import secrets
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from polyclinic.common.cost_settings import CostSettings
from polyclinic.common.refusals import BadInput
from polyclinic.server.checkpoints import rounds_done
from polyclinic.server.evaluation.judge import judgement_path
from polyclinic.server.plan import Plan
from polyclinic.server.report.html import Live, live_page
from polyclinic.server.summary import forecast_of, summarise

LOCAL_NAMES = {"localhost", "127.0.0.1", "::1"}
LOOK_S = 5  # seconds between a browser's two looks for a new round
IDLE_S = 30.0  # a silent connection is closed


class LivePage:
    """The page of a run, rendered anew when the run has moved on."""

    def __init__(self, run_dir: Path, settings: CostSettings | None = None) -> None:
        self.run_dir, self.settings = run_dir, settings
        self._lock = threading.Lock()
        self._seen: object = None
        self._planned: Plan | None = None
        self._body, self._tag = b"", ""
        self.nonce = secrets.token_urlsafe(16)

    def current(self) -> tuple[bytes, str]:
        """The page now, and a tag that changes with it.

        Raises:
            BadInput: A sample sheet is missing or broken.
        """
        with self._lock:
            seen = [(n, judgement_path(self.run_dir, n).exists()) for n in rounds_done(self.run_dir)]
            if seen != self._seen:
                if self._planned is None or len(seen) <= 2:  # sites' sizes are known by their first reply
                    self._planned = forecast_of(self.run_dir)
                metrics = summarise(self.run_dir, self._planned, self.settings)
                tag = hashlib.sha256(f"{self.nonce} {seen}".encode()).hexdigest()[:32]
                self._body = live_page(self.run_dir, metrics, Live(self.nonce, tag, LOOK_S)).encode()
                self._tag, self._seen = f'"{tag}"', seen
            return self._body, self._tag


def serve(page: LivePage, host: str, port: int) -> tuple[ThreadingHTTPServer, str]:
    """Open the address; the caller lets the server run.

    Args:
        page: What is shown.
        host: Address to listen on.
        port: Its port; 0 takes a free one.

    Returns:
        The server, and the address a person opens, with the token where one is needed.

    Raises:
        BadInput: The address cannot be listened on.
    """
    token = "" if is_local(host) else secrets.token_urlsafe(32)

    class Handler(_Handler):
        pass

    Handler.page, Handler.token = page, token
    try:
        server = ThreadingHTTPServer((host, port), Handler)
    except (OSError, OverflowError) as error:
        raise BadInput(f"--host {host} --port {port}: cannot be opened ({error}); name another") from error
    server.daemon_threads = True
    return server, f"http://{host}:{server.server_port}/" + (f"?token={token}" if token else "")


def is_local(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class _Handler(BaseHTTPRequestHandler):
    page: LivePage
    token = ""
    timeout = IDLE_S
    server_version, sys_version = "Polyclinic", ""

    def do_GET(self) -> None:
        """Answer with the page, or say why not."""
        asked = urlsplit(self.path)
        if not self._allowed(asked.query):
            self._send(HTTPStatus.FORBIDDEN, b"Open the address that `report --watch` printed.\n")
        elif asked.path != "/":
            self._send(HTTPStatus.NOT_FOUND, b"There is one page, at /.\n")
        else:
            self._page()

    do_HEAD = do_GET

    def _page(self) -> None:
        try:
            body, tag = self.page.current()
        except BadInput as error:
            self._send(HTTPStatus.SERVICE_UNAVAILABLE, f"{error}\n".encode())
            return
        if self.headers.get("If-None-Match") == tag:
            self._send(HTTPStatus.NOT_MODIFIED, b"", tag)
        else:
            self._send(HTTPStatus.OK, body, tag)

    def _allowed(self, query: str) -> bool:
        if self.token:
            given = parse_qs(query).get("token", [""])[0]
            return hmac.compare_digest(given.encode(), self.token.encode())
        host = self.headers.get("Host", "")
        name = urlsplit(f"//{host}").hostname if host else None
        return name is not None and (name in LOCAL_NAMES or is_local(name))

    def _send(self, status: HTTPStatus, body: bytes, tag: str = "") -> None:
        self.send_response(status)
        kind = "text/html" if status == HTTPStatus.OK else "text/plain"
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-cache")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("X-Frame-Options", "DENY")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        if tag:
            self.send_header("ETag", tag)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: a line would hold the token."""
