"""Peers that meet in a store: a folder that they share, or a bucket. No peer talks to another.

    PREFIX/peers/<peer>/<key>        a peer's shelf, written by it alone
    PREFIX/registers/<register>      written once, by whoever is first

Works from behind any router, with no open port and nobody in the middle: the store's create-only
write is all that peers need to agree. `Backing` is what a store must be able to do; `folder` and
`bucket` are the two that there are.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from threading import Lock
from typing import Protocol

from trainwright.swarm.transports.keys import checked_key, checked_peer, is_key, is_peer
from trainwright.swarm.transports.transport import Listed, TransportError

MOST_LISTED = 10_000  # objects of a shelf that are looked at: a stranger may put any number there
LARGEST_REGISTER = 1 << 24  # bytes
_TRIES = 5


class Backing(Protocol):
    """Whole files by path. Any call may raise TransportError."""

    def write(self, path: str, data: bytes) -> None:
        """Put a file there, in the place of the one before, whole at once."""
        ...

    def create(self, path: str, data: bytes) -> bool:
        """The same where there is none; False, with nothing changed, where there is one."""
        ...

    def read(self, path: str, limit: int) -> bytes | None:
        """A file; None where there is none. Raises ValueError over `limit` bytes, unread."""
        ...

    def folders(self, path: str) -> Iterable[str]:
        """Names of the folders in a folder."""
        ...

    def files(self, path: str) -> Iterable[tuple[str, int]]:
        """Paths below a folder's, and sizes in bytes, at any depth."""
        ...

    def remove(self, path: str) -> None:
        """Take a file away, if it is there."""
        ...


class Store:
    """A `Transport` over a store."""

    stays = True

    def __init__(self, backing: Backing, me: str) -> None:
        self.me = checked_peer(me)
        self._backing = backing
        self._lock = Lock()
        self._sent = self._received = 0

    def put(self, key: str, data: bytes) -> None:
        """See `Transport`."""
        self._backing.write(_shelf(self.me, key), data)
        self._count(sent=len(data))

    def get(self, peer: str, key: str, limit: int) -> bytes | None:
        """See `Transport`."""
        return self._read(_shelf(peer, key), limit)

    def peers(self) -> list[str]:
        """See `Transport`."""
        return sorted(name for name in self._backing.folders("peers") if is_peer(name))

    def keys(self, peer: str, under: str) -> list[Listed]:
        """See `Transport`; of a shelf with over 10,000 objects, some 10,000 of them."""
        above = f"{under}/" if under else ""
        path = _shelf(peer, under) if under else f"peers/{checked_peer(peer)}"
        found = ((above + name, size) for name, size in self._backing.files(path))
        safe = (Listed(key, size) for key, size in found if is_key(key))
        return sorted(islice(safe, MOST_LISTED), key=lambda listed: listed.key)

    def delete(self, key: str) -> None:
        """See `Transport`."""
        self._backing.remove(_shelf(self.me, key))

    def settle(self, register: str, data: bytes, electorate: tuple[str, ...]) -> bytes:
        """See `Transport`; the store decides who was first, the electorate does not matter."""
        path = f"registers/{checked_key(register)}"
        for _ in range(_TRIES):  # S3 may refuse two that come at once, and have neither
            if self._backing.create(path, data):
                self._count(sent=len(data))
                return data
            if (found := self._read(path, LARGEST_REGISTER)) is not None:
                return found
        raise TransportError(f"the store neither has register {register} nor takes it")

    def settled(self, register: str, limit: int) -> bytes | None:
        """See `Transport`."""
        return self._read(f"registers/{checked_key(register)}", limit)

    def bytes_moved(self) -> tuple[int, int]:
        """See `Transport`: bytes of objects; what HTTP and TLS add is not seen here."""
        return self._sent, self._received

    def close(self) -> None:
        """See `Transport`; there is nothing to end."""

    def _read(self, path: str, limit: int) -> bytes | None:
        data = self._backing.read(path, limit)
        self._count(received=len(data or b""))
        return data

    def _count(self, sent: int = 0, received: int = 0) -> None:
        with self._lock:
            self._sent += sent
            self._received += received


def _shelf(peer: str, key: str) -> str:
    return f"peers/{checked_peer(peer)}/{checked_key(key)}"
