"""What a coordinator's bundle may hold: configuration, read in memory.

No bundle is ever unpacked or imported (`launcher.py` sees to that); one that holds more than this is a
coordinator's mistake or an attempt, and its run is refused.
"""

from __future__ import annotations

import re
import struct
import tomllib
import zipfile
import zlib
from io import BytesIO
from typing import Any

from polyclinic.common.refusals import Refusal

MEMBERS = {"pyproject.toml", "README.md", ".info/CONTENT"}
LIMIT_BYTES = 65536
CLIENT_APP = "polyclinic.client.app:app"
RUN_CONFIG = {"run"}
_PROJECT = {"name", "version", "description", "license", "readme", "dependencies"}
_APP = {"publisher", "fab-include", "fab-format-version", "components", "config"}
_OURS = re.compile(r"(polyclinic|flwr)(\[[a-z,]*\])?\s*([<>=!~][^@;]*)?")
# A stranger's zip and TOML can be wrong in every way that Python knows.
_UNREADABLE = (
    *(zipfile.BadZipFile, zlib.error, struct.error, ValueError, RuntimeError, EOFError, OSError),
    *(LookupError, TypeError, AttributeError, MemoryError),
)


def check_bundle(bundle: bytes) -> None:
    """Refuse a bundle that holds more than our configuration; nothing of it is unpacked or imported.

    Raises:
        Refusal: `bundle-forbidden`.
    """
    fault = "it is too large, or cannot be read"
    try:
        if len(bundle) <= LIMIT_BYTES:
            with zipfile.ZipFile(BytesIO(bundle)) as archive:
                fault = _fault(archive)
    except _UNREADABLE:
        pass
    if fault:
        raise Refusal("bundle-forbidden", fault)


def _fault(archive: zipfile.ZipFile) -> str:
    """Say what a bundle holds that it may not; empty where all is well."""
    members = archive.infolist()
    names = sorted(member.filename for member in members)
    if len(set(names)) < len(names) or not {"pyproject.toml"} <= set(names) <= MEMBERS:
        return f"it holds {names[:10]}"
    plain = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
    if sum(m.file_size for m in members) > LIMIT_BYTES or {m.compress_type for m in members} - plain:
        return "it is too large, or packed in an odd way"
    whole = tomllib.loads(archive.read("pyproject.toml").decode())
    project, tool = _table(whole, "project"), _table(whole, "tool")
    app = _table(_table(tool, "flwr"), "app")
    odd = {*whole} - {"project", "tool"} | {*tool} - {"flwr"} | {*tool["flwr"]} - {"app"}
    odd |= {*project} - _PROJECT | {*app} - _APP | {*_table(app, "config")} - RUN_CONFIG
    odd |= {str(name) for name in project.get("dependencies", []) if not _OURS.fullmatch(str(name))}
    if _table(app, "components").get("clientapp") != CLIENT_APP:
        odd.add("another clientapp")
    return f"its pyproject.toml holds {sorted(odd)[:10]}" if odd else ""


def _table(table: dict[str, Any], name: str) -> dict[str, Any]:
    found = table.get(name, {})
    if not isinstance(found, dict):
        raise ValueError(f"{name} is no table")
    return found
