"""What was seen of each image, kept by content: a check that was killed goes on where it was.

SQLite in the site's home, in a folder of mode 0700. No caption or patient id is in it; it holds small
grey copies of the images, so it is as private as they are.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from polyclinic.client.check.look import VERSION
from polyclinic.common.data.images import image_digest
from polyclinic.common.data.table import Record
from polyclinic.common.refusals import BadInput

COMMIT_S = 1.0  # what a kill can lose


class Store:
    """Looks by content, and contents by path, size and time. Several threads may use it."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.parent.chmod(0o700)
        path.touch(mode=0o600)
        self._lock = threading.Lock()
        try:
            self._base = sqlite3.connect(path, check_same_thread=False)
            self._base.execute("PRAGMA journal_mode=WAL")
            self._base.execute(
                "CREATE TABLE IF NOT EXISTS seen (file TEXT PRIMARY KEY, stat TEXT, content TEXT)"
            )
            self._base.execute("CREATE TABLE IF NOT EXISTS looks (content TEXT PRIMARY KEY, look TEXT)")
        except sqlite3.DatabaseError as error:
            raise BadInput(
                f"{path}: not a store of findings ({error}); remove it, and check again"
            ) from error
        self._last = time.monotonic()

    def content_of(self, record: Record) -> str:
        """Hash an image, or remember its hash while size and time are the same.

        Raises:
            OSError: The file cannot be read.
            BadInput: Its row cannot.
        """
        stat = record.image.stat()
        now = f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ino}"
        # A name need be no UTF-8; two that look alike then have other inodes.
        name = record.name.encode("utf-8", "replace").decode()
        row = self._one("SELECT content FROM seen WHERE file = ? AND stat = ?", name, now)
        if row:
            return row
        content = image_digest(record.image, record.part)
        self._write("INSERT OR REPLACE INTO seen VALUES (?, ?, ?)", name, now, content)
        return content

    def find(self, content: str, suffix: str) -> dict[str, Any] | None:
        """The look at this content under a name with this suffix, where this version had one."""
        row = self._one("SELECT look FROM looks WHERE content = ?", f"{VERSION} {content} {suffix}")
        return json.loads(row) if row else None

    def keep(self, content: str, suffix: str, look: dict[str, Any]) -> None:
        """Keep a look; on disk within a second or so."""
        self._write(
            "INSERT OR REPLACE INTO looks VALUES (?, ?)", f"{VERSION} {content} {suffix}", json.dumps(look)
        )

    def _one(self, question: str, *values: str) -> str | None:
        with self._lock:
            row = self._base.execute(question, values).fetchone()
        return str(row[0]) if row else None

    def _write(self, statement: str, *values: str) -> None:
        with self._lock:
            self._base.execute(statement, values)
            if time.monotonic() - self._last > COMMIT_S:
                self._base.commit()
                self._last = time.monotonic()

    def close(self) -> None:
        """Commit and close."""
        with self._lock:
            self._base.commit()
            self._base.close()


@contextmanager
def opened(path: Path) -> Iterator[Store]:
    """A store that is closed with the block; what was seen is kept, whatever ended it."""
    store = Store(path)
    try:
        yield store
    finally:
        store.close()
