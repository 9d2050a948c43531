"""The listening side of a ring's peer: a thread for each connection that others dialled."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from threading import Lock, Thread

from trainwright.swarm.transports.ring_frames import PATIENCE, Address, Header, Link, Moved, welcome
from trainwright.swarm.transports.transport import TransportError

MOST_BODY = 1 << 20  # bytes that come with a question
_MOST_LINKS = 256
_IDLE = 60.0  # seconds after which a connection on which nobody asks anything is closed

Handler = Callable[[Link, Header, bytes], None]  # answers on the link


class Server:
    """Answers with the handler of each question's `ask`, until it is closed.

    `met` is told of everybody who proves to be of the run.
    """

    def __init__(
        self,
        listening: socket.socket,
        secret: str,
        me: str,
        handlers: Mapping[str, Handler],
        met: Callable[[str, Address | None], None],
        moved: Moved,
    ) -> None:
        self._listening, self._secret, self._me = listening, secret, me
        self._handlers, self._met, self._moved = handlers, met, moved
        self._lock, self._links, self._closed = Lock(), set[Link](), False
        Thread(target=self._accept, name="ring-server", daemon=True).start()

    def close(self) -> None:
        """Listen no more, and hang up."""
        with self._lock:
            self._closed, links = True, list(self._links)
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        for link in links:
            link.close()

    def _accept(self) -> None:
        while not self._closed:
            try:
                sock, _ = self._listening.accept()
                link = Link(sock, self._moved)
            except OSError:  # closed, or nobody there any more, or too many files open
                time.sleep(0.1)
                continue
            with self._lock:
                welcome_to_come = len(self._links) < _MOST_LINKS and not self._closed
                if welcome_to_come:
                    self._links.add(link)
            if welcome_to_come:
                Thread(target=self._serve, args=(link,), name="ring-link", daemon=True).start()
            else:
                link.close()

    def _serve(self, link: Link) -> None:
        try:
            address = welcome(link, self._secret, self._me)
            self._met(link.peer, address)
            while True:
                link.patience(_IDLE)
                header, body = link.receive(MOST_BODY)
                link.patience(PATIENCE)
                self._met(link.peer, None)
                self._handlers[header["ask"]](link, header, body)
        except (TransportError, KeyError, TypeError, ValueError, OSError):
            pass  # gone, or it does not keep to the protocol: a peer that means it dials again
        finally:
            link.close()
            with self._lock:
                self._links.discard(link)
