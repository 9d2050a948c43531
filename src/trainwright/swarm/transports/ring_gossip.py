"""Who is in the ring, what is new on their shelves, and in which order they stand.

A thread for each peer that is followed asks it for news, which it holds back until there are any
(long polling). Of a peer that is followed itself nobody else is asked, so that news comes once; one
that is cut off from here, or gone, is heard of from the others.
"""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Mapping
from threading import Event, Lock, Thread
from typing import Any

from trainwright.swarm.transports.ring_frames import PATIENCE, PIECE, Address, Header, Link
from trainwright.swarm.transports.ring_library import MOST_SENT_ALONG, Library
from trainwright.swarm.transports.ring_links import SILENT, Links
from trainwright.swarm.transports.ring_order import ring_order
from trainwright.swarm.transports.ring_shelves import BadNewsError, read_seen
from trainwright.swarm.transports.transport import TransportError

_FOLLOWED = 12  # peers that are asked for news at a time
_RETRIED = 3  # of these, who are chosen whether they answered lately or not
_ANEW = 30.0  # seconds after which others are followed, if there are more
_HELD = 2.0  # seconds for which an answer waits for news
_LATER = (0.5, 8.0)  # seconds until a peer that does not answer is asked again, at first, at last
_ASIDE = 5.0  # seconds after which seeds are looked for again, where others are there already
_LARGEST_PROBE = 1 << 20  # bytes
_PROBE_SECONDS = 0.2


class Gossip:
    """Begins its threads when made, ends them with `close`.

    `seeds` are the URL's addresses; `own` is this peer's, with an empty host where it is not known
    under which others reach it.
    """

    def __init__(
        self, library: Library, links: Links, seeds: tuple[Address, ...], own: Address
    ) -> None:
        self.joined = Event()  # there is a ring, as far as this peer can tell
        self.problem = "nobody answers at the addresses of the URL"  # until it joined
        self._library, self._links = library, links
        self.own, self._seeds = own, tuple(seed for seed in seeds if seed != own)
        self._begins = own in seeds  # one of the seeds may be the first of all
        self._closed, self._probing, self._lock = Event(), Lock(), Lock()
        self._rates: dict[str, int] = {}  # half powers of two of bytes/s, from each peer to here
        self._told: dict[str, float] = {}  # when there was news of a peer, from whomever
        self._chosen = set[str]()  # to be followed
        self._followed = set[str]()  # have a thread
        self._order: tuple[object, tuple[str, ...]] = (None, ())
        for work in (self._meet_seeds, self._look_after):
            Thread(target=work, name="ring-members", daemon=True).start()

    def ring(self) -> tuple[str, ...]:
        """The peers with anything on their shelf who are there, in the ring's order."""
        library, now = self._library, time.monotonic()
        with self._lock:
            there = {peer for peer, told in self._told.items() if now < told + SILENT}
        there |= {*self._links.live(), library.me}
        members = tuple(peer for peer in library.peers() if peer in there)
        rates = {
            (source, peer): 2.0 ** (step / 2)
            for peer in members
            for source, step in _rates_of(library.about(peer)).items()
            if source in members
        }
        with self._lock:
            asked = (members, tuple(sorted(rates.items())))
            if self._order[0] != asked:
                self._order = asked, ring_order(members, rates)
            return self._order[1]

    def measured(self, peer: str, rate: float) -> None:
        """Note the bytes/s that came from a peer: the most that it reached, slowly forgotten."""
        step = round(2 * math.log2(max(rate, 1)))
        with self._lock:
            self._rates[peer] = max(step, self._rates.get(peer, step) - 1)

    def rate(self, peer: str) -> float:
        """Bytes/s that come from a peer, as measured; 0 before that."""
        with self._lock:
            return 2.0 ** (self._rates[peer] / 2) if peer in self._rates else 0.0

    def answer_news(self, link: Link, header: Header, body: bytes) -> None:
        """Answer who asks for news."""
        elsewhere, wait = header["elsewhere"], min(float(header["wait"]), _HELD)
        link.send(*self._library.news(read_seen(header["seen"]), set(elsewhere), wait))

    def answer_probe(self, link: Link, header: Header, body: bytes) -> None:
        """Answer who wants to know how fast this link is: so many bytes."""
        size = header["size"]
        if type(size) is not int or not 0 < size <= _LARGEST_PROBE:
            raise ValueError("no size")
        link.send({"size": size})
        for _ in range(size // PIECE):
            link.write(os.urandom(PIECE))

    def close(self) -> None:
        """End all threads; those that wait for an answer end when it comes."""
        self._closed.set()

    def _meet_seeds(self) -> None:
        """Dial the URL's addresses, and again those where nobody is known to be."""
        while not self._closed.is_set():
            reached = {
                address for peer in self._links.live() for address in self._links.addresses(peer)
            }
            for seed in self._seeds:
                if seed not in reached:
                    try:
                        if self._links.meet(seed) == self._library.me:
                            self._is_at(seed)
                    except TransportError as error:
                        self.problem = f"{seed}: {error}"
            if self._begins:
                self.joined.set()
            self._closed.wait(_ASIDE if self._links.live() else _LATER[0])

    def _is_at(self, seed: Address) -> None:
        """One of the URL's addresses is this peer's own, as who dials it finds out."""
        self.own, self._begins = seed, True
        self._seeds = tuple(each for each in self._seeds if each != seed)

    def _look_after(self) -> None:
        """Follow whom there is to follow, and tell about this peer once it has a shelf."""
        chosen = -_ANEW
        while not self._closed.wait(0.2):
            others = {*self._library.known(), *self._links.live()} - {self._library.me}
            dialled = sorted(peer for peer in others if self._links.addresses(peer))
            now = time.monotonic()
            if len(dialled) <= _FOLLOWED or now > chosen + _ANEW:
                chosen = now
                self._choose(dialled)
            if self._has_shelf():
                self._library.tell(self._about())

    def _choose(self, peers: list[str]) -> None:
        """Follow these, or of many some who are there, and a few who may be back."""
        if len(peers) > _FOLLOWED:
            random.shuffle(peers)
            peers.sort(key=self._links.is_live, reverse=True)
            near = _FOLLOWED - _RETRIED
            peers = peers[:near] + random.sample(peers[near:], _RETRIED)
        with self._lock:
            self._chosen = set(peers)
            begun, self._followed = self._chosen - self._followed, self._chosen | self._followed
        for peer in begun:
            Thread(target=self._follow, args=(peer,), name="ring-news", daemon=True).start()

    def _follow(self, peer: str) -> None:
        pause = _LATER[0]
        while not self._closed.is_set():
            with self._lock:
                if peer not in self._chosen:
                    self._followed.discard(peer)
                    return
            try:
                self._ask_news(peer)
                if peer not in self._rates and self._has_shelf() and peer in self._library.peers():
                    self._probe(peer)
                pause = _LATER[0]
            except (TransportError, BadNewsError):
                self._closed.wait(pause)
                pause = min(2 * pause, _LATER[1])

    def _ask_news(self, peer: str) -> None:
        with self._lock:
            elsewhere = sorted(
                other for other in self._followed - {peer} if self._links.is_live(other)
            )
        question = {
            "ask": "news",
            "seen": self._library.seen(apart_from=elsewhere),
            "elsewhere": elsewhere,
            "wait": _HELD if self.joined.is_set() else 0,
        }
        answer, body = self._links.ask(
            peer, question, most=MOST_SENT_ALONG, patience=_HELD + PATIENCE
        )
        if not self._closed.is_set():
            grown = self._library.take(answer, body)
            with self._lock:
                self._told |= dict.fromkeys(grown, time.monotonic())
        self.joined.set()

    def _probe(self, peer: str) -> None:
        """Measure the link from a peer: more bytes until they take long enough to tell."""
        size, seconds = PIECE // 4, 0.0
        with self._probing:  # one at a time, or they would measure each other
            while seconds < _PROBE_SECONDS and size < _LARGEST_PROBE:
                size *= 4
                with self._links.asked(peer, {"ask": "probe", "size": size}) as (link, _, _):
                    begun = time.monotonic()
                    link.read(size)
                    seconds = time.monotonic() - begun
        self.measured(peer, size / max(seconds, 1e-6))

    def _has_shelf(self) -> bool:
        return self._library.me in self._library.peers()

    def _about(self) -> dict[str, Any]:
        """Where this peer listens, and how fast others reach it: as told before, where the change
        is too small to turn the ring for.
        """
        told = _rates_of(self._library.about(self._library.me))
        with self._lock:
            rates = {
                peer: told[peer] if abs(step - told.get(peer, -9)) < 2 else step
                for peer, step in sorted(self._rates.items())
            }
        return {"address": [self.own.host or self._links.seen_as, self.own.port], "rates": rates}


def _rates_of(about: Mapping[str, Any]) -> dict[str, int]:
    rates = about.get("rates")
    if not isinstance(rates, dict):
        return {}
    return {peer: step for peer, step in rates.items() if type(step) is int and 0 <= step < 100}
