"""How a site joins: keys made here, a request that leaves, a certificate that comes back.

Keys wait in `keys/next` until their certificate is there. Then they move to `keys` one by one, the
certificate last; a move that was killed goes on at the next command. So a node that is enrolled keeps
working on its old keys while a re-issued kit is on its way.
"""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

from polyclinic.client.kit_intake import read_opened, take_in
from polyclinic.client.ledger_books import create_ledger
from polyclinic.client.ledger_register import register
from polyclinic.client.policy import Policy
from polyclinic.common.certificates import (
    WARN_DAYS,
    PrivateKey,
    certificate_key,
    certificate_pem,
    certificate_sha256,
    client_fault,
    days_left,
    fingerprint,
    grouped,
    key_pem,
    load_certificate,
    load_key,
    make_request,
    new_key,
    parse_certificate,
    sign_local,
)
from polyclinic.common.files import sync_folder, write_atomic, write_json_atomic
from polyclinic.common.kit import (
    CA,
    KIT,
    Answer,
    Kit,
    Request,
    open_kit,
    read_exchanged,
)
from polyclinic.common.node_keys import node_key_private, node_key_text, node_signature
from polyclinic.common.refusals import BadInput, Refusal

# In the order in which they move from `keys/next` to `keys`.
_KEYS = ("node.key", "node.pub", "tls.key", "tls.crt")


def init(home: Path, path: Path, out: Path | None = None) -> dict[str, Any]:
    """Take a kit in: make the site's keys and its request, or, at an enrolled site, add a study.

    A killed run can simply be run again: with the same kit it writes the same request.

    Args:
        home: The site's home; made where it is missing.
        path: The kit, a folder or a zip.
        out: File for the request; default: `request-<site>.json` in the home.

    Returns:
        Facts: site, study, host, port, fingerprints, path of the request (None where none is needed).

    Raises:
        BadInput: It is no kit, or is another site's or federation's than the one this home belongs to.
        Refusal: `kit-expired`; `ledger-missing` where this site approved studies but lost its ledger.
    """
    with open_kit(path) as files:
        opened = read_opened(files)
        kit = opened.kit
        _finish_move(home)
        known = _known_kit(home)
        _check_kit(home, path, kit, known)
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        home.chmod(0o700)  # it may have been there
        (home / "keys").mkdir(exist_ok=True, mode=0o700)
        _check_ledger(home, kit.site)
        take_in(home, files, opened)
    _ensure_local(home / "keys")
    _ensure_policy(home)
    request = None if kit.secret is None else _ensure_request(home, kit)
    if request is not None:
        # The kit's own file comes last: a home with a secret in it has keys and request.
        target = out or home / f"request-{kit.site}.json"
        write_json_atomic(target, request.model_dump(mode="json"))
    kit = kit.model_copy(update={"used": known.used if known else None})
    write_json_atomic(home / "kit" / KIT, kit.model_dump(mode="json"), mode=0o600)
    facts: dict[str, Any] = {
        "site": kit.site,
        "study": kit.study,
        "study_hash": grouped(opened.resolved.hash),
        "host": kit.host,
        "port": kit.port,
        "ca": fingerprint(opened.ca),
        "request": None,
        "release": opened.resolved.code_version,
    }
    if request is not None:
        waiting = home / "keys" / "next"
        facts |= {
            "request": str(target),
            "node_key": fingerprint(load_key(waiting / "node.key").public_key()),
            "tls_key": fingerprint(load_key(waiting / "tls.key").public_key()),
        }
    return facts


def install_certificate(home: Path, path: Path) -> dict[str, Any]:
    """Check the coordinator's answer and put the new keys to use.

    Args:
        home: The site's home.
        path: `certificate-<site>.json`.

    Returns:
        Facts: site, days left, fingerprints, whether the node must be started again.

    Raises:
        BadInput: The home took no kit in, or the file is not an answer, or another site's.
        Refusal: `certificate-refused`: another federation's, another key's, or out of date.
    """
    kit = read_kit(home)
    _finish_move(home)
    answer = read_exchanged(path, Answer)
    if answer.site != kit.site:
        raise BadInput(f"{path}: it is for site {answer.site}, this home is {kit.site}'s; take its own")
    certificate = parse_certificate(answer.certificate.encode(), str(path))
    ca = load_certificate(home / "kit" / CA)
    keys, waiting = home / "keys", home / "keys" / "next"
    if answer.ca_sha256 != kit.ca_sha256:
        raise Refusal("certificate-refused", f"{path}: another federation's")
    current = load_certificate(keys / "tls.crt") if (keys / "tls.crt").exists() else None
    again = current is not None and certificate_sha256(current) == certificate_sha256(certificate)
    if not again:
        if not (waiting / "tls.key").exists():
            raise Refusal("certificate-refused", f"{path}: no request of this home waits for an answer")
        tls, node = load_key(waiting / "tls.key"), load_key(waiting / "node.key")
        fault = client_fault(certificate, ca, kit.site, tls.public_key(), node.public_key())
        if fault:
            raise Refusal("certificate-refused", f"{path}: {fault}")
        write_atomic(waiting / "tls.crt", certificate_pem(certificate))
        _finish_move(home)
    if not (waiting / "request.json").exists():
        (home / f"request-{kit.site}.json").unlink(missing_ok=True)
    return {
        "site": kit.site,
        "certificate": fingerprint(certificate),
        "node_key": fingerprint(load_key(keys / "node.key").public_key()),
        "tls_key": fingerprint(certificate_key(certificate)),
        "ca": fingerprint(ca),
        "days_left": round(days_left(certificate), 1),
        "restart": current is not None and not again,
    }


def enrolment_facts(home: Path) -> dict[str, Any]:
    """Where a site stands, for `status`.

    Returns:
        site, study, host, port, state ("waiting for its certificate" or "enrolled"), and, once it is
        enrolled, days_left and fingerprints.

    Raises:
        BadInput: The home took no kit in.
    """
    kit = read_kit(home)
    facts: dict[str, Any] = {"site": kit.site, "study": kit.study, "host": kit.host, "port": kit.port}
    path = home / "keys" / "tls.crt"
    if not path.exists():
        return facts | {"state": "waiting for its certificate"}
    certificate = load_certificate(path)
    return facts | {
        "state": "enrolled",
        "days_left": round(days_left(certificate), 1),
        "certificate": fingerprint(certificate),
        "node_key": fingerprint(load_key(home / "keys" / "node.key").public_key()),
        "ca": fingerprint(load_certificate(home / "kit" / CA)),
    }


def expiry_warning(home: Path) -> str | None:
    """A sentence where the site's certificate ends soon or has ended; None otherwise.

    A move of new keys that was killed is finished first.
    """
    _finish_move(home)
    path = home / "keys" / "tls.crt"
    if not path.exists():
        return None
    left = days_left(load_certificate(path))
    if left >= WARN_DAYS:
        return None
    when = f"ends in {left:.0f} days" if left > 0 else "has ended: the gateway lets this site in no more"
    return (
        f"{path}: the certificate {when}; ask the coordinator for a new kit "
        "(`polyclinic-server reissue`) and run `polyclinic-client init` with it"
    )


def read_kit(home: Path) -> Kit:
    """Read what the home knows of its federation.

    Raises:
        BadInput: It took no kit in.
    """
    kit = _known_kit(home)
    if kit is None:
        raise BadInput(f"{home / 'kit' / KIT}: no such file; run `polyclinic-client init KIT` first")
    return kit


# -- a kit ----------------------------------------------------------------------------------------


def _known_kit(home: Path) -> Kit | None:
    path = home / "kit" / KIT
    return read_exchanged(path, Kit) if path.exists() else None


def _check_kit(home: Path, path: Path, kit: Kit, known: Kit | None) -> None:
    """May this home take this kit?"""
    if known and known.ca_sha256 != kit.ca_sha256:
        raise BadInput(
            f"{path}: not a kit of the federation that {home} belongs to (its CA is another); ask by "
            f"telephone why. If it is meant, move {home / 'kit'} and {home / 'keys'} aside and run again: "
            "keep this home and its ledger, since in a second home every patient would be counted anew"
        )
    if known and known.site != kit.site:
        raise BadInput(f"{path}: a kit for site {kit.site}, but {home} is {known.site}'s; take its own")
    if kit.secret is None and not (home / "keys" / "tls.crt").exists():
        raise BadInput(
            f"{path}: the kit has no secret, and {home} is not enrolled; ask for one that "
            "`polyclinic-server reissue` wrote"
        )
    if known and kit.secret and known.used == sha256(bytes.fromhex(kit.secret)).hexdigest():
        raise BadInput(
            f"{path}: {home} has the keys and certificate from this kit already; for new ones ask for a kit "
            "that `polyclinic-server reissue` wrote"
        )
    if kit.expired():
        raise Refusal("kit-expired", f"{path}: on {kit.expires:%Y-%m-%d}")
    if known is None and (home / "keys" / "tls.crt").exists():
        raise BadInput(f"{home}: has keys but no kit/{KIT}; restore it from a backup")


def _check_ledger(home: Path, site: str) -> None:
    """Make the site's ledger, or see that the one here is the site's own."""
    path = home / "ledger.jsonl"
    first = path.read_bytes().partition(b"\n") if path.exists() else (b"", b"", b"")
    if not first[1]:
        register(home)
        create_ledger(home, site, simulated=False)
        return
    line = json.loads(first[0])
    if line.get("site") != site or line.get("simulated"):
        whose = f"{'simulated ' if line.get('simulated') else ''}site {line.get('site')}"
        raise BadInput(f"{path}: the ledger of {whose}, not of {site}; name this site's own --home")


# -- keys -----------------------------------------------------------------------------------------


def _ensure_key(path: Path, *, node: bool = False) -> PrivateKey:
    if not path.exists():
        key = new_key()
        write_atomic(path, node_key_private(key) if node else key_pem(key), mode=0o600)
    return load_key(path)


def _ensure_local(keys: Path) -> None:
    """Make the key and certificate of the sidecar on loopback."""
    key = _ensure_key(keys / "local.key")
    path = keys / "local.crt"
    if not path.exists() or days_left(load_certificate(path)) < WARN_DAYS:
        write_atomic(path, certificate_pem(sign_local(key)))


def _ensure_request(home: Path, kit: Kit) -> Request:
    """Make keys and the request for a kit, or find those made from it before."""
    waiting = home / "keys" / "next"
    waiting.mkdir(exist_ok=True, mode=0o700)
    path = waiting / "request.json"
    assert kit.secret is not None
    if path.exists():
        made = read_exchanged(path, Request)
        if made.proven_by(kit.secret) and (made.host, made.port) == (kit.host, kit.port):
            return made
        # A newer kit than the one that these keys were made from: they were never enrolled, or no
        # certificate came for them. New ones, so that no key is ever offered twice.
        for name in ("request.json", *_KEYS):
            (waiting / name).unlink(missing_ok=True)
    node, tls = _ensure_key(waiting / "node.key", node=True), _ensure_key(waiting / "tls.key")
    text = node_key_text(node.public_key())
    write_atomic(waiting / "node.pub", f"{text} {kit.site}\n".encode())
    request = Request(
        site=kit.site,
        host=kit.host,
        port=kit.port,
        ca_sha256=kit.ca_sha256,
        node_key=text,
        certificate_request=make_request(tls, kit.site).decode("ascii"),
    )
    request = request.model_copy(update={"node_signature": node_signature(node, request.signed_bytes())})
    request = request.model_copy(update={"proof": request.proof_with(kit.secret)})
    write_json_atomic(path, request.model_dump(mode="json"), mode=0o600)
    return request


def _finish_move(home: Path) -> None:
    """Put new keys in the place of the old, once their certificate is there; goes on where it was killed."""
    keys, waiting = home / "keys", home / "keys" / "next"
    if not (waiting / "tls.crt").exists():
        return
    for name in _KEYS[:-1]:
        if (waiting / name).exists():
            (waiting / name).replace(keys / name)
    sync_folder(keys)
    # The secret is burned: it opens nothing any more, and need not lie about.
    kit = read_kit(home)
    if kit.secret:
        used = sha256(bytes.fromhex(kit.secret)).hexdigest()
        kit = kit.model_copy(update={"secret": None, "expires": None, "used": used})
    write_json_atomic(home / "kit" / KIT, kit.model_dump(mode="json"), mode=0o600)
    (waiting / "request.json").unlink(missing_ok=True)
    (waiting / "tls.crt").replace(keys / "tls.crt")
    sync_folder(keys)


# -- policy ---------------------------------------------------------------------------------------


def _ensure_policy(home: Path) -> None:
    """Write a policy in which only the site's size is left to type; one that is there is never touched."""
    path = home / "policy.toml"
    if path.exists():
        return
    lines = [
        "# What this site allows. The coordinator never sees or sets this file.",
        "# A line that begins with # shows a default; take the # away to set another value.",
        "",
        "# How many patients this site has, as a round number that may be public, typed by a person and",
        "# never counted from the data. Nothing is approved before this line is filled in.",
        "# declared_patients = ",
        "",
    ]
    for name, field in Policy.model_fields.items():
        if name != "declared_patients":
            about = f"# {field.description}\n" if field.description else ""
            value = "" if field.default is None else json.dumps(field.default)
            lines.append(f"{about}# {name} = {value}")
    write_atomic(path, ("\n".join(lines) + "\n").encode(), mode=0o600)
