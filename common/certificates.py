"""Keys and certificates of a federation: NIST P-384, X.509 v3 (RFC 5280), one CA with no CA below it.

A server certificate can only serve and a site's certificate can only ask (extended key usage), so
no site can pose as the gateway. A site's certificate names the site and, by hash, the one node key it
goes with.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_ssh_private_key,
)
from cryptography.x509 import verification
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from polyclinic.common.refusals import BadInput

CA_DAYS = 3650
SERVER_DAYS = 825
CLIENT_DAYS = 365
WARN_DAYS = 30
NODE_URN = "urn:polyclinic:node:"
# A certificate made now must be good at once on a machine whose clock is a little behind.
_BACKDATED = timedelta(hours=1)
_SERVER, _CLIENT = ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH

PrivateKey = ec.EllipticCurvePrivateKey
PublicKey = ec.EllipticCurvePublicKey


def new_key() -> PrivateKey:
    """Make a P-384 key from the operating system's randomness."""
    return ec.generate_private_key(ec.SECP384R1())


def key_pem(key: PrivateKey) -> bytes:
    """Encode a private key as PKCS #8 PEM, not encrypted: file mode 0600 protects it."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def load_key(path: Path) -> PrivateKey:
    """Read a private key, PKCS #8 or OpenSSH.

    Raises:
        BadInput: The file is missing or holds no elliptic-curve key.
    """
    data = _read(path)
    try:
        ssh = data.startswith(b"-----BEGIN OPENSSH")
        key = load_ssh_private_key(data, None) if ssh else load_pem_private_key(data, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise BadInput(f"{path}: not a private key ({error}); restore it from a backup") from error
    if not isinstance(key, PrivateKey):
        raise BadInput(f"{path}: not an elliptic-curve key; restore it from a backup")
    return key


def load_certificate(path: Path) -> x509.Certificate:
    """Read a PEM certificate.

    Raises:
        BadInput: The file is missing or holds none.
    """
    return parse_certificate(_read(path), str(path))


def parse_certificate(pem: bytes, name: str) -> x509.Certificate:
    """Decode a PEM certificate; `name` says in an error where it came from.

    Raises:
        BadInput: It is none, or its key is not an elliptic-curve one.
    """
    try:
        certificate = x509.load_pem_x509_certificate(pem)
        if not isinstance(certificate.public_key(), PublicKey):
            raise ValueError("not an elliptic-curve key")
    except (ValueError, UnsupportedAlgorithm) as error:
        raise BadInput(f"{name}: not a certificate ({error}); take the file as it was written") from error
    return certificate


def certificate_pem(certificate: x509.Certificate) -> bytes:
    """Encode a certificate as PEM."""
    return certificate.public_bytes(Encoding.PEM)


def certificate_key(certificate: x509.Certificate) -> PublicKey:
    """The public key a certificate is for; `parse_certificate` made sure of its kind."""
    key = certificate.public_key()
    assert isinstance(key, PublicKey)
    return key


# -- names of keys and certificates ---------------------------------------------------------------


def certificate_sha256(certificate: x509.Certificate) -> str:
    """SHA-256 of the DER, 64 lower-case hexadecimal digits: what machines compare."""
    return hashlib.sha256(certificate.public_bytes(Encoding.DER)).hexdigest()


def key_sha256(key: PublicKey) -> str:
    """SHA-256 of the SubjectPublicKeyInfo (DER), 64 lower-case hexadecimal digits."""
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def fingerprint(thing: x509.Certificate | PublicKey) -> str:
    """What two people read to each other: `certificate_sha256` or `key_sha256` in groups of four."""
    digits = certificate_sha256(thing) if isinstance(thing, x509.Certificate) else key_sha256(thing)
    return grouped(digits)


def grouped(digits: str) -> str:
    """Upper-case hexadecimal digits in groups of four."""
    return " ".join(digits[i : i + 4] for i in range(0, len(digits), 4)).upper()


def days_left(certificate: x509.Certificate, now: datetime | None = None) -> float:
    """Days until a certificate ends; negative once it has."""
    return (certificate.not_valid_after_utc - (now or datetime.now(UTC))).total_seconds() / 86400


# -- signing --------------------------------------------------------------------------------------


def make_ca(key: PrivateKey, name: str) -> x509.Certificate:
    """Make a federation's CA certificate, good for ten years, with no CA below it.

    Args:
        key: The CA's key.
        name: Its common name, at most 64 characters.
    """
    builder = _builder(name, name, key.public_key(), CA_DAYS)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(sign_certificates=True), critical=True)
    return builder.sign(key, hashes.SHA384())


def sign_server(
    ca: x509.Certificate, ca_key: PrivateKey, key: PublicKey, names: Iterable[str], days: int = SERVER_DAYS
) -> x509.Certificate:
    """Sign a server's certificate.

    Args:
        ca: The CA's certificate.
        ca_key: The CA's key.
        key: The server's public key.
        names: Host names and IP addresses it answers for; the first is its common name.
        days: How long it is good.
    """
    hosts = list(names)
    return _leaf((hosts[0][:64], _common_name(ca.subject)), key, ca_key, _host_names(hosts), _SERVER, days)


def make_request(key: PrivateKey, site: str) -> bytes:
    """Make a certificate request (PKCS #10, PEM) for a site."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, site)])
    return (
        x509.CertificateSigningRequestBuilder()
        .subject_name(name)
        .sign(key, hashes.SHA384())
        .public_bytes(Encoding.PEM)
    )


def parse_request(pem: bytes, site: str, name: str) -> PublicKey:
    """Check a certificate request and take the public key out of it; nothing else of it is used.

    Args:
        pem: The request.
        site: Who must be its subject.
        name: Where it came from, for an error.

    Raises:
        BadInput: It is no request, is not signed by its own key, or is another site's.
    """
    try:
        request = x509.load_pem_x509_csr(pem)
        key = request.public_key()
    except (ValueError, UnsupportedAlgorithm) as error:
        raise BadInput(f"{name}: not a certificate request ({error}); take the file as it is") from error
    if not isinstance(key, PublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise BadInput(f"{name}: its key is not a NIST P-384 key; run `polyclinic-client init` again")
    if not request.is_signature_valid or _common_name(request.subject) != site:
        raise BadInput(
            f"{name}: its certificate request is not {site}'s own; run `polyclinic-client init` again"
        )
    return key


def sign_client(
    ca: x509.Certificate,
    ca_key: PrivateKey,
    key: PublicKey,
    site: str,
    node: PublicKey,
    days: int = CLIENT_DAYS,
) -> x509.Certificate:
    """Sign a site's certificate, bound to its node key.

    Args:
        ca: The CA's certificate.
        ca_key: The CA's key.
        key: The site's TLS key, from its request.
        site: Becomes the common name.
        node: The node key it goes with; its hash becomes a URI in the subject alternative name.
        days: How long it is good.
    """
    binding = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(NODE_URN + key_sha256(node))])
    return _leaf((site, _common_name(ca.subject)), key, ca_key, binding, _CLIENT, days)


def sign_local(key: PrivateKey) -> x509.Certificate:
    """Make a site's own certificate for TLS on loopback; nobody else ever trusts it."""
    name = "polyclinic-local"
    return _leaf(
        (name, name), key.public_key(), key, _host_names(["localhost", "127.0.0.1"]), _SERVER, CA_DAYS
    )


def client_fault(
    certificate: x509.Certificate,
    ca: x509.Certificate,
    site: str,
    key: PublicKey,
    node: PublicKey,
    now: datetime | None = None,
) -> str | None:
    """Say what is wrong with a site's certificate, or None.

    Args:
        certificate: Of the site.
        ca: Must have signed it.
        site: Must be its common name.
        key: Must be its key.
        node: Must be the node key it is bound to.
        now: When it must be good; default: at this moment.
    """
    builder = verification.PolicyBuilder().store(verification.Store([ca]))
    if now is not None:
        builder = builder.time(now)
    try:
        builder.build_client_verifier().verify(certificate, [])
    except verification.VerificationError as error:
        moment = now or datetime.now(UTC)
        if certificate.not_valid_before_utc > moment or certificate.not_valid_after_utc < moment:
            return "it is out of date, or the clock here is wrong"
        return f"it was not signed by this federation's CA for a site ({error})"
    if _common_name(certificate.subject) != site:
        return f"it is {_common_name(certificate.subject)}'s, not {site}'s"
    if key_sha256(certificate_key(certificate)) != key_sha256(key):
        return "it was made for another key than the one here"
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    bound = names.get_values_for_type(x509.UniformResourceIdentifier)
    return None if bound == [NODE_URN + key_sha256(node)] else "it is bound to another node key"


def covers(certificate: x509.Certificate, names: Iterable[str]) -> bool:
    """Does a server certificate answer for all of these host names and addresses?"""
    has = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return set(_host_names(names)) <= set(has)


def server_names(certificate: x509.Certificate) -> list[str]:
    """Host names and addresses of a server certificate, in its own order."""
    return [
        str(name.value)
        for name in certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    ]


# -- parts of a certificate -----------------------------------------------------------------------


def _builder(subject: str, issuer: str, key: PublicKey, days: int) -> x509.CertificateBuilder:
    now = datetime.now(UTC).replace(microsecond=0)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _leaf(
    names: tuple[str, str],
    key: PublicKey,
    issuer: PrivateKey,
    answers_for: x509.SubjectAlternativeName,
    use: x509.ObjectIdentifier,
    days: int,
) -> x509.Certificate:
    """Sign a certificate that can do one thing only; `names` are subject and issuer."""
    authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.public_key())
    return (
        _builder(*names, key, days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(sign_certificates=False), critical=True)
        .add_extension(authority, critical=False)
        .add_extension(answers_for, critical=False)
        .add_extension(x509.ExtendedKeyUsage([use]), critical=False)
        .sign(issuer, hashes.SHA384())
    )


def _usage(*, sign_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign_certificates,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _host_names(names: Iterable[str]) -> x509.SubjectAlternativeName:
    def general(name: str) -> x509.GeneralName:
        try:
            return x509.IPAddress(ipaddress.ip_address(name))
        except ValueError:
            return x509.DNSName(name)

    return x509.SubjectAlternativeName([general(name) for name in names])


def _common_name(name: x509.Name) -> str:
    values = name.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(values[0].value) if len(values) == 1 else ""


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise BadInput(f"{path}: no such file; restore it from a backup") from error
