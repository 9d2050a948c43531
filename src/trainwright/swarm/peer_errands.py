"""What a peer has others do for it: errands on threads of their own, tried again while they fail.

The peer's thread never waits for a link: it sends errands, and what they bring is called on that
same thread, by `deliver`, so that its state needs no locks.
"""

from __future__ import annotations

import heapq
import itertools
import queue
import time
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

from trainwright.swarm.transports.transport import TransportError

Lane = Literal["small", "bulk", "compute"]

_THREADS: dict[Lane, int] = {"small": 6, "bulk": 4, "compute": 1}
_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 5.0  # seconds before an errand that failed is tried again


@dataclass
class _Errand:
    key: Hashable
    lane: Lane
    work: Callable[[], Any]
    then: Callable[[Any], None]
    wanted: Callable[[], bool]
    pause: float = field(default=_FIRST_PAUSE)


class Errands:
    """Sends errands and brings back what they found. Only `call` is for other threads."""

    def __init__(self) -> None:
        self._failing: float | None = None  # since when no call of the transport came back
        self.problem = ""  # why the last call that failed did
        self._asked: dict[Hashable, float] = {}  # small errands under way, and since when
        self._answered = 0.0  # when a call of the transport last came back
        self._lanes = {
            lane: ThreadPoolExecutor(threads, f"swarm-{lane}") for lane, threads in _THREADS.items()
        }
        self._under_way: set[Hashable] = set()
        self._later: list[tuple[float, int, _Errand]] = []  # a heap, by when to try again
        self._order = itertools.count()
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()

    def send(
        self,
        key: Hashable,
        lane: Lane,
        work: Callable[[], Any],
        then: Callable[[Any], None] = lambda found: None,
        wanted: Callable[[], bool] = lambda: True,
    ) -> bool:
        """Do `work` on a thread of that lane, then call `then` with what it returned; while it
        raises TransportError and is `wanted`, try again, more and more seldom.

        One errand of a key at a time: False, and nothing is done, where one is under way.
        """
        if key in self._under_way:
            return False
        self._under_way.add(key)
        self._start(_Errand(key, lane, work, then, wanted))
        return True

    def call(self, what: Callable[[], None]) -> None:
        """Have the peer's thread call that soon; from any thread."""
        self._inbox.put(what)

    def deliver(self, wait: float) -> None:
        """Call back what was done, within `wait` seconds or as soon as there is something."""
        now = time.monotonic()
        while self._later and self._later[0][0] <= now:
            self._start(heapq.heappop(self._later)[2])
        if self._later:
            wait = min(wait, self._later[0][0] - now)
        try:
            self._inbox.get(timeout=max(wait, 0.001))()
            while True:
                self._inbox.get_nowait()()
        except queue.Empty:
            pass

    def under_way(self, key: Hashable) -> bool:
        """Whether an errand of that key has not come back yet."""
        return key in self._under_way

    @property
    def away(self) -> float:
        """For how many seconds the transport could not be reached; 0 while it can."""
        return 0.0 if self._failing is None else time.monotonic() - self._failing

    @property
    def unanswered(self) -> float:
        """For how many seconds small calls have waited, and none came back nor failed: over a link
        that swallows everything, calls take until somebody's patience ends, and that may be long.
        """
        now = time.monotonic()
        return now - max(min(self._asked.values(), default=now), self._answered)

    def close(self) -> None:
        """Wait for what runs now; drop the rest."""
        for pool in self._lanes.values():
            pool.shutdown(wait=True, cancel_futures=True)

    def _start(self, errand: _Errand) -> None:
        if not errand.wanted():
            self._under_way.discard(errand.key)
            return
        if errand.lane == "small":
            self._asked[errand.key] = time.monotonic()
        self._lanes[errand.lane].submit(self._run, errand)

    def _run(self, errand: _Errand) -> None:
        try:
            found = errand.work()
        except TransportError as error:
            problem = str(error)
            self.call(lambda: self._try_again(errand, problem))
        except BaseException as error:  # raised again on the peer's thread, which ends by it
            fault = error
            self.call(lambda: _raise(fault))
        else:
            self.call(lambda: self._came_back(errand, found))

    def _came_back(self, errand: _Errand, found: Any) -> None:
        if errand.lane != "compute":
            self._failing, self._answered = None, time.monotonic()
        self._asked.pop(errand.key, None)
        self._under_way.discard(errand.key)
        errand.then(found)

    def _try_again(self, errand: _Errand, problem: str) -> None:
        self._failing = self._failing or time.monotonic()
        self.problem = problem
        self._asked.pop(errand.key, None)
        heapq.heappush(self._later, (time.monotonic() + errand.pause, next(self._order), errand))
        errand.pause = min(2 * errand.pause, _LONGEST_PAUSE)


def _raise(error: BaseException) -> None:
    raise error
