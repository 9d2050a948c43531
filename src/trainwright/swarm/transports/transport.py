"""What a transport is: every peer's own shelf of objects, and registers that are written once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from trainwright.errors import UserError


class AbsentError(UserError):
    """There is nothing at a run's place yet, as far as can be seen: no folder, or no run."""


class TransportError(Exception):
    """Not to be reached just now (a store away, a link down): whoever asks may ask again."""


@dataclass(frozen=True)
class Listed:
    """An object on a peer's shelf: its key and size in bytes."""

    key: str
    size: int


class Transport(Protocol):
    """Objects by (peer, key). A peer writes on its own shelf only; all can read all shelves.

    An object is there whole or not at all. Keys are relative paths of safe names
    ("rounds/12/contribution"); others are refused with ValueError. Any call may raise
    TransportError, may take as long as its link does, and may be made from several threads.
    """

    me: str
    stays: bool  # what a peer put, when the peer itself has gone

    def put(self, key: str, data: bytes) -> None:
        """Write an object on this peer's own shelf, in the place of the one before."""
        ...

    def get(self, peer: str, key: str, limit: int) -> bytes | None:
        """An object; None where it is not. Raises ValueError if it has over `limit` bytes, before
        it is read.
        """
        ...

    def peers(self) -> list[str]:
        """All that have a shelf, sorted; who is alive is not known here."""
        ...

    def keys(self, peer: str, under: str) -> list[Listed]:
        """What is on a peer's shelf below a path, sorted by key."""
        ...

    def delete(self, key: str) -> None:
        """Take an object off this peer's shelf, if it is there."""
        ...

    def settle(self, register: str, data: bytes, electorate: tuple[str, ...]) -> bytes:
        """Write a register once and for all: what stands in it, which is `data` or what another
        peer was first with. All peers get the same, whatever crashes.

        `electorate` are the peers of the last agreed round, sorted: a transport without a store
        has the register agreed by a majority of them (of two halves, the one with the first).
        Raises ValueError where what stands there is too large to be read.
        """
        ...

    def settled(self, register: str, limit: int) -> bytes | None:
        """What stands in a register; None where nothing was settled (or is known here yet)."""
        ...

    def bytes_moved(self) -> tuple[int, int]:
        """Bytes sent and received so far, as they were given to the operating system."""
        ...

    def close(self) -> None:
        """End connections and threads. Objects stay where the transport keeps them."""
        ...
