"""Where the trainer's thread and the peer's put down what the other is to have.

The only state that both touch, all of it under one lock.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from trainwright.swarm.layout import put, take
from trainwright.swarm.methods.method import Agreed, Method

_MOST_OUTCOMES = 16  # not taken by the trainer; with more it begins from the newest weights

Wanted = Literal["go on", "contribute", "merge"]


@dataclass(frozen=True)
class Outcome:
    """A round that is over, from `before` to `after`; neither is to be changed.

    included  this peer's contribution is part of it
    failed    nothing was agreed; the weights are the same
    replaced  `after` did not come from `before`: this peer had other weights than most, or was away
              for too long. What it trained since is dropped
    reason    why this peer's contribution was refused, if it was
    """

    round: int
    before: Agreed
    after: Agreed
    included: bool = False
    failed: bool = False
    replaced: bool = False
    reason: str = ""

    def merged(self, method: Method, local: Tensor, sent: Tensor | None) -> Tensor:
        """The trainer's new weights, fp32 [count], from those of now (left as they are) and from
        what it offered for this round: fp32 [fragment], None if it did not offer any.
        """
        if self.replaced:
            return self.after.weights.clone()
        part = method.fragment(self.round)
        values = local.clone()
        known = sent if self.included else None
        merge = method.merge(self.before, self.after, self.round, take(local, part), known)
        put(values, part, merge)
        return values


class Desk:
    """What lies between the two threads. `inner_steps` and `delay` are the method's."""

    def __init__(self, inner_steps: int, delay: int) -> None:
        self.inner_steps, self.delay = inner_steps, delay
        self._changed = threading.Condition()
        self._outcomes: deque[Outcome] = deque()
        self._newest: Agreed | None = None  # once caught up
        self._begun: Outcome | None = None  # of the round before, if it took this peer in
        self._round = 0  # that the trainer works on
        self._offered = -1  # the last round that this peer offered for
        self._hurry = -1
        self._fault: BaseException | None = None
        self._steps, self._stepped, self._step_seconds = 0, time.monotonic(), 0.0
        self.waited = 0.0  # seconds that the trainer waited for outcomes
        self.waiting = False

    # The trainer's side

    def caught_up(self, wait: float | None) -> Agreed | None:
        """The agreed state, once the peer has it."""
        with self._changed:
            self._changed.wait_for(lambda: self._newest or self._fault, wait)
            self._raise()
            return self._newest

    @property
    def round(self) -> int:
        """The round that the trainer works on."""
        with self._changed:
            return self._round

    @property
    def offered(self) -> bool:
        """Whether there is a contribution to the round that the trainer works on."""
        with self._changed:
            return self._offered == self._round

    def wanted(self, steps: int) -> Wanted:
        """See `Peer.wanted`."""
        with self._changed:
            self._raise()
            self._time(steps)
            offered = self._offered == self._round
            if self._outcomes and (not offered or self._outcomes[0].replaced):
                return "merge"
            if offered:
                return "merge" if steps >= self.delay else "go on"
            hurry = self._hurry == self._round and steps > 0
            return "contribute" if hurry or steps >= self.inner_steps else "go on"

    def go_back(self, round: int) -> bool:
        """See `Peer.go_back`."""
        with self._changed:
            begun = self._begun
            if begun is None or begun.round != round:
                return False
            self._outcomes.appendleft(begun)
            self._round = self._offered = round
            return True

    def offer(self, send: Callable[[int], None]) -> bool:
        """Call `send` with the round, if the trainer is not behind and did not offer yet."""
        with self._changed:
            self._raise()
            if self._outcomes or self._offered == self._round:
                return False
            self._offered = self._round
            send(self._round)
            return True

    def outcome(self, wait: float | None) -> Outcome | None:
        """See `Peer.outcome`."""
        started = time.monotonic()
        with self._changed:
            self.waiting = True
            self._changed.wait_for(lambda: self._outcomes or self._fault, wait)
            self.waiting = False
            self.waited += time.monotonic() - started
            self._raise()
            if not self._outcomes:
                return None
            found = self._outcomes.popleft()
            self._round = found.after.round
            if found.replaced:  # perhaps in the same round: what was offered for it is gone
                self._offered = -1
            return found

    # The peer's side

    def begin(self, agreed: Agreed, offered: bool, included: bool = False) -> None:
        """This peer has caught up; `offered`: it has contributed already, before a crash;
        `included`: it did so in the round before, which took it in.
        """
        with self._changed:
            if included:
                self._begun = Outcome(agreed.round - 1, agreed, agreed, included=True)
            self._newest, self._round = agreed, agreed.round
            self._offered = agreed.round if offered else -1
            self._changed.notify_all()

    def deliver(self, outcome: Outcome) -> None:
        """A round is over."""
        with self._changed:
            if self._newest is None:
                return  # still catching up: nobody trains yet
            self._newest = outcome.after
            if outcome.replaced or len(self._outcomes) >= _MOST_OUTCOMES:
                before = self._outcomes[0].before if self._outcomes else outcome.before
                self._outcomes.clear()
                outcome = replace(outcome, before=before, included=False, replaced=True)
            self._outcomes.append(outcome)
            self._changed.notify_all()

    def hurry(self, round: int) -> None:
        """The others wait for this peer's contribution."""
        with self._changed:
            self._hurry = round

    def fail(self, fault: BaseException) -> None:
        """The peer's thread has ended by this, and the trainer is to know."""
        with self._changed:
            self._fault = self._fault or fault
            self._changed.notify_all()

    @property
    def ready(self) -> float | None:
        """Seconds until the trainer will have a contribution; None where that is not known."""
        with self._changed:
            if self._offered == self._round:
                return 0.0
            left = max(self.inner_steps - self._steps, 0)
            return round(left * self._step_seconds, 1) if self._step_seconds else None

    def _time(self, steps: int) -> None:
        now = time.monotonic()
        if steps > self._steps:
            self._step_seconds = (now - self._stepped) / (steps - self._steps)
        self._steps, self._stepped = steps, now

    def _raise(self) -> None:
        if self._fault is not None:
            raise self._fault
