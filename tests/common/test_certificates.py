"""Keys and certificates: what each can do over real TLS, and that Flower reads our node keys."""

import argparse
import base64
import hashlib
import socket
import ssl
import threading
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.cli.supernode.register import try_load_public_key
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER
from flwr.supernode.cli.flower_supernode import _try_setup_client_authentication
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from polyclinic.common import certificates as c
from polyclinic.common import node_keys as n
from polyclinic.common.refusals import BadInput

EKU = x509.ExtendedKeyUsage
AUTH = x509.oid.ExtendedKeyUsageOID


@dataclass
class Pki:
    """A CA with one certificate of each kind, as objects and as files."""

    folder: Path
    ca_key: c.PrivateKey
    ca: x509.Certificate
    tls: c.PrivateKey
    node: c.PrivateKey

    def chain(self, name: str, certificate: x509.Certificate, key: c.PrivateKey) -> tuple[Path, Path]:
        crt, pem = self.folder / f"{name}.crt", self.folder / f"{name}.key"
        crt.write_bytes(c.certificate_pem(certificate))
        pem.write_bytes(c.key_pem(key))
        return crt, pem

    def site(self, name: str = "a") -> x509.Certificate:
        return c.sign_client(self.ca, self.ca_key, self.tls.public_key(), name, self.node.public_key())

    def server(self, *names: str) -> x509.Certificate:
        return c.sign_server(self.ca, self.ca_key, self.tls.public_key(), names)


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    key = c.new_key()
    return Pki(tmp_path, key, c.make_ca(key, "Polyclinic CA"), c.new_key(), c.new_key())


def shake(server: ssl.SSLContext, client: ssl.SSLContext, host: str) -> bool:
    """Do these two complete a handshake, and does a byte get across, over a real socket?"""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        done = []

        def serve() -> None:
            raw, _ = listener.accept()
            try:
                with server.wrap_socket(raw, server_side=True) as link:
                    link.sendall(link.recv(1))
                    done.append(True)
            except OSError:
                raw.close()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            with (
                socket.create_connection(listener.getsockname(), timeout=5) as raw,
                client.wrap_socket(raw, server_hostname=host) as link,
            ):
                link.sendall(b"x")
                return link.recv(1) == b"x"
        except OSError:
            return False
        finally:
            thread.join(5)


def contexts(
    pki: Pki, server: tuple[Path, Path], client: tuple[Path, Path]
) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A server that wants a certificate, and a client that shows one; both strict (RFC 5280)."""
    ca = pki.folder / "ca.crt"
    ca.write_bytes(c.certificate_pem(pki.ca))
    ours = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=ca)
    ours.verify_mode = ssl.CERT_REQUIRED
    theirs = ssl.create_default_context(cafile=ca)
    for context, chain in ((ours, server), (theirs, client)):
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        context.load_cert_chain(*chain)
    return ours, theirs


def test_a_certificate_can_do_one_thing_only(pki: Pki) -> None:
    gateway = pki.chain("gateway", pki.server("gw.example.org", "127.0.0.1", "::1"), pki.tls)
    site = pki.chain("site", pki.site(), pki.tls)
    for host in ("gw.example.org", "127.0.0.1", "::1"):
        assert shake(*contexts(pki, gateway, site), host)
    assert not shake(*contexts(pki, gateway, site), "other.example.org")
    # A hospital's certificate serves nobody, and the gateway's asks nobody.
    assert not shake(*contexts(pki, site, site), "a")
    assert not shake(*contexts(pki, gateway, gateway), "127.0.0.1")


def test_another_federation_is_refused_in_both_directions(pki: Pki) -> None:
    other_key = c.new_key()
    other = Pki(pki.folder, other_key, c.make_ca(other_key, "Polyclinic CA"), pki.tls, pki.node)
    gateway = pki.chain("gateway", pki.server("127.0.0.1"), pki.tls)
    assert not shake(*contexts(pki, gateway, pki.chain("forged", other.site(), pki.tls)), "127.0.0.1")
    posing = pki.chain("posing", other.server("127.0.0.1"), pki.tls)
    assert not shake(*contexts(pki, posing, pki.chain("site", pki.site(), pki.tls)), "127.0.0.1")


def test_a_site_cannot_sign_for_another(pki: Pki) -> None:
    """The CA has no CA below it: what a site signs is refused by path length and key usage."""
    mine = c.sign_client(pki.site("evil"), pki.tls, pki.tls.public_key(), "victim", pki.node.public_key())
    fault = c.client_fault(mine, pki.ca, "victim", pki.tls.public_key(), pki.node.public_key())
    assert fault is not None


def test_the_local_certificate_is_its_own_root(pki: Pki) -> None:
    chain = pki.chain("local", c.sign_local(pki.tls), pki.tls)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(*chain)
    for host in ("localhost", "127.0.0.1"):
        assert shake(server, ssl.create_default_context(cafile=chain[0]), host)
    assert not shake(server, ssl.create_default_context(cafile=chain[0]), "gw.example.org")


def test_what_stands_in_the_certificates(pki: Pki) -> None:
    constraints = pki.ca.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical
    assert constraints.value == x509.BasicConstraints(ca=True, path_length=0)
    site, gateway = pki.site(), pki.server("gw.example.org")
    assert list(site.extensions.get_extension_for_class(EKU).value) == [AUTH.CLIENT_AUTH]
    assert list(gateway.extensions.get_extension_for_class(EKU).value) == [AUTH.SERVER_AUTH]
    uris = site.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    spki = pki.node.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    assert [uri.value for uri in uris] == [f"urn:polyclinic:node:{hashlib.sha256(spki).hexdigest()}"]
    assert 364.9 < c.days_left(site) <= 365
    assert c.days_left(site, datetime.now(UTC) + timedelta(days=366)) < 0
    assert len({pki.site().serial_number for _ in range(3)}) == 3
    assert all(isinstance(c.certificate_key(x).curve, ec.SECP384R1) for x in (pki.ca, site, gateway))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({}, None),
        ({"site": "b"}, "a's, not b's"),
        ({"key": c.new_key().public_key()}, "another key"),
        ({"node": c.new_key().public_key()}, "another node key"),
        ({"now": datetime.now(UTC) + timedelta(days=366)}, "out of date"),
        ({"now": datetime.now(UTC) - timedelta(days=1)}, "out of date"),
        ({"ca": c.make_ca(c.new_key(), "Polyclinic CA")}, "not signed by this federation"),
    ],
)
def test_a_certificate_for_something_else_is_named(
    pki: Pki, change: dict[str, object], word: str | None
) -> None:
    asked = {"ca": pki.ca, "site": "a", "key": pki.tls.public_key(), "node": pki.node.public_key(), **change}
    fault = c.client_fault(pki.site(), **asked)  # type: ignore[arg-type]
    assert (fault is None) if word is None else (fault is not None and word in fault)


def test_a_server_certificate_is_no_site_certificate(pki: Pki) -> None:
    fault = c.client_fault(pki.server("a"), pki.ca, "a", pki.tls.public_key(), pki.node.public_key())
    assert fault is not None


def test_fingerprints_are_sha256_in_groups_of_four(pki: Pki) -> None:
    der = hashlib.sha256(pki.ca.public_bytes(Encoding.DER)).hexdigest().upper()
    assert c.fingerprint(pki.ca).replace(" ", "") == der
    assert [len(group) for group in c.fingerprint(pki.ca).split(" ")] == [4] * 16
    spki = pki.node.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    assert c.fingerprint(pki.node.public_key()) == c.grouped(hashlib.sha256(spki).hexdigest())


def test_flower_reads_our_node_keys_and_sends_the_header_we_expect(tmp_path: Path) -> None:
    """Contract with flwr: `flower-supernode`, `flwr supernode register` and the Fleet header."""
    key = c.new_key()
    private, public = tmp_path / "node.key", tmp_path / "node.pub"
    private.write_bytes(n.node_key_private(key))
    public.write_text(f"{n.node_key_text(key.public_key())} clinic-a\n")
    read = _try_setup_client_authentication(
        argparse.Namespace(auth_supernode_private_key=str(private), auth_supernode_public_key=None)
    )
    assert read is not None
    request = httpx.Request("POST", "https://localhost/v1/fleet/x")
    NodeAuthHttpInterceptor(*read).intercept(
        SimpleNamespace(request=request),  # type: ignore[arg-type]
        lambda *_: httpx.Response(200),
    )
    header = n.node_key_header(key.public_key())
    assert request.headers[FLEET_HTTP_PUBLIC_KEY_HEADER] == header
    assert base64.b64decode(header) == try_load_public_key(public)
    assert n.node_key_header(c.load_key(private).public_key()) == header


def test_a_node_key_signs_and_nothing_else_fits(pki: Pki) -> None:
    signature = n.node_signature(pki.node, b"request")
    assert n.node_signed(pki.node.public_key(), b"request", signature)
    assert not n.node_signed(pki.node.public_key(), b"changed", signature)
    assert not n.node_signed(pki.tls.public_key(), b"request", signature)
    assert not n.node_signed(pki.node.public_key(), b"request", "no base64!")


def test_a_request_must_be_the_sites_own_and_p384(pki: Pki) -> None:
    pem = c.make_request(pki.tls, "a")
    assert c.key_sha256(c.parse_request(pem, "a", "r")) == c.key_sha256(pki.tls.public_key())
    with pytest.raises(BadInput, match=r"not b's own"):
        c.parse_request(pem, "b", "r")
    with pytest.raises(BadInput, match="not a certificate request"):
        c.parse_request(b"hello", "a", "r")
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "a")])
    weak = x509.CertificateSigningRequestBuilder().subject_name(name)
    pem = weak.sign(ec.generate_private_key(ec.SECP256R1()), hashes.SHA256()).public_bytes(Encoding.PEM)
    with pytest.raises(BadInput, match="P-384"):
        c.parse_request(pem, "a", "r")


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"]
)
def test_broken_files_are_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    for load in (c.load_key, c.load_certificate):
        with pytest.raises(BadInput, match=str(path)):
            load(path)
        with pytest.raises(BadInput, match="no such file"):
            load(tmp_path / "gone")
    with pytest.raises(BadInput, match="not a node key"):
        n.parse_node_key(content.decode(), "r")
