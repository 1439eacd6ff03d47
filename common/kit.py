"""What coordinator and hospital exchange by hand: the kit, the enrolment request and its answer.

A kit is a folder or a zip of it with a closed list of names; it holds configuration and public
weights, never code. The kit's one-time secret comes back only as the key of an HMAC over the request.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import stat
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Annotated, Any, Literal, Self, TypeVar

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, model_validator

from polyclinic.common.files import canonical_json, naming_full_disk
from polyclinic.common.refusals import BadInput
from polyclinic.common.study import explain

SITE = r"^[a-z][a-z0-9-]{0,39}$"
HOST = r"^[A-Za-z0-9:]([A-Za-z0-9.:-]{0,251}[A-Za-z0-9:])?$"
SHA256 = r"^[0-9a-f]{64}$"
SECRET_BYTES = 32

KIT, CA, STUDY, BASE, BASE_INDEX = "kit.json", "ca.crt", "study.json", "base", "base/base.json"
PAGES = ("INSTRUCTIONS.html", "INSTRUCTIONS.txt")
_SMALL = {KIT, CA, STUDY, BASE_INDEX, *PAGES}
_SMALL_BYTES = 1 << 20
_BASE_BYTES = 32 << 30
# Frozen parts by their content: `vae-<hash>/` is a folder, `frozen-<hash>.safetensors` a file.
_PART = re.compile(
    r"base/(vae-[0-9a-f]{12}/[A-Za-z0-9_][A-Za-z0-9._-]{0,99}\.(json|safetensors|txt|md)"
    r"|frozen-[0-9a-f]{12}\.safetensors)"
)

_WORDS = {
    "Kit": "kit",
    "Request": "enrolment request",
    "Answer": "answer to a request",
    "BaseIndex": "list of frozen parts",
    "Resolved": "resolved study",
}

Model = TypeVar("Model", bound=BaseModel)
BaseHash = Annotated[str, Field(pattern=SHA256)]
PartName = Annotated[str, Field(pattern=r"^(vae-[0-9a-f]{12}|frozen-[0-9a-f]{12}\.safetensors)$")]


class _Exchanged(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    site: str = Field(pattern=SITE)


class Kit(_Exchanged):
    """`kit.json`: how one site reaches the federation, and the secret that lets it in once.

    Attributes:
        study: Name of the study.
        host: Public address of the gateway.
        port: Its TCP port.
        ca_sha256: Of the DER of `ca.crt`.
        secret: One-time enrolment secret, hexadecimal; None in a kit that brings an enrolled site
            another study, and once the site is enrolled.
        expires: When the secret ends; None where there is none.
        used: In a site's home, SHA-256 of the secret it last enrolled with; None in a kit on its way.
    """

    study: str = Field(pattern=SITE)
    host: str = Field(pattern=HOST)
    port: int = Field(ge=1, le=65535)
    ca_sha256: str = Field(pattern=SHA256)
    secret: str | None = Field(None, pattern=SHA256)
    expires: AwareDatetime | None = None
    used: str | None = Field(None, pattern=SHA256)

    @model_validator(mode="after")
    def _secret_ends(self) -> Self:
        if (self.secret is None) != (self.expires is None):
            raise ValueError("secret and expires come together")
        return self

    def expired(self, now: datetime | None = None) -> bool:
        """Has the secret ended?"""
        return self.expires is not None and self.expires < (now or datetime.now(UTC))


class Request(_Exchanged):
    """`request-<site>.json`: a site's public keys, proven by the kit's secret and by both keys.

    Attributes:
        host: Address in the kit it was made from.
        port: Port in that kit.
        ca_sha256: Federation of that kit.
        node_key: Public key of the SuperNode, OpenSSH text.
        certificate_request: PKCS #10, PEM, signed by the TLS key.
        node_signature: By the node key over all fields above.
        proof: HMAC-SHA256 under the kit's secret over all fields above, hexadecimal.
    """

    host: str = Field(pattern=HOST)
    port: int = Field(ge=1, le=65535)
    ca_sha256: str = Field(pattern=SHA256)
    node_key: str = Field(max_length=500)
    certificate_request: str = Field(max_length=4000)
    node_signature: str = Field("", max_length=500)
    proof: str = Field("", max_length=64)

    def signed_bytes(self) -> bytes:
        """What the node key signs."""
        return canonical_json(self.model_dump(exclude={"node_signature", "proof"}))

    def proof_with(self, secret: str) -> str:
        """The proof that a holder of this secret gives."""
        message = canonical_json(self.model_dump(exclude={"proof"}))
        return hmac.new(bytes.fromhex(secret), message, hashlib.sha256).hexdigest()

    def proven_by(self, secret: str) -> bool:
        """Was this request made with this secret, and not changed since?"""
        return hmac.compare_digest(self.proof.encode(), self.proof_with(secret).encode())

    @property
    def sha256(self) -> str:
        """Hash of the whole request."""
        return hashlib.sha256(canonical_json(self.model_dump())).hexdigest()


class Answer(_Exchanged):
    """`certificate-<site>.json`: the site's certificate, and which federation signed it."""

    ca_sha256: str = Field(pattern=SHA256)
    certificate: str = Field(max_length=8000, description="PEM")


class BaseIndex(BaseModel):
    """`base/base.json`: base hash of a study to the names of the frozen parts the kit carries.

    A part that is not named is found by the name that the study has for it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    bases: dict[BaseHash, dict[Literal["vae", "frozen"], PartName]] = {}


def read_exchanged(path: Path, model: type[Model]) -> Model:
    """Read one of the files above.

    Raises:
        BadInput: Missing, not JSON, or not that file; names file, field and fix.
    """
    if not path.is_file():
        raise BadInput(f"{path}: no such file; name the file as it came by mail")
    if path.stat().st_size > _SMALL_BYTES:
        raise BadInput(f"{path}: too large for this kind of file; name the file as it came by mail")
    return parse_exchanged(path.read_bytes(), model, str(path))


def parse_exchanged(data: bytes, model: type[Model], name: str) -> Model:
    """Decode one of the files above; `name` says in an error where it came from.

    Raises:
        BadInput: As `read_exchanged`.
    """
    try:
        values: Any = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{name}: not a JSON file; name the file as it came by mail") from error
    try:
        return model.model_validate(values)
    except ValidationError as error:
        what = _WORDS.get(model.__name__, model.__name__)
        raise BadInput(f"{name}: no {what} of this release: {explain(error)}") from error


class KitFiles:
    """The files of a kit, from a folder or a zip; use `open_kit`."""

    def __init__(self, path: Path, archive: zipfile.ZipFile | None, names: list[str]) -> None:
        self.path, self.names, self._archive = path, names, archive

    @contextmanager
    def open(self, name: str) -> Iterator[IO[bytes]]:
        """Open one file to read."""
        try:
            with self._archive.open(name) if self._archive else (self.path / name).open("rb") as stream:
                yield stream
        except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError) as error:
            raise BadInput(f"{self.path}: {name} is damaged ({error}); ask for the kit again") from error

    def read(self, name: str) -> bytes:
        """Read one small file.

        Raises:
            BadInput: The kit does not have it.
        """
        if name not in self.names:
            raise BadInput(f"{self.path}: not a kit: {name} is missing; name the folder or zip as it came")
        with self.open(name) as stream:
            return stream.read(_SMALL_BYTES)


@contextmanager
def open_kit(path: Path) -> Iterator[KitFiles]:
    """Open a kit, having checked every name, kind and size in it; nothing is unpacked.

    Raises:
        BadInput: It is no kit, or holds anything but a kit's files: other names, absolute paths,
            `..`, links, too much.
    """
    if path.is_dir():
        sizes = {}
        for entry in sorted(path.rglob("*")):
            name = entry.relative_to(path).as_posix()
            if entry.is_symlink() or not (entry.is_dir() or entry.is_file()):
                raise BadInput(f"{path}: {name} is a link or special file; a kit has plain files only")
            if entry.is_file():
                sizes[name] = entry.stat().st_size
        _check_names(path, sizes)
        yield KitFiles(path, None, sorted(sizes))
        return
    if not path.is_file():
        raise BadInput(f"{path}: no such kit; name the folder or zip that the coordinator sent")
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise BadInput(f"{path}: not a kit, or damaged on its way ({error}); ask for it again") from error
    with archive:
        infos = [info for info in archive.infolist() if not info.is_dir()]
        for info in infos:
            kind = stat.S_IFMT(info.external_attr >> 16)
            if kind not in (0, stat.S_IFREG):
                raise BadInput(
                    f"{path}: {info.filename} is a link or special file; a kit has plain files only"
                )
        if len({info.filename for info in infos}) != len(infos):
            raise BadInput(f"{path}: a name is in it twice; ask the coordinator for the kit again")
        _check_names(path, {info.filename: info.file_size for info in infos})
        yield KitFiles(path, archive, sorted(info.filename for info in infos))


def copy_part(kit: KitFiles, name: str, target: Path) -> None:
    """Copy one file of a kit, whole or not at all; a file that is there already is left."""
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    part = target.with_name(f".part-{target.name}")
    with naming_full_disk(target), kit.open(name) as source, part.open("wb") as stream:
        while block := source.read(1 << 20):
            stream.write(block)
        stream.flush()
        os.fsync(stream.fileno())
    part.replace(target)


def _check_names(path: Path, sizes: dict[str, int]) -> None:
    for name, size in sizes.items():
        if name not in _SMALL and not _PART.fullmatch(name):
            raise BadInput(f"{path}: {name!r} does not belong in a kit; do not use it, ask the coordinator")
        if name in _SMALL and size > _SMALL_BYTES:
            raise BadInput(f"{path}: {name} is too large for a kit; do not use it, ask the coordinator")
    if sum(sizes.values()) > _BASE_BYTES:
        raise BadInput(f"{path}: larger than {_BASE_BYTES >> 30} GiB; ask the coordinator for another kit")
