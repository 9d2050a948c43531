"""Who a peer is: an Ed25519 key of its own, whose digest is its name in a run.

A peer signs what it publishes, and everybody can check that, for the public key is in each message.
There is no register of names: whoever has the private key is the peer.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from trainwright.errors import Mistake, UserError

KEY_BYTES, SIGNATURE_BYTES = 32, 64
_PEER = re.compile(r"[0-9a-f]{20}")


class Identity:
    """A peer's private key: signs, and tells the peer's id."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public = key.public_key().public_bytes_raw()  # 32 bytes
        self.peer = peer_of(self.public)

    @classmethod
    def new(cls) -> Identity:
        """One that nobody ever had."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def from_seed(cls, seed: bytes) -> Identity:
        """The identity of 32 secret bytes (RFC 8032): the same ones, the same peer."""
        return cls(Ed25519PrivateKey.from_private_bytes(seed))

    @classmethod
    def kept_at(cls, path: Path) -> Identity:
        """The identity in a file (PEM, readable by its owner only), made there the first time.

        Raises UserError for a file with something else in it.
        """
        if not path.exists():
            _create(path, cls.new())
        try:
            key = load_pem_private_key(path.read_bytes(), password=None)
        except (ValueError, TypeError):
            key = None
        if not isinstance(key, Ed25519PrivateKey):
            raise UserError(
                Mistake(
                    "there is no Ed25519 key in this file",
                    "bring the file back from a copy, or delete it: this machine is then a new "
                    "peer, and the scores of the old one are lost to it",
                    where=str(path),
                )
            )
        return cls(key)

    def sign(self, data: bytes) -> bytes:
        """The signature of these bytes, 64 bytes; the same every time."""
        return self._key.sign(data)


def peer_of(public: bytes) -> str:
    """A peer's id: the first 20 hex digits of the SHA-256 of its public key."""
    return hashlib.sha256(public).hexdigest()[:20]


def is_peer(text: object) -> bool:
    """Whether that can be a peer's id: only then may it be part of a path."""
    return isinstance(text, str) and _PEER.fullmatch(text) is not None


def signed_by(public: bytes, signature: bytes, data: bytes) -> bool:
    """Whether the owner of that public key signed exactly these bytes."""
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, data)
    except (InvalidSignature, ValueError):
        return False
    return True


def _create(path: Path, identity: Identity) -> None:
    """Write the key where none is yet: of two processes that try, both then read the first's."""
    pem = identity._key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{identity.peer}.tmp")
    try:
        beside.touch(mode=0o600, exist_ok=False)
        with beside.open("wb") as file:
            file.write(pem)
            file.flush()
            os.fsync(file.fileno())
        path.hardlink_to(beside)
    except FileExistsError:
        pass
    finally:
        beside.unlink(missing_ok=True)
