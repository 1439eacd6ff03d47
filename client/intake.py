"""A site's own table: read through the study's door, or from the snapshot that was made of it.

What lies here stays here. `<home>/data` (mode 0700) holds the key that patient ids are hashed with, the
lists that `check --fix` writes, and the snapshots, each under the name of its folder and way of reading.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from polyclinic.common.data.pixels import digests, snapshot_hash
from polyclinic.common.data.sources import read_records, table_files
from polyclinic.common.data.table import Record
from polyclinic.common.files import canonical_json, sync_folder, write_atomic
from polyclinic.common.refusals import BadInput
from polyclinic.common.settings import DataSettings


def data_home(home: Path) -> Path:
    """Folder of what is known about the site's data; created with mode 0700."""
    path = home / "data"
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.chmod(0o700)
    return path


def site_key(home: Path) -> bytes:
    """The key that patient ids are hashed with: 32 random bytes, made once.

    Raises:
        BadInput: The file was cut.
    """
    path = data_home(home) / "patients.key"
    if not path.exists():
        # Linked, not renamed: of two processes at once the first one's key stays.
        write_atomic(
            new := path.with_name(f".key-{secrets.token_hex(8)}"), secrets.token_bytes(32), mode=0o600
        )
        try:
            os.link(new, path)
        except FileExistsError:
            pass
        finally:
            new.unlink()
        sync_folder(path.parent)
    key = path.read_bytes()
    if len(key) != 32:
        raise BadInput(f"{path}: not a key of 32 bytes; restore it from the site's backup")
    return key


def reading(data: DataSettings, folder: Path) -> str:
    """Name a folder together with the way it is read."""
    way = [str(folder.resolve()), data.source, data.table, data.caption, data.unit]
    return hashlib.sha256(canonical_json(way)).hexdigest()[:16]


def accepted_path(home: Path, data: DataSettings, folder: Path) -> Path:
    """Where `check --fix` writes what it accepts."""
    return data_home(home) / f"{reading(data, folder)}.accepted.jsonl"


def quarantine_path(home: Path, data: DataSettings, folder: Path) -> Path:
    """Where `check --fix` writes what it does not accept, with the reason."""
    return data_home(home) / f"{reading(data, folder)}.quarantine.jsonl"


def snapshot_path(home: Path, data: DataSettings, folder: Path) -> Path:
    """Where `snapshot` writes the table that approvals bind."""
    return data_home(home) / f"{reading(data, folder)}.snapshot.jsonl"


def site_records(home: Path, data: DataSettings, folder: Path) -> list[Record]:
    """Read the site's table: its snapshot where one was made, else the folder itself, strictly.

    Args:
        home: The site's home.
        data: The study's data table.
        folder: The data folder.

    Raises:
        BadInput: The first thing wrong with it.
    """
    snapshot = snapshot_path(home, data, folder)
    if snapshot.exists():
        return read_list(snapshot, folder)
    return read_records(data, folder, patient_key(home, data))


def make_snapshot(home: Path, data: DataSettings, folder: Path) -> dict[str, Any]:
    """Fix the table that approvals bind: what `check --fix` accepted, or else the whole folder, strictly.

    Returns:
        JSON-safe: `snapshot` (hash of the contents; it never leaves), counts, and whether it was `checked`.

    Raises:
        BadInput: A file is another one than was checked, or the folder cannot be read whole.
    """
    accepted = accepted_path(home, data, folder)
    checked = accepted.exists()
    if checked:
        records = read_list(accepted, folder)
        try:
            contents = digests(records)
        except OSError as error:
            raise BadInput(f"{error.filename}: gone since it was checked; run `check --fix` again") from error
        for line, content, record in zip(read_lines(accepted), contents, records, strict=True):
            if line["content"] != content:
                raise BadInput(f"{record.name}: changed since it was checked; run `check --fix` again")
    else:
        records = read_records(data, folder, patient_key(home, data))
        contents = digests(records)
    lines = (as_line(record, folder, content) for record, content in zip(records, contents, strict=True))
    write_list(snapshot_path(home, data, folder), lines)
    return {
        "snapshot": snapshot_hash(records, contents),
        "images": len(records),
        "patients": len({record.patient for record in records}),
        "checked": checked,
    }


def patient_key(home: Path, data: DataSettings) -> bytes | None:
    """The key where the source carries hospital numbers; other sources' ids are pseudonyms already."""
    return site_key(home) if data.source == "dicom" else None


def watched_tables(home: Path, data: DataSettings, folder: Path) -> list[Path]:
    """Name the files that the table comes from, images apart."""
    snapshot = snapshot_path(home, data, folder)
    return [snapshot] if snapshot.exists() else table_files(data, folder)


def write_list(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Write a JSON Lines file for this site's eyes only; a thousand lines at a time are held."""
    texts = (json.dumps(line, sort_keys=True, ensure_ascii=False) + "\n" for line in lines)
    pieces = iter(lambda: "".join(islice(texts, 1000)).encode("utf-8", "surrogatepass"), b"")
    write_atomic(path, pieces, mode=0o600)


def as_line(record: Record, folder: Path, digest: str) -> dict[str, Any]:
    """Put a record into one line of a list, its image relative to the data folder."""
    return {
        "image": os.path.relpath(record.image, folder.resolve()),
        "part": record.part,
        "content": digest,
        "patient": record.patient,
        "captions": list(record.captions),
        "site": record.site,
        "labels": record.labels,
    }


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Read a list as `write_list` wrote it, line by line.

    Raises:
        BadInput: It is not there, or was damaged.
    """
    try:
        # Names of files may be no UTF-8; and only a line feed ends a line, not what a caption may hold.
        with path.open(encoding="utf-8", errors="surrogatepass", newline="\n") as file:
            yield from (json.loads(line) for line in file if line.strip())
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: cannot be read ({error}); write it again") from error


def read_list(path: Path, folder: Path) -> list[Record]:
    """Read a list's records."""
    inside = folder.resolve()
    return [
        Record(
            line["patient"],
            inside / line["image"],
            tuple(line["captions"]),
            line["site"],
            line["labels"],
            line["part"],
        )
        for line in read_lines(path)
    ]
