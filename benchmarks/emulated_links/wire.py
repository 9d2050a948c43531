"""One direction of a link: when does a packet that is sent now arrive, if it does."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random


@dataclass
class Wire:
    """A wire with a queue before it. Packets go over it one after the other, in order.

    `bytes_per_s` is 0 for a wire without limit, `delay` seconds on the way, `loss` the share of
    packets that get lost, `queue` the seconds that may wait before the wire (more are dropped, as
    a router does, which tells TCP to slow down).
    """

    bytes_per_s: float
    delay: float
    loss: float
    random: Random
    queue: float = 0.1
    cut: bool = False  # nothing arrives any more, and nobody is told
    _free: float = field(default=0.0, init=False)

    def send(self, now: float, size: int) -> float | None:
        """When a packet of so many bytes arrives; None if it is lost."""
        begin = max(now, self._free)
        if self.cut or begin - now > self.queue:
            return None
        self._free = begin + (size / self.bytes_per_s if self.bytes_per_s else 0.0)
        if self.loss and self.random.random() < self.loss:
            return None  # after it took its time on the wire
        return self._free + self.delay
