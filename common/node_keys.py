"""The key of a site's SuperNode, in the spellings that Flower reads and sends; Flower is not imported."""

from __future__ import annotations

import base64

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_public_key,
)

from polyclinic.common.certificates import PrivateKey, PublicKey
from polyclinic.common.refusals import BadInput


def node_key_private(key: PrivateKey) -> bytes:
    """Encode a node's private key in OpenSSH's format, the only one that flower-supernode reads."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())


def node_key_text(key: PublicKey) -> str:
    """A node's public key as one line of OpenSSH text, which `flwr supernode register` reads."""
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode("ascii")


def parse_node_key(text: str, name: str) -> PublicKey:
    """Decode a node's public key.

    Raises:
        BadInput: It is not a P-384 key in OpenSSH's format.
    """
    try:
        key = load_ssh_public_key(text.encode("ascii"))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise BadInput(f"{name}: not a node key ({error}); take the file as it was written") from error
    if not isinstance(key, PublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise BadInput(f"{name}: the node key is not a NIST P-384 key; run `polyclinic-client init` again")
    return key


def node_key_header(key: PublicKey) -> str:
    """A node's public key as its SuperNode sends it with every request.

    That is the base64 of the PEM of the SubjectPublicKeyInfo (flwr 1.41,
    supernode/node_auth_http_interceptor.py); a contract test compares.
    """
    pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return base64.b64encode(pem).decode("ascii")


def node_signature(key: PrivateKey, message: bytes) -> str:
    """Sign with a node's key, to prove that it is held; base64."""
    return base64.b64encode(key.sign(message, ec.ECDSA(hashes.SHA256()))).decode("ascii")


def node_signed(key: PublicKey, message: bytes, signature: str) -> bool:
    """Was this message signed with the node's key?"""
    try:
        key.verify(base64.b64decode(signature, validate=True), message, ec.ECDSA(hashes.SHA256()))
    except (InvalidSignature, ValueError):
        return False
    return True
