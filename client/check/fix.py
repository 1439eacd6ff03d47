"""What `check --fix` writes: the list of what is accepted, and the quarantine. No original is touched.

An image or caption is put aside for what is visible in it alone (PRIVACY.md, rule 7).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from polyclinic.client.check.seen import Example, Seen
from polyclinic.client.intake import accepted_path, as_line, quarantine_path, snapshot_path, write_list
from polyclinic.common.data.table import Table
from polyclinic.common.files import sha256_file
from polyclinic.common.refusals import BadInput
from polyclinic.common.settings import DataSettings


def fix(
    home: Path,
    folder: Path,
    data: DataSettings,
    table: Table,
    seen: Seen,
    captions: dict[str, Example],
) -> dict[str, Any]:
    """Write both lists.

    Args:
        home: The site's home.
        folder: The data folder.
        data: How it is read.
        table: As it was read.
        seen: What its images showed.
        captions: Those that may not be used, with (code, detail).

    Returns:
        JSON-safe counts and paths; `older_snapshot` where a snapshot of this folder is of another list.

    Raises:
        BadInput: Nothing is left.
    """
    reasons = dict(seen.quarantined)
    for place, record in enumerate(table.records):
        if place not in reasons and all(caption in captions for caption in record.captions):
            reasons[place] = captions[record.captions[0]]
    kept = [place for place in range(len(table.records)) if place not in reasons]
    if not kept:
        raise BadInput(f"{folder}: nothing is left after the quarantine; see the report")
    refused = [problem for problem in table.problems if not problem.skipped]

    def line(place: int, texts: list[str]) -> dict[str, Any]:
        record = table.records[place]
        return {**as_line(record, folder, seen.contents[place].decode()), "captions": texts}

    def usable(place: int) -> list[str]:
        return [caption for caption in table.records[place].captions if caption not in captions]

    def aside() -> Iterator[dict[str, Any]]:
        for place, (code, detail) in sorted(reasons.items()):
            yield {**line(place, []), "code": code, "detail": detail}
        for problem in refused:
            yield {"image": problem.image, "code": problem.code, "detail": str(problem)}

    paths = accepted_path(home, data, folder), quarantine_path(home, data, folder)
    write_list(paths[1], aside())
    write_list(paths[0], (line(place, usable(place)) for place in kept))
    snapshot = snapshot_path(home, data, folder)
    lost = sum(len(record.captions) for record in table.records) - sum(len(usable(place)) for place in kept)
    return {
        "fixed": True,
        "accepted": len(kept),
        "accepted_patients": len({table.records[place].patient for place in kept}),
        "quarantined": len(reasons) + len(refused),
        "captions_left_out": lost,
        "accepted_list": str(paths[0]),
        "quarantine_list": str(paths[1]),
        "older_snapshot": snapshot.exists() and sha256_file(snapshot) != sha256_file(paths[0]),
    }
