"""The coordinator's register of sites: who was invited, who is enrolled with which keys, who is out.

One file, `sites.json`, written whole under a lock. What the gateway admits is drawn from it.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from polyclinic.common.files import write_atomic, write_json_atomic
from polyclinic.common.kit import HOST, SHA256, SITE
from polyclinic.common.node_keys import node_key_header, parse_node_key
from polyclinic.common.refusals import BadInput
from polyclinic.common.study import explain

SiteName = Annotated[str, Field(pattern=SITE)]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Invitation(_Entry):
    """A kit's one-time secret.

    Attributes:
        secret: Hexadecimal; None once it was used or withdrawn.
        secret_sha256: Of the secret's bytes.
        expires: When it ends by itself.
    """

    secret: str | None
    secret_sha256: str
    expires: AwareDatetime


class Enrolled(_Entry):
    """The keys a site is admitted with.

    Attributes:
        certificate: PEM.
        certificate_sha256: Of its DER.
        serial: Of the certificate, hexadecimal.
        tls_key_sha256: Of the certificate's key.
        node_key: OpenSSH text.
        node_key_sha256: Of the SubjectPublicKeyInfo.
        request_sha256: The request that was answered, so that asking again gives the same answer.
        since: When it was enrolled.
    """

    certificate: str
    certificate_sha256: str
    serial: str
    tls_key_sha256: str
    node_key: str
    node_key_sha256: str
    request_sha256: str
    since: AwareDatetime


class Site(_Entry):
    """One site.

    Attributes:
        invitation: Of its newest kit with a secret.
        enrolled: What it is or was admitted with.
        revoked: When it was put out; None again once it is enrolled anew.
        runs: Names of the runs it was given a kit for, oldest first.
    """

    invitation: Invitation
    enrolled: Enrolled | None = None
    revoked: AwareDatetime | None = None
    runs: list[str] = []

    @property
    def state(self) -> Literal["invited", "enrolled", "revoked"]:
        """Where the site stands."""
        if self.revoked:
            return "revoked"
        return "enrolled" if self.enrolled else "invited"


class Register(_Entry):
    """`sites.json`.

    Attributes:
        host: Public address in every kit; the gateway's certificate names it and `names`.
        port: Public TCP port.
        ca_sha256: Of the federation's CA certificate.
        contact: Whom a site's people call, for the instructions page.
        run: The run whose study the next kit carries.
        retired: Every key that was ever replaced or revoked, by its hash: never admitted again.
    """

    version: Literal[1] = 1
    host: str = Field(pattern=HOST)
    port: int = Field(ge=1, le=65535)
    ca_sha256: str = Field(pattern=SHA256)
    contact: str = ""
    run: str
    sites: dict[SiteName, Site] = {}
    retired: dict[str, str] = {}

    def site(self, name: str) -> Site:
        """Find a site.

        Raises:
            BadInput: There is none of that name.
        """
        if name not in self.sites:
            known = ", ".join(sorted(self.sites)) or "none"
            raise BadInput(f"{name}: no such site in the register (known: {known}); check its spelling")
        return self.sites[name]

    def retire(self, site: Site, why: str) -> None:
        """Remember a site's keys as never to be admitted again."""
        if site.enrolled:
            self.retired[site.enrolled.node_key_sha256] = why
            self.retired[site.enrolled.tls_key_sha256] = why

    def known_keys(self) -> set[str]:
        """Hashes of all keys that are or were in use."""
        current = [site.enrolled for site in self.sites.values() if site.enrolled]
        return {*self.retired, *(e.node_key_sha256 for e in current), *(e.tls_key_sha256 for e in current)}


def read_register(home: Path) -> Register | None:
    """Read the register; None where nothing was provisioned yet.

    Raises:
        BadInput: It is not whole.
    """
    path = home / "sites.json"
    if not path.exists():
        return None
    try:
        return Register.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        raise BadInput(f"{path}: {explain(error)}; restore it from a backup") from error
    except ValueError as error:
        raise BadInput(f"{path}: not a JSON file; restore it from a backup") from error


def require_register(home: Path) -> Register:
    """Read the register.

    Raises:
        BadInput: Nothing was provisioned here, or it is not whole.
    """
    register = read_register(home)
    if register is None:
        raise BadInput(f"{home}: nothing is provisioned here; run `polyclinic-server provision STUDY` first")
    return register


def write_register(home: Path, register: Register) -> None:
    """Write the register, then what the gateway admits; `locked` is held."""
    write_json_atomic(home / "sites.json", register.model_dump(mode="json"), mode=0o600)
    sync_gateway(home, register)


def sync_gateway(home: Path, register: Register) -> None:
    """Bring `gateway/sites.json` up to the register; a file that says so already is left alone."""
    path = home / "gateway" / "sites.json"
    sites = {
        name: {
            "certificate_sha256": site.enrolled.certificate_sha256,
            "node_key": node_key_header(parse_node_key(site.enrolled.node_key, "sites.json")),
        }
        for name, site in sorted(register.sites.items())
        if site.enrolled and not site.revoked
    }
    data = json.dumps({"sites": sites}, sort_keys=True, indent=1).encode()
    if path.exists() and path.read_bytes() == data:
        return
    path.parent.mkdir(mode=0o700, exist_ok=True)
    write_atomic(path, data)


@contextmanager
def locked(home: Path) -> Iterator[None]:
    """Hold the register's lock; a second command waits until the first has ended."""
    handle = os.open(home / "sites.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def sites_of_run(home: Path, run: str) -> list[str]:
    """Names of the sites that were given a kit for a run and were not revoked."""
    sites = require_register(home).sites
    return sorted(name for name, site in sites.items() if run in site.runs and not site.revoked)


def now() -> datetime:
    """This moment in UTC, whole seconds."""
    return datetime.now(UTC).replace(microsecond=0)
