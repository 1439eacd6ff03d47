"""The federation's CA and the two server certificates: made once, renewed where needed, never replaced."""

from __future__ import annotations

import ipaddress
import re
import secrets
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509

from polyclinic.common.certificates import (
    WARN_DAYS,
    PrivateKey,
    certificate_key,
    certificate_pem,
    certificate_sha256,
    covers,
    days_left,
    key_pem,
    key_sha256,
    load_certificate,
    load_key,
    make_ca,
    new_key,
    server_names,
    sign_server,
)
from polyclinic.common.files import write_atomic
from polyclinic.common.kit import HOST
from polyclinic.common.refusals import BadInput
from polyclinic.server.register import Register

LINK_NAMES = ("localhost", "127.0.0.1", "::1")


def ensure_pki(home: Path, register: Register | None, names: list[str]) -> x509.Certificate:
    """Make what is missing of CA and server certificates; keys and CA are never made twice.

    Args:
        home: The coordinator's home.
        register: None before the first kit was written.
        names: Host names and addresses that the gateway's certificate must cover.

    Returns:
        The CA's certificate.

    Raises:
        BadInput: CA key or certificate are not those of the kits that were written.
    """
    pki = home / "pki"
    pki.mkdir(mode=0o700, exist_ok=True)
    path = pki / "ca.crt"
    if register is None:
        # What a killed first run left goes on; nothing was given to anybody yet.
        key = _ensure_key(pki / "ca.key")
        if not path.exists():
            write_atomic(path, certificate_pem(make_ca(key, f"Polyclinic CA {secrets.token_hex(4)}")))
    key, ca = load_key(pki / "ca.key"), load_certificate(path)
    if register and certificate_sha256(ca) != register.ca_sha256:
        raise BadInput(f"{path}: not the CA of this federation's kits; restore it from a backup")
    if key_sha256(key.public_key()) != key_sha256(certificate_key(ca)):
        raise BadInput(f"{pki / 'ca.key'}: not the key of ca.crt beside it; restore both from a backup")
    _ensure_server(pki, "gateway", names, ca, key)
    _ensure_server(pki, "link", LINK_NAMES, ca, key)
    return ca


def _ensure_key(path: Path) -> PrivateKey:
    if not path.exists():
        write_atomic(path, key_pem(new_key()), mode=0o600)
    return load_key(path)


def _ensure_server(
    pki: Path, name: str, names: Sequence[str], ca: x509.Certificate, ca_key: PrivateKey
) -> None:
    """Sign a server's certificate where it is missing, ends soon, or lacks a name; names only add up."""
    key, path = _ensure_key(pki / f"{name}.key"), pki / f"{name}.crt"
    before: list[str] = []
    if path.exists():
        certificate = load_certificate(path)
        before = server_names(certificate)
        own = key_sha256(certificate_key(certificate)) == key_sha256(key.public_key())
        if own and covers(certificate, names) and days_left(certificate) > WARN_DAYS:
            return
    hosts = list(dict.fromkeys([*names, *before]))
    write_atomic(path, certificate_pem(sign_server(ca, ca_key, key.public_key(), hosts)))


def authority_warnings(home: Path) -> list[str]:
    """Say which of our own certificates end soon."""
    remedies = {
        "ca.crt": "plan a new federation",
        "gateway.crt": "run `polyclinic-server provision` again and restart",
        "link.crt": "run `polyclinic-server provision` again and restart",
    }
    left = {name: days_left(load_certificate(home / "pki" / name)) for name in remedies}
    return [
        f"{name} ends in {days:.0f} days; {remedies[name]}" for name, days in left.items() if days < WARN_DAYS
    ]


def host_names(text: str) -> list[str]:
    """Read host names and addresses with commas between.

    Raises:
        BadInput: One is neither.
    """
    hosts = [part.strip() for part in text.split(",")]
    for host in hosts:
        try:
            ipaddress.ip_address(host)
        except ValueError:
            labels = host.split(".")
            if (
                not re.fullmatch(HOST, host)
                or not all(
                    re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?", label) for label in labels
                )
                or labels[-1].isdigit()
            ):
                raise BadInput(
                    f"--host {host!r}: name a host or an IP address, without a port; others after commas"
                ) from None
    return hosts
