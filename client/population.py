"""Whose patients a ledger charges, and that no other ledger of this machine's user charges them too.

PRIVACY.md, rule 8: one ledger a site for its whole patient population; two only where their patients are
proven disjoint and a person confirms. Each real ledger keeps, in `<home>/data/population.json`, a keyed hash
of every patient whom any approval ever bound: a patient who left a snapshot stays charged. It is written
before the approval is, so that a kill leaves it too large, never too small. A list in the user's state
folder says where ledgers lie. To compare, this site's ids are hashed with the other ledger's key. Ids that
differ between two systems of one hospital hide a patient from this: that is what the person confirms.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

from polyclinic.client.intake import site_key
from polyclinic.client.ledger_chain import inspect
from polyclinic.client.ledger_register import locked, register, registered
from polyclinic.common.data.dicom import pseudonym
from polyclinic.common.data.pixels import digests
from polyclinic.common.data.sources import read_table
from polyclinic.common.data.table import Record
from polyclinic.common.files import write_json_atomic
from polyclinic.common.refusals import BadInput, Refusal
from polyclinic.common.settings import DataSettings

OTHER = {"patient": "image", "image": "patient"}


class Beside(NamedTuple):
    """Another ledger here.

    Attributes:
        home: Its home.
        common: Patients of this data whom it charges; None where that cannot be known.
        why: Why not; "" where it can.
    """

    home: Path
    common: int | None
    why: str = ""


def ledgers_beside(home: Path) -> list[Path]:
    """Homes of the other real ledgers that are there."""
    others = [other for other in registered() if other != home.resolve()]
    return [o for o in others if (o / "ledger.jsonl").exists() and not _first(o).get("simulated")]


def compare(home: Path, data: DataSettings, folder: Path, records: Sequence[Record]) -> list[Beside]:
    """Count, for every other ledger here, the patients of this data whom it charges.

    Args:
        home: The site's home.
        data: How the folder is read.
        folder: The data folder.
        records: The table, read with this site's own key.
    """
    return [_compare(other, data, folder, records) for other in ledgers_beside(home)]


def _compare(other: Path, data: DataSettings, folder: Path, records: Sequence[Record]) -> Beside:
    try:
        population = _read(other)
        if population is None:
            charged = any(line["kind"] == "earmark" for line in inspect(other)[0])
            why = "it charged patients whom it has no list of" if charged else ""
            return Beside(other, None if charged else 0, why)
        if population[OTHER[data.unit]]:
            return Beside(other, None, "one of the two has patient ids, the other only images")
        key = site_key(other)
    except (OSError, Refusal, BadInput) as error:
        return Beside(other, None, f"it cannot be read ({error})")
    if data.source == "dicom":  # ids are pseudonyms under this site's key: read them under the other's
        records = read_table(data, folder, key).records
    return Beside(other, len(_hashes(data, records, key) & set(population[data.unit])))


def hold_apart(home: Path, data: DataSettings, folder: Path, records: Sequence[Record]) -> list[Beside]:
    """Refuse patients whom another ledger charges; else remember them as this ledger's, before it charges.

    Returns:
        The other ledgers, proven to have none of them.

    Raises:
        Refusal: `charged-elsewhere`.
    """
    if _first(home).get("simulated"):
        return []
    register(home)
    with ExitStack() as held:
        with suppress(OSError):  # `register` has said so
            held.enter_context(locked())
        others = compare(home, data, folder, records)
        for other in others:
            if other.common != 0:
                raise Refusal("charged-elsewhere", words(other, data.unit))
        remember(home, data, records)
    return others


def remember(home: Path, data: DataSettings, records: Sequence[Record]) -> None:
    """Add patients to a ledger's population; nobody ever leaves it."""
    known = _read(home) or {"patient": [], "image": []}
    new = _hashes(data, records, site_key(home))
    known[data.unit] = sorted(new | set(known[data.unit]))
    write_json_atomic(_path(home), known, mode=0o600)


def words(other: Beside, unit: str) -> str:
    """Say how a ledger lies to this data."""
    if other.common is None:
        return f"the ledger in {other.home}: cannot be proven disjoint, {other.why}"
    if other.common:
        return f"the ledger in {other.home} charges {other.common} {unit}s of this data"
    return f"the ledger in {other.home} charges no {unit} of this data, by keyed hashes of their ids"


def _hashes(data: DataSettings, records: Sequence[Record], key: bytes) -> set[str]:
    if data.unit == "image":
        return {pseudonym(content, key) for content in digests(list(records))}
    patients = {record.patient for record in records}
    return patients if data.source == "dicom" else {pseudonym(patient, key) for patient in patients}


def _path(home: Path) -> Path:
    return home / "data" / "population.json"


def _read(home: Path) -> dict[str, list[str]] | None:
    path = _path(home)
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {unit: list(found[unit]) for unit in OTHER}
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path}: not a ledger's population ({error}); restore it from a backup") from error


def _first(home: Path) -> dict[str, Any]:
    with suppress(Refusal):
        return inspect(home)[0][0]
    return {}
