"""What a site takes out of a kit: the CA, the study, and the frozen public parts, kept by their content."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cryptography import x509

from polyclinic.common.certificates import certificate_pem, certificate_sha256, parse_certificate
from polyclinic.common.files import sha256_file, sha256_folder, write_atomic, write_json_atomic
from polyclinic.common.kit import (
    BASE_INDEX,
    CA,
    KIT,
    STUDY,
    BaseIndex,
    Kit,
    KitFiles,
    copy_part,
    parse_exchanged,
    read_exchanged,
)
from polyclinic.common.refusals import BadInput
from polyclinic.common.study import Resolved


@dataclass(frozen=True)
class Opened:
    """A kit that was read and found right.

    Attributes:
        kit: What it says.
        ca: The federation's CA certificate.
        resolved: The study.
        index: Which frozen parts it carries.
    """

    kit: Kit
    ca: x509.Certificate
    resolved: Resolved
    index: BaseIndex


def read_opened(files: KitFiles) -> Opened:
    """Read a kit and check that its parts belong together.

    Raises:
        BadInput: They do not, or one is missing.
    """
    kit = parse_exchanged(files.read(KIT), Kit, f"{files.path}: {KIT}")
    ca = parse_certificate(files.read(CA), f"{files.path}: {CA}")
    resolved = parse_exchanged(files.read(STUDY), Resolved, f"{files.path}: {STUDY}")
    index = parse_exchanged(files.read(BASE_INDEX), BaseIndex, f"{files.path}: {BASE_INDEX}")
    if certificate_sha256(ca) != kit.ca_sha256:
        raise BadInput(
            f"{files.path}: {CA} is not the CA that {KIT} names; ask the coordinator for the kit again"
        )
    if resolved.study.name != kit.study:
        raise BadInput(f"{files.path}: {STUDY} is not the study that {KIT} names; ask for the kit again")
    return Opened(kit, ca, resolved, index)


def take_in(home: Path, files: KitFiles, opened: Opened) -> None:
    """Copy what a kit carries; parts of earlier kits stay, for the studies approved on them.

    Raises:
        BadInput: A part is damaged or missing, or the disk is full.
    """
    folder = home / "kit"
    folder.mkdir(exist_ok=True, mode=0o700)
    (folder / "base").mkdir(parents=True, exist_ok=True, mode=0o700)
    carried = [name for name in files.names if name.startswith("base/") and name != BASE_INDEX]
    for name in carried:
        copy_part(files, name, folder / name)
    parts = {name.split("/")[1] for name in carried}
    missing = {x for base in opened.index.bases.values() for x in base.values()} - parts
    if missing:
        raise BadInput(f"{files.path}: base/{min(missing)} is missing; ask for the kit again")
    for name in sorted(parts):
        part = folder / "base" / name
        found = sha256_folder(part) if part.is_dir() else sha256_file(part)
        if found[:12] not in name:
            raise BadInput(f"{files.path}: base/{name} is damaged; remove {part} and ask for the kit again")
    path = folder / BASE_INDEX
    before = read_exchanged(path, BaseIndex).bases if path.exists() else {}
    index = BaseIndex(bases=before | opened.index.bases)
    write_json_atomic(path, index.model_dump(mode="json"))
    write_atomic(folder / CA, certificate_pem(opened.ca))
    write_atomic(folder / STUDY, files.read(STUDY))
