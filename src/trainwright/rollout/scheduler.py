"""Generation for many who ask at different times: one thread, one model, batches that rows join.

A newcomer's prompt goes through the model alone; then its row joins the others that use the same
adapters, and leaves them when it is finished. Batches with different adapters take turns, a token
each.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

from trainwright.models.adapters import set_active
from trainwright.rollout.engine import Generation, Row

MOST_ROWS = 32  # that go through the model at once; others wait


class ClosedError(Exception):
    """The scheduler was closed before the answer was whole."""


@dataclass(frozen=True)
class Progress:
    """What a step gave a row: the text it settled, the tokens so far, why it ended if it did."""

    text: str
    tokens: int
    reason: str | None


@dataclass(eq=False)
class Ticket:
    """A row in the scheduler's hands. `cancelled` may be set from any thread: it then leaves.

    `deliver` is called in the scheduler's thread, after each token and with what went wrong.
    """

    row: Row
    adapters: tuple[str, ...]
    deliver: Callable[[Progress | Exception], None]
    cancelled: bool = False


@dataclass(eq=False)
class _Batch:
    """Tickets in the order of a generation's rows."""

    adapters: tuple[str, ...]
    generation: Generation
    tickets: list[Ticket]


class Scheduler:
    """Takes rows from any thread, and generates for them in its own until it is closed."""

    def __init__(self, model: Any, most_rows: int = MOST_ROWS) -> None:
        self.model, self.most_rows = model, most_rows
        self._inbox: SimpleQueue[Ticket | None] = SimpleQueue()  # None closes
        self._waiting: deque[Ticket] = deque()
        self._running: list[_Batch] = []
        self._adapters: tuple[str, ...] | None = None  # those that now compute
        self._thread = threading.Thread(target=self._run, name="generation", daemon=True)
        self._thread.start()

    def submit(self, ticket: Ticket) -> None:
        """Generate for a ticket's row, in its turn."""
        self._inbox.put(ticket)

    def close(self) -> None:
        """End all that is under way with ClosedError; may be called from a signal's handler."""
        self._inbox.put(None)

    def join(self) -> None:
        """Wait until the thread has ended, after `close`."""
        self._thread.join()

    def _run(self) -> None:
        while self._receive():
            self._admit()
            for batch in list(self._running):
                self._step(batch)
        for ticket in [*self._waiting, *(t for batch in self._running for t in batch.tickets)]:
            ticket.deliver(ClosedError("the server is shutting down"))

    def _receive(self) -> bool:
        """Take in what has come, waiting where there is nothing else to do; False to end."""
        while not self._inbox.empty() or not (self._waiting or self._running):
            ticket = self._inbox.get()
            if ticket is None:
                return False
            self._waiting.append(ticket)
        return True

    def _admit(self) -> None:
        """Let the one who has waited longest begin, if there is room."""
        while self._waiting and self._waiting[0].cancelled:
            self._waiting.popleft()
        if not self._waiting or sum(len(b.tickets) for b in self._running) >= self.most_rows:
            return
        ticket = self._waiting.popleft()
        new = _Batch(ticket.adapters, Generation(self.model, [ticket.row]), [ticket])
        self._running.append(new)
        self._step(new)
        alike = [batch for batch in self._running if batch.adapters == new.adapters]
        if self.model.pads_left and new in alike and len(alike) > 1:
            self._guarded(new, lambda: self._join(alike[0], new))

    def _join(self, batch: _Batch, new: _Batch) -> None:
        batch.generation.keep(range(len(batch.tickets)), [new.generation])
        batch.tickets += new.tickets
        self._running.remove(new)

    def _step(self, batch: _Batch) -> None:
        """One more token for every row of a batch; those that are done or cancelled leave it."""
        if self._leave(batch):
            self._guarded(batch, lambda: self._forward(batch))
            self._leave(batch)

    def _forward(self, batch: _Batch) -> None:
        if batch.adapters != self._adapters:
            self._adapters = None  # should it fail half-way
            set_active(self.model, batch.adapters)
            self._adapters = batch.adapters
        pieces = batch.generation.step()
        for ticket, text in zip(batch.tickets, pieces, strict=True):
            ticket.deliver(Progress(text, len(ticket.row.tokens), ticket.row.reason))

    def _leave(self, batch: _Batch) -> bool:
        """Let rows go that need no more; whether any stay."""
        if batch not in self._running:
            return False
        tickets = batch.tickets
        stay = [i for i, t in enumerate(tickets) if not t.cancelled and t.row.reason is None]
        if not stay:
            self._running.remove(batch)
        elif len(stay) < len(tickets):
            batch.tickets = [tickets[i] for i in stay]
            self._guarded(batch, lambda: batch.generation.keep(stay))
        return batch in self._running

    def _guarded(self, batch: _Batch, work: Callable[[], None]) -> None:
        """Do `work`; where it fails, the batch's tickets are told and the others go on."""
        try:
            work()
        except Exception as error:  # whatever it is, memory that is short above all
            self._running.remove(batch)
            for ticket in batch.tickets:
                ticket.deliver(error)
