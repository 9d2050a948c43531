"""How fast this machine's link to a run's store is: objects of growing size, put and fetched."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

from trainwright.swarm.transports.store import Store
from trainwright.swarm.transports.transport import Transport, TransportError

_KEY = "probe"
_SMALL, _FIRST, _LARGEST = 256, 1 << 14, 1 << 24  # bytes
_LONG_ENOUGH = 0.5  # seconds after which TCP goes at the link's rate, whatever it began with,
_CALLS = 5  # and no less than so many calls
_GROWTH = 4


@dataclass(frozen=True)
class Link:
    """Bytes per second to and from the store, and seconds of a call that moves next to nothing."""

    up: float
    down: float
    call: float

    def __str__(self) -> str:
        rates = f"{_rate(self.up)} up, {_rate(self.down)} down"
        return f"{rates}, {1000 * self.call:.0f} ms a call"


def measure_link(
    transport: Transport, clock: Callable[[], float] = time.perf_counter
) -> Link | None:
    """Measure the link in a few seconds, with an object on this peer's own shelf, gone afterwards.

    A way down that is much faster than the way up is found too slow, never too fast: objects are
    only so large as they go up in about a second.

    None over a ring, where peers have links to each other instead of one to a store; they measure
    those as they go. Raises TransportError while the store is away.
    """
    if not isinstance(transport, Store):
        return None

    def put(size: int) -> float:
        data = os.urandom(size)  # that nothing on the way can make small
        started = clock()
        transport.put(_KEY, data)
        return clock() - started

    def get(size: int) -> float:
        started = clock()
        if transport.get(transport.me, _KEY, size) is None:
            raise TransportError("what was just put into the store is not there")
        return clock() - started

    try:
        call = min(min(put(_SMALL), get(_SMALL)) for _ in range(3))
        enough = max(_LONG_ENOUGH, _CALLS * call)
        before, now = (_SMALL, call, call), (_FIRST, put(_FIRST), get(_FIRST))
        while max(now[1:]) < enough and now[0] < _LARGEST:
            size = now[0] * _GROWTH
            before, now = now, (size, put(size), get(size))
    finally:
        transport.delete(_KEY)
    (less, *quick), (more, *slow) = before, now
    up, down = (
        # What the last growth took: delay and slow start are in both, and so in neither.
        (more - less) / max(long - short, long / 10, 1e-9)
        for short, long in zip(quick, slow, strict=True)
    )
    return Link(up, down, call)


def _rate(bytes_per_s: float) -> str:
    mbit = bytes_per_s * 8 / 1e6
    return f"{mbit:,.0f} Mbit/s" if mbit >= 20 else f"{mbit:.2g} Mbit/s"
