"""Peers that reach each other directly, on machines that trust each other: ring://host:port.

    ring://[secret@]host:port[,host:port…][?listen=[host:]port]

The addresses are where a newcomer looks for the others: one of them must be up for that, and the
run must be started on one. Each peer keeps its shelf on its own disk and tells the others what is
new on it (`ring_gossip`); large objects go round a ring that is ordered by measured bandwidth
(`ring_pull`, `ring_order`); registers are agreed by Paxos (`ring_registers`). A peer listens on
that of the addresses which is its own machine's and free, else on any port; `listen` says another,
which others must be able to dial. Peers behind routers want a store instead.
"""

from __future__ import annotations

import fcntl
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO
from urllib.parse import parse_qs, unquote

from trainwright.errors import Mistake, UserError
from trainwright.swarm.transports.keys import checked_key, checked_peer
from trainwright.swarm.transports.ring_frames import PATIENCE, Address, Moved
from trainwright.swarm.transports.ring_gossip import Gossip
from trainwright.swarm.transports.ring_library import Library
from trainwright.swarm.transports.ring_links import Links
from trainwright.swarm.transports.ring_pull import Pulls
from trainwright.swarm.transports.ring_registers import Registers
from trainwright.swarm.transports.ring_server import Server
from trainwright.swarm.transports.transport import Listed, Transport, TransportError


@dataclass(frozen=True)
class RingUrl:
    """A ring's URL, read."""

    seeds: tuple[Address, ...]
    secret: str = ""
    listen: Address | None = None

    @classmethod
    def read(cls, url: str) -> RingUrl:
        """Raises UserError for what is none."""
        try:
            rest, _, query = url.removeprefix("ring://").partition("?")
            secret, _, hosts = rest.rstrip("/").rpartition("@")
            options = parse_qs(query, keep_blank_values=True, strict_parsing=bool(query))
            if set(options) - {"listen"}:
                raise ValueError("the only option is listen")
            listen = _address(options["listen"][-1], host="") if options else None
            return cls(tuple(map(_address, hosts.split(","))), unquote(secret), listen)
        except ValueError as error:
            what = f"this is no ring's URL: {error}"
            raise UserError(
                Mistake(what, "write ring://host:port[,host:port]", where=url)
            ) from None


def open_ring(url: str, me: str, directory: Path, visit: bool = False) -> Transport:
    """The transport of a ring:// URL; what it keeps is below `directory`, of one process only.

    Who is only there for a `visit` never listens at the URL's addresses, which are its peers'.

    Raises UserError for a URL that is none, an address that is not this machine's, or a directory
    that another process has open.
    """
    return Ring(RingUrl.read(url), checked_peer(me), directory / "ring", visit)


class Ring:
    """A `Transport` among machines that can dial each other."""

    stays = False

    def __init__(self, url: RingUrl, me: str, directory: Path, visit: bool = False) -> None:
        self.me = me
        directory.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(directory / "lock")
        try:
            listening, own = _listening(url, directory / "port", visit)
        except BaseException:
            self._lock.close()
            raise
        self._moved = Moved()
        self._library = Library(directory, me)
        self._links = Links(self._library, url.secret, own.port, self._moved)
        self._registers = Registers(directory, me, self._links)
        self._seed = url.seeds[0]
        self._gossip = Gossip(self._library, self._links, url.seeds, own)
        self._pulls = Pulls(self._library, self._links, self._gossip)
        handlers = {
            "news": self._gossip.answer_news,
            "probe": self._gossip.answer_probe,
            "pull": self._pulls.answer,
            **dict.fromkeys(("register", "learn", "prepare", "accept"), self._registers.serve),
        }
        self._server = Server(listening, url.secret, me, handlers, self._links.heard, self._moved)

    def put(self, key: str, data: bytes) -> None:
        """See `Transport`."""
        with _disk():
            self._library.put(checked_key(key), data)

    def get(self, peer: str, key: str, limit: int) -> bytes | None:
        """See `Transport`. Where an object was replaced while it came in, the newer one."""
        checked_peer(peer)
        checked_key(key)
        self._join()
        while (entry := self._library.entry(peer, key)) is not None:
            if entry.size > limit:
                raise ValueError(f"{peer}/{key} has {entry.size:,} bytes, over {limit:,}")
            try:
                self._pulls.fetch(peer, entry.digest, entry.size)
            except TransportError:
                if self._library.entry(peer, key) == entry:
                    raise
                continue
            with _disk():
                data = self._library.objects.read(entry.digest)
            if data is not None:
                return data
        return None

    def peers(self) -> list[str]:
        """See `Transport`."""
        self._join()
        return self._library.peers()

    def keys(self, peer: str, under: str) -> list[Listed]:
        """See `Transport`."""
        checked_peer(peer)
        if under:
            checked_key(under)
        self._join()
        return self._library.listed(peer, under)

    def delete(self, key: str) -> None:
        """See `Transport`."""
        with _disk():
            self._library.delete(checked_key(key))

    def settle(self, register: str, data: bytes, electorate: tuple[str, ...]) -> bytes:
        """See `Transport`. Where the electorate is empty, the URL's first address decides."""
        checked_key(register)
        self._join()
        with _disk():
            return self._registers.settle(register, data, electorate or (self._first(),))

    def settled(self, register: str, limit: int) -> bytes | None:
        """See `Transport`."""
        checked_key(register)
        self._join()
        with _disk():
            found = self._registers.read(register)
        if found is not None and len(found) > limit:
            raise ValueError(f"register {register} has {len(found):,} bytes, over {limit:,}")
        return found

    def bytes_moved(self) -> tuple[int, int]:
        """See `Transport`: all that connections carried, news and probes included."""
        return self._moved.sent, self._moved.received

    def close(self) -> None:
        """See `Transport`."""
        self._gossip.close()
        self._server.close()
        self._links.close()
        self._lock.close()

    def _join(self) -> None:
        if not self._gossip.joined.wait(2 * PATIENCE):
            raise TransportError(self._gossip.problem)

    def _first(self) -> str:
        if self._gossip.own == self._seed:
            return self.me
        return self._links.meet(self._seed)


@contextmanager
def _disk() -> Iterator[None]:
    try:
        yield
    except OSError as error:  # full, or away for a while
        raise TransportError(f"this peer's disk: {error}") from error


def _address(text: str, host: str | None = None) -> Address:
    """`host` is what it is where only a port is given, if that will do."""
    given, _, port = text.strip().rpartition(":")
    host = given or host
    if host is None or not port.isascii() or not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise ValueError(f"{text!r} is no host:port")
    return Address(host, int(port))


def _locked(path: Path) -> TextIO:
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        what = "another process has this peer's directory open"
        raise UserError(
            Mistake(
                what,
                "end it first, or give this one a directory of its own",
                where=str(path.parent.parent),
            )
        ) from None
    return file


def _listening(url: RingUrl, kept: Path, visit: bool) -> tuple[socket.socket, Address]:
    """A listening socket, and the address at which others dial it; its host is empty where only
    they know it. A peer comes back to the port that it had before, if that is still free.
    """
    if url.listen is not None:
        try:
            return socket.create_server(("", url.listen.port)), url.listen
        except OSError as error:
            what = f"cannot listen on port {url.listen.port}: {error.strerror}"
            raise UserError(Mistake(what, "give `listen` a port that is free")) from None
    for seed in () if visit else url.seeds:
        with suppress(OSError):  # another machine's, or another peer of this one has it
            sock = socket.create_server(seed)
            if not re.fullmatch(r"[0-9.]+|localhost", seed.host):
                # Many machines take their own name for a loopback address: listen on all.
                sock.close()
                sock = socket.create_server(("", seed.port))
            return sock, seed
    with suppress(OSError, ValueError):
        port = int(kept.read_text())
        return socket.create_server(("", port)), Address("", port)
    sock = socket.create_server(("", 0))
    port = sock.getsockname()[1]
    kept.write_text(str(port))
    return sock, Address("", port)
