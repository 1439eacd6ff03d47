"""Whom the gateway admits: `gateway/sites.json`, followed while it changes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from polyclinic.common.refusals import BadInput

# Name of the header in which a SuperNode sends its public key (flwr.supercore.constant, tested there).
NODE_KEY_HEADER = "flwr-public-key"

_NAME = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class Admission(BaseModel):
    """What one site shows: its certificate, and the node key bound to that certificate.

    A field we do not know could be one that takes an admission back: it makes the file invalid.

    Attributes:
        certificate_sha256: Of the certificate's DER, 64 hexadecimal digits.
        node_key: Exactly what its SuperNode sends in the header `NODE_KEY_HEADER`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    certificate_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    node_key: str = Field(pattern=r"^[A-Za-z0-9+/]+=*$", max_length=2048)


class Admitted(BaseModel):
    """The whole file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sites: dict[_NAME, Admission] = {}

    @model_validator(mode="after")
    def _one_site_each(self) -> Admitted:
        for what in ("certificate_sha256", "node_key"):
            values = [getattr(site, what) for site in self.sites.values()]
            if len(set(values)) < len(values):
                raise ValueError(f"two sites have the same {what}")
        return self

    def site_of(self, certificate_sha256: str) -> str | None:
        """Name the site that a certificate belongs to, or None where it is not admitted."""
        for name, site in self.sites.items():
            if site.certificate_sha256 == certificate_sha256:
                return name
        return None


def admission_path(home: Path) -> Path:
    """Where a coordinator's home keeps the file."""
    return home / "gateway" / "sites.json"


def read_admitted(path: Path) -> Admitted:
    """Read and check the file.

    Raises:
        BadInput: It is missing or not what it should be.
    """
    try:
        return Admitted.model_validate_json(path.read_bytes())
    except OSError as error:
        raise BadInput(
            f"cannot read {path} ({error.strerror}); run `polyclinic-server provision` in this home first"
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "file"
        raise BadInput(
            f"{path}: {where}: {first['msg']}; run `polyclinic-server sites` to have it written again"
        ) from error


class Watched:
    """The file as it is now.

    While it is missing or wrong nobody is admitted: it may be a revocation that failed.

    Args:
        home: The coordinator's home.

    Attributes:
        admitted: What it says.
        fault: Why nobody is admitted, or "".
    """

    def __init__(self, home: Path) -> None:
        self.path = admission_path(home)
        self.admitted, self.fault = Admitted(), ""
        self._seen: object = ()
        self.changed()

    def changed(self) -> bool:
        """Look at the file; true where it has been replaced since the last look and was read again."""
        try:
            facts = self.path.stat()
            seen = (facts.st_mtime_ns, facts.st_size, facts.st_ino)
        except OSError:
            seen = None
        if seen == self._seen:
            return False
        # Looked at before it is read: what is written in between is seen at the next look.
        self._seen = seen
        try:
            self.admitted, self.fault = read_admitted(self.path), ""
        except BadInput as error:
            self.admitted, self.fault = Admitted(), str(error)
        return True
