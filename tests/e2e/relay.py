"""A TCP relay in front of the public port, which cuts or holds connections in the middle of a large body."""

from __future__ import annotations

import socket
import struct
import threading
from contextlib import suppress
from dataclasses import dataclass, field

LARGE = 1_000_000  # bytes one way without a byte the other way: only a state or a reply is so large


@dataclass
class Relay:
    """Passes bytes on, both ways.

    Attributes:
        port: Where it listens.
        target: Port of the gateway, on loopback.
        plan: What is done, in order, once each: a connection is cut on the way `down` (to a site) or `up`
            (from it), or one on its way up is held (`hold`): it stays open, and nothing moves.
        cut: What was done.
        go_on: Set to let held connections move again.
    """

    port: int
    target: int
    plan: list[str] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)
    go_on: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self.target), timeout=10)
            except OSError:
                near.close()
                continue
            far.settimeout(None)
            counts = {"up": 0, "down": 0}
            for way, source, sink in (("up", near, far), ("down", far, near)):
                threading.Thread(target=self._copy, args=(way, source, sink, counts), daemon=True).start()

    def _copy(self, way: str, source: socket.socket, sink: socket.socket, counts: dict[str, int]) -> None:
        other = "down" if way == "up" else "up"
        with suppress(OSError):
            while data := source.recv(1 << 16):
                counts[way], counts[other] = counts[way] + len(data), 0
                if counts[way] > LARGE and way == "up" and self._is_planned("hold"):
                    self.go_on.wait()
                if counts[way] > LARGE and self._is_planned(way):
                    for end in (source, sink):  # a reset, as a firewall that forgets a connection sends it
                        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    break
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _is_planned(self, way: str) -> bool:
        with self._lock:
            if self.plan[:1] != [way]:
                return False
            self.cut.append(self.plan.pop(0))
            return True
