"""Connections from this peer to the others: kept for the next question, and who answers at all."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue
from threading import Lock, Thread

from trainwright.swarm.transports.ring_frames import (
    PATIENCE,
    Address,
    Header,
    HungUpError,
    Link,
    Moved,
    greet,
)
from trainwright.swarm.transports.ring_library import Library
from trainwright.swarm.transports.transport import TransportError

SILENT = 6.0  # seconds after which a peer that was not heard counts as gone
_MOST_IDLE = 4  # connections to a peer that are kept


class Links:
    """Dials, asks, and remembers who answered when. Thread-safe."""

    def __init__(self, library: Library, secret: str, port: int, moved: Moved) -> None:
        self.seen_as = ""  # the host as which others see this peer
        self._library, self._secret, self._port, self._moved = library, secret, port, moved
        self._lock = Lock()
        self._idle: dict[str, list[Link]] = defaultdict(list)
        self._met: dict[str, Address] = {}
        self._heard: dict[str, float] = {}
        self._closed = False

    def heard(self, peer: str, address: Address | None = None) -> None:
        """Note a sign of life, and where the peer can be dialled."""
        with self._lock:
            self._heard[peer] = time.monotonic()
            if address is not None:
                self._met[peer] = address

    def is_live(self, peer: str) -> bool:
        """Whether it was heard a moment ago."""
        return time.monotonic() - self._heard.get(peer, -SILENT) < SILENT

    def live(self) -> list[str]:
        """All who were, sorted."""
        with self._lock:
            return sorted(peer for peer in self._heard if self.is_live(peer))

    def addresses(self, peer: str) -> list[Address]:
        """Where to dial a peer: where it was met, and where it says that it listens."""
        found = [self._met[peer]] if peer in self._met else []
        match self._library.about(peer).get("address"):
            case [str(host), int(port)] if Address(host, port) not in found:
                found.append(Address(host, port))
        return found

    def meet(self, address: Address) -> str:
        """Dial an address, whoever is there; its name, which may be this peer's own."""
        link = self._dialled(address)
        if link.peer == self._library.me:
            link.close()
            return link.peer
        self.heard(link.peer, address)
        self._keep(link)
        return link.peer

    def ask(
        self,
        peer: str,
        header: Header,
        body: bytes = b"",
        most: int = 0,
        patience: float = PATIENCE,
    ) -> tuple[Header, bytes]:
        """Ask a peer; what it answers, with a body of `most` bytes at most."""
        with self.asked(peer, header, body, most, patience) as (_, answer, answered):
            return answer, answered

    @contextmanager
    def asked(
        self,
        peer: str,
        header: Header,
        body: bytes = b"",
        most: int = 0,
        patience: float = PATIENCE,
    ) -> Iterator[tuple[Link, Header, bytes]]:
        """The same, with the connection, on which more may follow; it must be read to its end."""
        try:
            link, answer, answered = self._answered(peer, header, body, most, patience)
        except TransportError:
            with self._lock:
                self._heard.pop(peer, None)
            raise
        self.heard(peer)
        try:
            yield link, answer, answered
        except BaseException:
            link.close()
            raise
        self._keep(link)

    def ask_all(
        self,
        peers: Iterable[str],
        header: Header,
        body: bytes = b"",
        most: int = 0,
        patience: float = PATIENCE,
    ) -> Iterator[tuple[str, Header, bytes]]:
        """Ask several at once, now; then give answers as they come, for so many seconds in all.
        Who listens may stop at any time, and those who do not answer are left out.
        """
        answers: SimpleQueue[tuple[str, Header, bytes] | None] = SimpleQueue()

        def ask(peer: str) -> None:
            try:
                answers.put((peer, *self.ask(peer, header, body, most)))
            except TransportError:
                answers.put(None)

        asked = [Thread(target=ask, args=(peer,), daemon=True) for peer in peers]
        for thread in asked:
            thread.start()

        def listen() -> Iterator[tuple[str, Header, bytes]]:
            end = time.monotonic() + patience
            for _ in asked:
                try:
                    answer = answers.get(timeout=max(end - time.monotonic(), 0))
                except Empty:
                    return
                if answer is not None:
                    yield answer

        return listen()

    def tell(self, peers: Iterable[str], header: Header, body: bytes) -> None:
        """Send several something, at once and without waiting; who does not hear it will ask."""

        def tell(peer: str) -> None:
            with suppress(TransportError):
                self.ask(peer, header, body, most=len(body))

        for peer in peers:
            Thread(target=tell, args=(peer,), daemon=True).start()

    def close(self) -> None:
        """Hang up everywhere."""
        with self._lock:
            self._closed = True
            idle = [link for links in self._idle.values() for link in links]
            self._idle.clear()
        for link in idle:
            link.close()

    def _answered(
        self, peer: str, header: Header, body: bytes, most: int, patience: float
    ) -> tuple[Link, Header, bytes]:
        while True:
            with self._lock:
                links = self._idle[peer]
                kept = links.pop() if links else None
            link = kept or self._dial(peer, min(patience, PATIENCE))
            try:
                link.patience(patience)
                link.send(header, body)
                return link, *link.receive(most)
            except HungUpError:
                link.close()
                if kept is None:
                    raise
                # It was closed while it was idle: that says nothing of the peer.
            except BaseException:
                link.close()
                raise

    def _dial(self, peer: str, patience: float) -> Link:
        problem = TransportError(f"nobody knows where {peer} is")
        for address in self.addresses(peer):
            try:
                link = self._dialled(address, patience)
            except TransportError as error:
                problem = error
                continue
            if link.peer == peer:
                return link
            link.close()
            problem = TransportError(f"{link.peer} answers at {address}, not {peer}")
        raise problem

    def _dialled(self, address: Address, patience: float = PATIENCE) -> Link:
        if self._closed:
            raise TransportError("the transport was closed")
        link = Link.dial(address, self._moved, patience)
        try:
            seen_as = greet(link, self._secret, self._library.me, self._port)
        except BaseException:
            link.close()
            raise
        if not self.seen_as or not seen_as.startswith("127."):
            self.seen_as = seen_as
        return link

    def _keep(self, link: Link) -> None:
        with self._lock:
            links = self._idle[link.peer]
            if len(links) < _MOST_IDLE and not self._closed:
                links.append(link)
                return
        link.close()
