"""Objects fetched from others: from the one before in the ring, as far as it has them already.

Everybody asks its predecessor, who asks its own while it answers: an object leaves its owner once
and goes round while it is still coming in. Where that ends (a crash, a stall), the rest is asked
of the owner, or of anybody who has it whole, from the byte that is missing. A relay on a link that
is many times slower than the owner's is left in the same way, and is none for a while.
"""

from __future__ import annotations

import os
import time
from threading import Condition, Lock, Thread
from typing import BinaryIO

from trainwright.swarm.transports.ring_frames import PATIENCE, PIECE, Header, Link
from trainwright.swarm.transports.ring_gossip import Gossip
from trainwright.swarm.transports.ring_library import Library
from trainwright.swarm.transports.ring_links import Links
from trainwright.swarm.transports.ring_objects import is_digest
from trainwright.swarm.transports.transport import TransportError

_RELAYED = 1 << 15  # bytes from which an object goes round; smaller ones are asked of their owner
_FIRST = 1.5  # seconds until a relay must have sent something
_LAGS = 4  # times as slow as its owner's link may be what comes through a relay
_AVOIDED = 30.0  # seconds for which a peer that was found slow is no relay
_TELLING = 1 << 18  # bytes from which the time of a transfer says how fast the link is


class _Pull:
    """An object that is coming in, and everyone who waits for its bytes."""

    def __init__(self, owner: str, digest: str, size: int) -> None:
        self.owner, self.digest, self.size = owner, digest, size
        self.got, self.over, self.problem = 0, False, ""
        self.source = ""  # who is being asked for it
        self.lagged = ("", 0.0)  # a relay that was left for being slow, and its bytes/s
        self.moved = Condition()

    def advance(self, got: int) -> None:
        with self.moved:
            self.got = got
            self.moved.notify_all()

    def end(self, problem: str = "") -> None:
        with self.moved:
            self.over, self.problem = True, problem
            self.moved.notify_all()

    def beyond(self, position: int) -> int:
        """Wait until more came in than up to there: how much has."""
        with self.moved:
            self.moved.wait_for(lambda: self.got > position or self.over, PATIENCE)
            if self.got <= position:
                raise TransportError(f"the object does not come in here: {self.problem}")
            return self.got


class Pulls:
    """Fetches each object once, however many ask for it. Thread-safe."""

    def __init__(self, library: Library, links: Links, gossip: Gossip) -> None:
        self._library, self._objects, self._links = library, library.objects, links
        self._gossip = gossip
        self._slow: dict[str, float] = {}  # until when peers count as slow
        self._lock = Lock()
        self._running: dict[str, _Pull] = {}
        self._broken = set[str]()  # came in with another digest: from their owner next time

    def fetch(self, owner: str, digest: str, size: int) -> None:
        """Have an object here; waits for it. Raises TransportError if nobody gives it."""
        if self._objects.has(digest):
            return
        pull = self._begun(owner, digest, size)
        with pull.moved:
            pull.moved.wait_for(lambda: pull.over)
        if pull.problem:
            raise TransportError(pull.problem)

    def answer(self, link: Link, header: Header, body: bytes) -> None:
        """Send an object from an offset on: whole, or while it comes in. A size of -1: not here.

        Where the asker wants a relay, fetching begins with its question.
        """
        digest, position = header["digest"], header["offset"]
        if not is_digest(digest) or type(position) is not int or position < 0:
            raise ValueError("no place in an object")
        whole, pull = self._objects.has(digest), self._running.get(digest)
        if not whole and pull is None and header.get("relay"):
            named = self._library.named(digest)
            if named is not None:
                pull = self._begun(named[0], digest, named[1].size)
        if pull is not None and pull.source == link.peer and pull.got <= position:
            pull = None  # each would wait for the other: their rings differ for a moment
        file = self._objects.opened(digest) if whole or pull else None
        if file is None:
            link.send({"size": -1})
            return
        with file:
            size = os.fstat(file.fileno()).st_size if pull is None else pull.size
            link.send({"size": size, "whole": whole})
            file.seek(position)
            while position < size:
                there = size if pull is None else pull.beyond(position)
                piece = file.read(min(PIECE, there - position))
                if not piece:
                    raise TransportError("the object was taken away")
                link.write(piece)
                position += len(piece)

    def _begun(self, owner: str, digest: str, size: int) -> _Pull:
        with self._lock:
            pull = self._running.get(digest)
            if pull is None:
                self._objects.appended(digest).close()  # there to be opened by who relays it
                pull = self._running[digest] = _Pull(owner, digest, size)
                Thread(target=self._run, args=(pull,), name="ring-pull", daemon=True).start()
        return pull

    def _run(self, pull: _Pull) -> None:
        problem = "it was broken off"
        try:
            self._collect(pull)
            problem = ""
            if not self._objects.finish(pull.digest):
                self._broken.add(pull.digest)
                problem = f"what came of {pull.digest[:12]} is not what it should be"
        except (TransportError, OSError) as error:
            problem = str(error) or type(error).__name__
        finally:
            with self._lock:
                del self._running[pull.digest]
            pull.end(problem)

    def _collect(self, pull: _Pull) -> None:
        """Write all bytes, from one source after the other, as long as any of them gives some."""
        with self._objects.appended(pull.digest) as file:
            pull.advance(file.tell())
            while pull.got < pull.size:
                before, problems = pull.got, list[str]()
                for source, relay in self._sources(pull):
                    begun = time.monotonic()
                    try:
                        self._copy(source, relay, pull, file)
                        return
                    except TransportError as error:
                        problems.append(f"{source}: {error}")
                    if relay and time.monotonic() > begun + _FIRST:  # not at every object again
                        self._slow[source] = time.monotonic() + _AVOIDED
                if pull.got == before:
                    reasons = "; ".join(problems) or "nobody is there"
                    raise TransportError(f"{pull.owner}'s object cannot be had: {reasons}")

    def _copy(self, source: str, relay: bool, pull: _Pull, file: BinaryIO) -> None:
        pull.source = source
        question = {"ask": "pull", "digest": pull.digest, "offset": pull.got, "relay": relay}
        # If nothing comes of a relay, it may wait for somebody who waits for this peer.
        patience, asked = _FIRST if relay else PATIENCE, time.monotonic()
        with self._links.asked(source, question, patience=patience) as (link, answer, _):
            there = answer.get("size") == pull.size
            if there:
                start, begun = pull.got, time.monotonic()
                for piece in link.pieces(pull.size - pull.got):
                    if pull.got == start:
                        link.patience(PATIENCE)
                    file.write(piece)
                    file.flush()  # others read what is said to be there
                    pull.advance(pull.got + len(piece))
                    if relay and self._lags(pull, pull.got - start, time.monotonic() - asked):
                        raise TransportError("it comes too slowly")
                pace = (pull.got - start) / max(time.monotonic() - begun, 1e-6)
                if answer.get("whole") and pull.got - start >= _TELLING:
                    self._gossip.measured(source, pace)
                if source == pull.owner and pace < 2 * pull.lagged[1]:  # not the relay's fault
                    self._slow[source] = self._slow.pop(pull.lagged[0], 0.0)
        if not there:
            raise TransportError("it is not there")

    def _lags(self, pull: _Pull, got: int, seconds: float) -> bool:
        """Whether the relay is to be left: it and all others who send now do not give together a
        quarter of what the link from the owner does, as far as that is not known to be slow.
        """
        if seconds < _FIRST or pull.got == pull.size or self._is_slow(pull.owner):
            return False
        pace = got / seconds
        if _LAGS * pace * len(self._running) >= self._gossip.rate(pull.owner):
            return False
        pull.lagged = pull.source, pace
        return True

    def _is_slow(self, peer: str) -> bool:
        return time.monotonic() < self._slow.get(peer, 0.0)

    def _sources(self, pull: _Pull) -> list[tuple[str, bool]]:
        """Whom to ask, and whether as a relay: the predecessor that is not slow, the owner, and all
        others who are there; the owner last where it was not heard lately.
        """
        ring, live, me = self._gossip.ring(), self._links.live(), self._library.me
        start = ring.index(me) if me in ring else 0
        before = [*reversed(ring[:start]), *reversed(ring[start + 1 :])]
        others = [peer for peer in before if peer in live and peer != pull.owner]
        others += [peer for peer in live if peer not in (*others, pull.owner)]
        owner = (pull.owner, False)
        if pull.owner not in live:
            return [*((peer, False) for peer in others), owner]
        goes_round = pull.size >= _RELAYED and pull.digest not in self._broken
        relays = (peer for peer in before if peer == pull.owner or not self._is_slow(peer))
        relay = next(relays, pull.owner)
        if not goes_round or relay == pull.owner or relay not in live:
            return [owner, *((peer, False) for peer in others)]
        return [(relay, True), owner, *((peer, False) for peer in others if peer != relay)]
