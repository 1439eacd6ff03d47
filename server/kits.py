"""Writes kits: a folder and its zip, with a resolved study and public parts, never code."""

from __future__ import annotations

import os
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import jinja2
from cryptography import x509

from polyclinic.common.certificates import certificate_pem, fingerprint, grouped
from polyclinic.common.files import (
    canonical_json,
    naming_full_disk,
    sha256_file,
    sha256_folder,
    sync_folder,
    write_atomic,
    write_json_atomic,
)
from polyclinic.common.kit import BASE_INDEX, CA, KIT, PAGES, STUDY, BaseIndex, Kit, open_kit
from polyclinic.common.refusals import BadInput
from polyclinic.common.stored import read_stored
from polyclinic.common.study import CODE_VERSION, Resolved, Study

if TYPE_CHECKING:
    from polyclinic.common.generators.base import BaseFiles

TEMPLATES = Path(__file__).parent / "kit"


@dataclass(frozen=True)
class Contents:
    """What all sites' kits of a study have in common.

    Attributes:
        ca: The federation's CA certificate.
        resolved: The study.
        parts: Name in the kit to path of each frozen part that has to travel.
        index: Which of them belongs to the study.
        contact: Whom a site's people call; empty where nobody was named.
    """

    ca: x509.Certificate
    resolved: Resolved
    parts: dict[str, Path]
    index: BaseIndex
    contact: str


def resolve_study(home: Path, study: Study, reference: Path | None) -> tuple[Resolved, BaseFiles]:
    """Resolve a study, or find that it was; its run folder then says with which public parts.

    Args:
        home: The coordinator's home.
        study: The study.
        reference: Folder of the public images; None only where the study was resolved here before.

    Raises:
        BadInput: There is no reference, or a part is missing.
    """
    if reference is None:
        for path in sorted((home / "runs").glob(f"{study.name}-*/study.json")):
            resolved, files = read_run(home, path.parent.name)
            if resolved.study == study and resolved.code_version == CODE_VERSION:
                return resolved, files
    from polyclinic.server.base import prepare_base  # torch: `start` and `enroll` need not wait for it
    from polyclinic.server.reference import read_reference

    base = prepare_base(home, study, read_reference(study, reference))
    run_dir = home / "runs" / base.resolved.run_name
    run_dir.mkdir(parents=True, exist_ok=True)
    write_atomic(run_dir / "base.json", base.files.model_dump_json().encode())
    write_json_atomic(run_dir / "study.json", base.resolved.model_dump(mode="json"))
    return base.resolved, base.files


def read_run(home: Path, run: str) -> tuple[Resolved, BaseFiles]:
    """Read the resolved study of a run folder, and where its frozen parts lie.

    Raises:
        BadInput: There is no such run.
    """
    run_dir = home / "runs" / run
    if not (run_dir / "study.json").exists():
        raise BadInput(f"{run_dir}: no such run any more; run `polyclinic-server provision` for its study")
    again = "run `polyclinic-server provision` for its study again"
    resolved = read_stored(run_dir / "study.json", Resolved, again)
    from polyclinic.common.generators.base import BaseFiles

    files = read_stored(run_dir / "base.json", BaseFiles, again)
    return resolved, files


def gather(ca: x509.Certificate, resolved: Resolved, files: BaseFiles, contact: str) -> Contents:
    """Find what has to travel: what a site cannot find by the name the study has for it.

    Raises:
        BadInput: The study names a part that can neither travel nor be found at a site.
    """
    generator = resolved.study.generator
    if generator.large:
        for field, source in generator.checkpoints.items():
            if _only_here(source):
                raise BadInput(
                    f"`generator.{field} = {source!r}` is a folder on this machine, and no kit carries a "
                    f"large model; name its Hugging Face id with generator.{field}_revision; a site "
                    "without a network takes it with `polyclinic-client base add FOLDER`"
                )
        return Contents(ca, resolved, {}, BaseIndex(), contact)
    if _only_here(generator.text_encoder):
        raise BadInput(
            f"`generator.text_encoder = {generator.text_encoder!r}` is a folder on this machine, which no "
            "site has; name `package:NAME` or a Hugging Face id with its revision"
        )
    parts: dict[str, Path] = {}
    named: dict[Literal["vae", "frozen"], str] = {}
    assert files.vae is not None
    if _only_here(generator.vae):
        named["vae"] = f"vae-{sha256_folder(files.vae)[:12]}"
        parts[named["vae"]] = files.vae
    if files.frozen and _only_here(generator.warm_start):
        named["frozen"] = f"frozen-{sha256_file(files.frozen)[:12]}.safetensors"
        parts[named["frozen"]] = files.frozen
    index = BaseIndex(bases={resolved.base_hash: named} if named else {})
    return Contents(ca, resolved, parts, index, contact)


def write_kit(folder: Path, kit: Kit, contents: Contents) -> None:
    """Write a kit and its zip, each whole or as it was before.

    Args:
        folder: `kits/<site>`; the zip stands beside it.
        kit: What is this site's own.
        contents: What all kits share.

    Raises:
        BadInput: A frozen part holds files that a kit may not carry; the disk is full.
    """
    folder.parent.mkdir(mode=0o700, exist_ok=True)
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(mode=0o700)
    write_json_atomic(part / KIT, kit.model_dump(mode="json"), mode=0o600)
    write_atomic(part / CA, certificate_pem(contents.ca))
    write_atomic(part / STUDY, canonical_json(contents.resolved.model_dump(mode="json")))
    (part / "base").mkdir()
    with naming_full_disk(part / "base"):
        for name, source in contents.parts.items():
            if source.is_dir():
                shutil.copytree(source, part / "base" / name, copy_function=shutil.copyfile)
            else:
                shutil.copyfile(source, part / "base" / name)
    write_json_atomic(part / BASE_INDEX, contents.index.model_dump(mode="json"))
    for name in PAGES:
        write_atomic(part / name, instructions(name, kit, contents).encode())
    # A site refuses a kit with any other name in it: better said here.
    with open_kit(part) as made:
        names = made.names
    zipped = folder.with_name(f".{folder.name}.zip.part")
    zipped.unlink(missing_ok=True)
    with (
        naming_full_disk(zipped),
        os.fdopen(os.open(zipped, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as stream,
    ):
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            for name in names:
                archive.write(part / name, name)
        stream.flush()
        os.fsync(stream.fileno())
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
    zipped.replace(folder.with_name(f"{folder.name}.zip"))
    sync_folder(folder.parent)


def instructions(name: str, kit: Kit, contents: Contents) -> str:
    """Render one of the two instruction pages; the page is text for a firewall request, too."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=name.endswith(".html"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    study = contents.resolved.study
    return environment.get_template(f"{name}.j2").render(
        kit=kit,
        study=study,
        code_version=contents.resolved.code_version,
        study_hash=grouped(contents.resolved.hash),
        ca=fingerprint(contents.ca),
        contact=contents.contact,
        hub=[x for x in study.generator.sources if _from_hub(x)],
    )


def _only_here(source: str) -> bool:
    """Is a part found on this machine alone: trained here, or a path?"""
    return source == "reference" or (not source.startswith("package:") and Path(source).exists())


def _from_hub(source: str) -> bool:
    return not source.startswith("package:") and not _only_here(source)
