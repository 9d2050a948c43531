"""The traffic meter: bytes, calls and seconds of a step's collectives, by dimension.

Bytes are what this rank sends by the ring algorithms (`comm.calls`). Seconds run from a call to
its end, for a message between two ranks while this one waits for it; those of asynchronous calls
overlap each other and the computation, so they may exceed the step's. On CUDA they are of the
stream.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from types import TracebackType

import torch

from trainwright.comm.calls import Call
from trainwright.comm.hooks import listen, stop_listening


@dataclass
class Traffic:
    """What one dimension moved."""

    bytes: int = 0
    seconds: float = 0.0
    calls: int = 0
    bytes_by_collective: dict[str, int] = field(default_factory=dict)

    def record(self) -> dict[str, float | int]:
        """As it stands in the metrics."""
        return {"bytes": self.bytes, "seconds": round(self.seconds, 6), "calls": self.calls}


class Meter:
    """Counts while it is switched on: `with Meter() as meter`, or `start` and `stop`.

    Dimensions are the names that groups have (`comm.groups`).
    """

    def __init__(self) -> None:
        self._totals: dict[str, Traffic] = {}
        self._events: list[tuple[Call, torch.cuda.Event, torch.cuda.Event]] = []
        self._lock = threading.Lock()  # asynchronous calls end on other threads
        self._running = False

    def start(self) -> None:
        """Count from now on."""
        if not self._running:
            listen(self)
            self._running = True

    def stop(self) -> None:
        """Count no more; totals stay."""
        if self._running:
            stop_listening(self)
            self._running = False

    def __enter__(self) -> Meter:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def step(self) -> dict[str, Traffic]:
        """What was counted since the last call of this, by dimension, the largest first."""
        with self._lock:
            events, self._events = self._events, []
        for call, start, end in events:
            end.synchronize()
            self.took(call, start.elapsed_time(end) / 1e3)
        with self._lock:
            totals, self._totals = self._totals, {}
        return dict(sorted(totals.items(), key=lambda item: -item[1].bytes))

    def began(self, call: Call) -> None:
        """Book a call's bytes."""
        with self._lock:
            traffic = self._totals.setdefault(call.group, Traffic())
            traffic.calls += 1
            traffic.bytes += call.sent
            by = traffic.bytes_by_collective
            by[call.collective] = by.get(call.collective, 0) + call.sent

    def took(self, call: Call, seconds: float) -> None:
        """Book a call's time."""
        with self._lock:
            self._totals.setdefault(call.group, Traffic()).seconds += seconds

    def took_on_device(self, call: Call, start: torch.cuda.Event, end: torch.cuda.Event) -> None:
        """Book a call's time once the stream has come so far."""
        with self._lock:
            self._events.append((call, start, end))
