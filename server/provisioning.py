"""Who may reach the coordinator: CA and server certificates, kits, enrolment, revocation, re-issue.

The order of a change is: register, then what the gateway admits, then the file for the site. Each is
written whole, and every command that was killed can simply be run again.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from cryptography import x509

from polyclinic.common.certificates import (
    WARN_DAYS,
    certificate_pem,
    certificate_sha256,
    covers,
    days_left,
    fingerprint,
    grouped,
    key_sha256,
    load_certificate,
    load_key,
    parse_request,
    sign_client,
)
from polyclinic.common.files import write_json_atomic
from polyclinic.common.kit import SECRET_BYTES, SITE, Answer, Kit, Request, read_exchanged
from polyclinic.common.node_keys import node_signed, parse_node_key
from polyclinic.common.refusals import BadInput, Refusal
from polyclinic.common.study import Study, load_study
from polyclinic.server.authority import authority_warnings, ensure_pki, host_names
from polyclinic.server.kits import Contents, gather, read_run, resolve_study, write_kit
from polyclinic.server.register import (
    Enrolled,
    Invitation,
    Register,
    Site,
    locked,
    now,
    read_register,
    require_register,
    sites_of_run,
    sync_gateway,
    write_register,
)


def provision(
    home: Path,
    source: str | Path,
    sites: Sequence[str],
    *,
    host: str | None = None,
    port: int | None = None,
    reference: Path | None = None,
    expires_days: int = 30,
    contact: str | None = None,
) -> dict[str, Any]:
    """Write the federation's CA and server certificates and one kit a site.

    Run again, it adds what is missing: a CA, a key, an enrolled site or an unused secret is never
    written anew. A site that is enrolled gets a kit without a secret: it brings the study.

    Args:
        home: The coordinator's home.
        source: Study file, or name of a packaged study.
        sites: Names of the sites.
        host: Public name or address of the gateway, and further ones after commas; default: as before.
        port: Public port; default: as before, or 8443.
        reference: Folder of the public images; not needed for a study that was resolved here before.
        expires_days: How long a new kit's secret is good.
        contact: Whom a site's people call, for the instructions page; default: as before.

    Returns:
        Facts: run, study hash, CA fingerprint, kits by site, sites left as they are, warnings.

    Raises:
        BadInput: A name, host or port is wrong, or the study cannot be resolved.
    """
    _check_names(sites)
    _check_days(expires_days)
    names = host_names(host) if host else []
    if port is not None and not 1 <= port <= 65535:
        raise BadInput(f"--port {port}: name a TCP port from 1 to 65535")
    if not names and read_register(home) is None:
        raise BadInput("--host is missing: name the public host name or IP address that sites will call")
    study = load_study(source)
    weights = study.federation.weights
    if isinstance(weights, dict) and set(sites) - set(weights):
        raise BadInput(f"{source}: federation.weights has no weight for {sorted(set(sites) - set(weights))}")
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    home.chmod(0o700)  # it may have been there
    resolved, files = resolve_study(home, study, reference)
    with locked(home):
        register = read_register(home)
        ca = ensure_pki(home, register, names)
        if register is None:
            register = Register(host=names[0], port=8443, ca_sha256=certificate_sha256(ca), run="")
        register.host = names[0] if names else register.host
        register.port = port if port is not None else register.port
        register.contact = contact if contact is not None else register.contact
        register.run = resolved.run_name
        todo, left = _invite(register, sites, expires_days)
        contents = gather(ca, resolved, files, register.contact)
        write_register(home, register)
        for name in todo:
            _write_kit(home, register, name, contents)
    return {
        "run": resolved.run_name,
        "study_hash": resolved.hash,
        "ca": fingerprint(ca),
        "kits": {name: str(home / "kits" / f"{name}.zip") for name in todo},
        "left": left,
        "warnings": _few_sites(home, study, resolved.run_name),
    }


def enroll(home: Path, path: Path, out: Path | None = None) -> dict[str, Any]:
    """Check a site's request against its kit's one-time secret, sign, and register.

    The secret is burned in the same write that registers the site. Asked again with the same request,
    the same certificate is written again.

    Args:
        home: The coordinator's home.
        path: The request.
        out: File to write; default: `certificate-<site>.json` in the home.

    Returns:
        Facts: site, path of the answer, and the fingerprints to compare by telephone.

    Raises:
        BadInput: Not a request, of an unknown site, or made from a kit for another federation or host.
        Refusal: 1030 to 1033: not proven, secret used, kit expired, or a key that is known already.
    """
    request = read_exchanged(path, Request)
    with locked(home):
        register = require_register(home)
        site = register.site(request.site)
        ca = load_certificate(home / "pki" / "ca.crt")
        if request.ca_sha256 != register.ca_sha256:
            raise BadInput(f"{path}: made from another federation's kit; use the kit that was written here")
        gateway = load_certificate(home / "pki" / "gateway.crt")
        if not covers(gateway, [request.host]) or request.port != register.port:
            raise BadInput(
                f"{path}: made from a kit for {request.host}:{request.port}, this gateway is "
                f"{register.host}:{register.port}; send a kit from `polyclinic-server reissue {request.site}`"
            )
        known = site.enrolled
        if not (known and not site.revoked and known.request_sha256 == request.sha256):
            known = _admit(home, register, site, request, str(path), ca)
            write_register(home, register)
        sync_gateway(home, register)
    certificate = x509.load_pem_x509_certificate(known.certificate.encode())
    target = out or home / f"certificate-{request.site}.json"
    answer = Answer(site=request.site, ca_sha256=register.ca_sha256, certificate=known.certificate)
    write_json_atomic(target, answer.model_dump(mode="json"))
    return {
        "site": request.site,
        "path": str(target),
        "node_key": grouped(known.node_key_sha256),
        "tls_key": grouped(known.tls_key_sha256),
        "certificate": fingerprint(certificate),
        "ca": fingerprint(ca),
        "days_left": round(days_left(certificate), 1),
    }


def revoke(home: Path, name: str) -> None:
    """Put a site out: its keys are never admitted again, an unused secret is withdrawn.

    Raises:
        BadInput: There is no such site.
    """
    with locked(home):
        register = require_register(home)
        site = register.site(name)
        site.revoked = site.revoked or now()
        site.invitation.secret = None
        register.retire(site, f"{name} was revoked")
        write_register(home, register)


def reissue(home: Path, name: str, expires_days: int = 30) -> dict[str, Any]:
    """Write a site a new kit with a new one-time secret; an older unused secret is withdrawn.

    An enrolled site's certificate stays admitted until the new request is enrolled. A revoked site
    comes back by the same way, and not before.

    Returns:
        Facts: site and kit.

    Raises:
        BadInput: There is no such site, or its study is not here any more.
    """
    _check_days(expires_days)
    with locked(home):
        register = require_register(home)
        site = register.site(name)
        ca = load_certificate(home / "pki" / "ca.crt")
        resolved, files = read_run(home, register.run)
        site.invitation = _invitation(expires_days)
        if register.run not in site.runs:
            site.runs.append(register.run)
        contents = gather(ca, resolved, files, register.contact)
        write_register(home, register)
        _write_kit(home, register, name, contents)
    return {"site": name, "kit": str(home / "kits" / f"{name}.zip")}


def sites_facts(home: Path) -> dict[str, Any]:
    """List the sites, and warn of what ends soon; what the gateway admits is written again if it is lost.

    Returns:
        `sites`: site, state, secret ("open", "expired" or "used"), days_left, fingerprints, runs;
        `warnings`: sentences.
    """
    with locked(home):
        register = require_register(home)
        sync_gateway(home, register)
    rows, warnings = [], authority_warnings(home)
    for name, site in sorted(register.sites.items()):
        secret = "used"
        if site.invitation.secret:
            secret = "expired" if site.invitation.expires < now() else "open"
        row: dict[str, Any] = {"site": name, "state": site.state, "secret": secret, "runs": site.runs}
        if site.enrolled:
            certificate = x509.load_pem_x509_certificate(site.enrolled.certificate.encode())
            left = days_left(certificate)
            row |= {
                "days_left": round(left, 1),
                "certificate": fingerprint(certificate),
                "node_key": grouped(site.enrolled.node_key_sha256),
            }
            if site.state == "enrolled" and left < WARN_DAYS:
                warnings.append(
                    f"{name}: its certificate ends in {left:.0f} days; send it a new kit from "
                    f"`polyclinic-server reissue {name}`"
                )
        rows.append(row)
    return {"sites": rows, "warnings": warnings}


def enrolled(home: Path, run: str | None = None) -> dict[str, str]:
    """Site name to node key (OpenSSH text) of all admitted sites.

    Args:
        home: The coordinator's home.
        run: Only sites that were given a kit for this run.
    """
    wanted = set(sites_of_run(home, run)) if run else None
    return {
        name: site.enrolled.node_key
        for name, site in sorted(require_register(home).sites.items())
        if site.enrolled and not site.revoked and (wanted is None or name in wanted)
    }


def _few_sites(home: Path, study: Study, run: str) -> list[str]:
    """Say so where a run could not release anything yet."""
    count = len(sites_of_run(home, run))
    if count >= study.federation.min_sites:
        return []
    return [f"{count} sites have a kit; federation.min_sites = {study.federation.min_sites}: provision more"]


# -- sites ----------------------------------------------------------------------------------------


def _invite(register: Register, sites: Sequence[str], expires_days: int) -> tuple[list[str], dict[str, str]]:
    """Put sites into the register.

    Returns:
        Sites to write a kit for, and the others with the reason.
    """
    todo, left = [], {}
    for name in dict.fromkeys(sites):
        site = register.sites.setdefault(name, Site(invitation=_invitation(expires_days)))
        if site.state == "revoked":
            left[name] = f"revoked; `polyclinic-server reissue {name}` lets it in again"
        elif site.state == "invited" and site.invitation.expires < now():
            left[name] = f"its kit has expired; `polyclinic-server reissue {name}` writes a new one"
        else:
            todo.append(name)
            if register.run not in site.runs:
                site.runs.append(register.run)
    return todo, left


def _invitation(days: int) -> Invitation:
    secret = secrets.token_bytes(SECRET_BYTES)
    return Invitation(
        secret=secret.hex(),
        secret_sha256=hashlib.sha256(secret).hexdigest(),
        expires=now() + timedelta(days=days),
    )


def _write_kit(home: Path, register: Register, name: str, contents: Contents) -> None:
    invitation = register.sites[name].invitation
    secret = invitation.secret if invitation.expires > now() else None
    kit = Kit(
        site=name,
        study=contents.resolved.study.name,
        host=register.host,
        port=register.port,
        ca_sha256=register.ca_sha256,
        secret=secret,
        expires=invitation.expires if secret else None,
    )
    write_kit(home / "kits" / name, kit, contents)


def _admit(
    home: Path, register: Register, site: Site, request: Request, name: str, ca: x509.Certificate
) -> Enrolled:
    """Check a request and put the site's new keys into the register; nothing is written."""
    secret = site.invitation.secret
    if secret is None:
        raise Refusal("secret-used", request.site)
    if not request.proven_by(secret):
        raise Refusal("request-not-proven", f"{name}: the proof does not fit {request.site}'s kit")
    if site.invitation.expires < now():
        raise Refusal("kit-expired", f"{request.site}: on {site.invitation.expires:%Y-%m-%d}")
    node = parse_node_key(request.node_key, name)
    key = parse_request(request.certificate_request.encode(), request.site, name)
    if not node_signed(node, request.signed_bytes(), request.node_signature):
        raise Refusal("request-not-proven", f"{name}: the node key did not sign it")
    if {key_sha256(node), key_sha256(key)} & register.known_keys():
        raise Refusal("key-known", request.site)
    ca_key = load_key(home / "pki" / "ca.key")
    certificate = sign_client(ca, ca_key, key, request.site, node)
    register.retire(site, f"{request.site} was enrolled anew")
    site.enrolled = Enrolled(
        certificate=certificate_pem(certificate).decode("ascii"),
        certificate_sha256=certificate_sha256(certificate),
        serial=f"{certificate.serial_number:x}",
        tls_key_sha256=key_sha256(key),
        node_key=request.node_key,
        node_key_sha256=key_sha256(node),
        request_sha256=request.sha256,
        since=now(),
    )
    site.invitation.secret, site.revoked = None, None
    return site.enrolled


# -- what a person typed --------------------------------------------------------------------------


def _check_names(sites: Sequence[str]) -> None:
    if not sites:
        raise BadInput("--sites is empty: name at least one site, with commas between")
    for name in sites:
        if not re.fullmatch(SITE, name):
            raise BadInput(
                f"--sites {name!r}: a site's name has small letters, digits and hyphens, begins with a "
                "letter and is at most 40 long"
            )


def _check_days(days: int) -> None:
    if not 1 <= days <= 365:
        raise BadInput(f"--expires-days {days}: a kit is good for 1 to 365 days")
