"""What goes over a ring's connections: frames of a JSON header and bytes, with limits and timeouts.

    4 bytes length of the header, 4 bytes length of the body, header, body

A connection begins with a greeting in which both prove that they have the run's secret without
saying it; then the one that dialled asks, and the other answers, any number of times.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Lock
from typing import Any, NamedTuple

from trainwright.swarm.transports.keys import is_peer
from trainwright.swarm.transports.transport import TransportError

MOST_HEADER = 1 << 22  # bytes
PATIENCE = 5.0  # seconds without a byte after which the other side is taken for gone
PIECE = 1 << 16  # bytes that are read or written at a time
_LENGTHS = struct.Struct(">II")
_VERSION = 1
_GREETING = 4096  # bytes of a header from somebody who has proved nothing yet

Header = dict[str, Any]


class BadFrameError(TransportError):
    """The other side does not keep to the protocol: the connection is of no more use."""


class HungUpError(TransportError):
    """The other side closed the connection, as it does with one that was idle for long."""


class Moved:
    """Bytes sent and received by all connections of a peer."""

    def __init__(self) -> None:
        self._lock = Lock()
        self.sent = self.received = 0

    def add(self, sent: int = 0, received: int = 0) -> None:
        """Count some more."""
        with self._lock:
            self.sent += sent
            self.received += received


class Address(NamedTuple):
    """Where a peer listens."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


class Link:
    """One connection. All that goes wrong with it is a TransportError."""

    def __init__(self, sock: socket.socket, moved: Moved) -> None:
        self._socket, self._moved = sock, moved
        sock.settimeout(PATIENCE)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # a cable pulled while something is being sent
            patience = int(2000 * PATIENCE)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, patience)
        self.peer = ""  # who is at the other end, from the greeting on

    @classmethod
    def dial(cls, address: Address, moved: Moved, patience: float) -> Link:
        """A new connection to whoever listens there."""
        with _reported("nobody answers"):
            link = cls(socket.create_connection(address, timeout=patience), moved)
            link.patience(patience)
            return link

    def patience(self, seconds: float) -> None:
        """How long to wait for the next bytes from now on."""
        with _reported("a closed connection"):
            self._socket.settimeout(seconds)

    def send(self, header: Header, body: bytes = b"") -> None:
        """Send a frame."""
        text = json.dumps(header, separators=(",", ":")).encode()
        if len(text) > MOST_HEADER:
            raise BadFrameError(f"a header of {len(text):,} bytes")
        self.write(_LENGTHS.pack(len(text), len(body)) + text + body)

    def receive(self, most_body: int = 0, most: int = MOST_HEADER) -> tuple[Header, bytes]:
        """The next frame; its body and its header have at most so many bytes."""
        header_size, body_size = _LENGTHS.unpack(self.read(_LENGTHS.size))
        if header_size > most or body_size > most_body:
            raise BadFrameError(f"a frame of {header_size:,} + {body_size:,} bytes")
        try:
            header = json.loads(self.read(header_size))
        except (ValueError, RecursionError) as error:
            raise BadFrameError("a header that is no JSON") from error
        if not isinstance(header, dict):
            raise BadFrameError("a header that is no object")
        return header, self.read(body_size)

    def write(self, data: bytes) -> None:
        """Send bytes as they are."""
        view = memoryview(data)
        with _reported("the connection broke while sending"):
            while view:
                sent = self._socket.send(view[:PIECE])
                self._moved.add(sent=sent)
                view = view[sent:]

    def read(self, size: int) -> bytes:
        """So many bytes."""
        return b"".join(self.pieces(size))

    def pieces(self, size: int) -> Iterator[bytes]:
        """So many bytes, as they come in."""
        while size > 0:
            with _reported("the connection broke while receiving"):
                piece = self._socket.recv(min(size, PIECE))
            if not piece:
                raise HungUpError("the other side hung up")
            self._moved.add(received=len(piece))
            size -= len(piece)
            yield piece

    def host(self) -> str:
        """The address from which the other side comes, as this machine sees it."""
        with _reported("a closed connection"):
            return str(self._socket.getpeername()[0])

    def close(self) -> None:
        """Hang up; a thread that waits for bytes on it gets a TransportError."""
        with suppress(OSError):  # it was not connected any more
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def greet(link: Link, secret: str, me: str, port: int) -> str:
    """Greet as the one that dialled; sets `link.peer`. Says as which host the other sees us."""
    nonce = secrets.token_hex(16)
    link.send({"ring": _VERSION, "me": me, "port": port, "nonce": nonce})
    try:
        answer, _ = link.receive(most=_GREETING)
    except BadFrameError:
        answer = {}
    other = answer.get("nonce"), answer.get("me")
    if answer.get("ring") != _VERSION or not all(isinstance(each, str) for each in other):
        raise BadFrameError("something else than a ring of this version answers")
    link.peer = _checked(answer["me"])
    said = f"{nonce}|{answer['nonce']}|{me}|{link.peer}"
    if not _proves(answer.get("proof"), secret, "answers|" + said):
        raise TransportError(f"{link.peer} has another secret than this URL")
    link.send({"proof": _proof(secret, "dialled|" + said)})
    return str(answer.get("seen", ""))


def welcome(link: Link, secret: str, me: str) -> Address:
    """Greet as the one that was dialled; sets `link.peer`. Returns where the other listens."""
    hello, _ = link.receive(most=_GREETING)
    if hello.get("ring") != _VERSION or not isinstance(hello.get("nonce"), str):
        raise BadFrameError("no greeting")
    caller, port = _checked(hello.get("me")), hello.get("port")
    if type(port) is not int or not 0 < port < 1 << 16:
        raise BadFrameError("no port")
    nonce = secrets.token_hex(16)
    said = f"{hello['nonce']}|{nonce}|{caller}|{me}"
    host = link.host()
    proof = _proof(secret, "answers|" + said)
    link.send({"ring": _VERSION, "me": me, "nonce": nonce, "proof": proof, "seen": host})
    answer, _ = link.receive(most=_GREETING)
    if not _proves(answer.get("proof"), secret, "dialled|" + said):
        raise BadFrameError("another secret")
    link.peer = caller
    return Address(host, port)


def _checked(peer: object) -> str:
    if not isinstance(peer, str) or not is_peer(peer):
        raise BadFrameError("no name of a peer")
    return peer


def _proof(secret: str, said: str) -> str:
    return hmac.new(secret.encode(), said.encode(), hashlib.sha256).hexdigest()


def _proves(proof: object, secret: str, said: str) -> bool:
    return isinstance(proof, str) and hmac.compare_digest(
        proof.encode(), _proof(secret, said).encode()
    )


@contextmanager
def _reported(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        kind = HungUpError if isinstance(error, ConnectionError) else TransportError
        raise kind(f"{what}: {error or type(error).__name__}") from error
