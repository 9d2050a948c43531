"""What peers do for those who come after: snapshots, copies of what somebody lacks, and tidying up.

Of all peers one writes each snapshot, so that bytes stay few: those of the last round take turns,
and where a snapshot did not come, the next two have the next turn, then the next three.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from contextlib import suppress

from trainwright.swarm.peer_card import Card
from trainwright.swarm.peer_errands import Errands
from trainwright.swarm.peer_memory import Memory, State
from trainwright.swarm.peer_reports import Reports
from trainwright.swarm.peer_shelves import SNAPSHOT, Shelves

_SECONDS = 20.0  # between two standings
_MOST_ROUNDS, _AT_ONCE = 1000, 100  # on a shelf, which holds only so much; cleaned together
_COPY = re.compile(r"([0-9]{1,15})/([0-9a-f]{64})")  # a round, and what it decided
_REACH = 4  # snapshots ago is the oldest round of which anything is put up


class Upkeep:
    """State and calls are the peer's thread's. `every` are the rounds between two snapshots."""

    def __init__(
        self, shelves: Shelves, memory: Memory, errands: Errands, reports: Reports, every: int
    ) -> None:
        self.shelves, self.memory, self.errands, self.reports = shelves, memory, errands, reports
        self.every = every
        self.snapshot = -1  # the newest on this peer's shelf
        self._rounds = {0}  # of all snapshots that were seen or told of
        self._cleaned = 0
        self._standings_due = 0.0

    def after_round(self, state: State, cards: Mapping[str, Card]) -> None:
        """A round is over: save, write a snapshot if it is this peer's turn, and tidy up."""
        now = state.agreed.round
        told = {card.snapshot for card in cards.values()}
        self._rounds |= {each for each in told if 0 <= each <= now and each % self.every == 0}
        self.save(state)
        if now % self.every == 0 and self.shelves.me in self._writers(state):
            self.write_snapshot(state)
        needed = sorted(self._rounds)[-2:][0]  # joiners may have begun with the one before the last
        least = max(needed, now - now % _AT_ONCE - _MOST_ROUNDS)
        if least > self._cleaned:
            self._cleaned = least
            self.snapshot = self.snapshot if self.snapshot >= needed else -1
            self.errands.send("clean", "small", lambda: self.shelves.clean(least, needed))
            self.errands.send("forget", "compute", lambda: self.memory.forget(needed, needed))
        self.reports.forget(now)
        if state.ledger.standing and time.monotonic() >= self._standings_due:
            self._standings_due = time.monotonic() + _SECONDS
            work = lambda: self.shelves.put_standings(now, state.ledger)  # noqa: E731
            self.errands.send("standings", "small", work)

    def save(self, state: State) -> None:
        """Make the state durable, unless writing would take too much of the time."""
        if self.memory.due("state"):
            self.errands.send("save", "compute", lambda: self.memory.save(state))

    def write_snapshot(self, state: State) -> None:
        """Publish this state."""
        round = state.agreed.round

        def written(_: object) -> None:
            self.snapshot = max(self.snapshot, round)
            self._rounds.add(round)

        work = lambda: self.shelves.put_snapshot(state.agreed, state.ledger)  # noqa: E731
        self.errands.send("snapshot", "bulk", work, written)

    def serve(self, state: State, peer: str, card: Card, cards: Mapping[str, Card]) -> None:
        """Put up what a peer wants and cannot get, if it is this one's turn of those who can: with
        every card it is another's, for some of them may not have it, or not do it.
        """
        excluded = state.ledger.excluded | {peer}
        able = sorted(
            each
            for each, seen in cards.items()
            if seen.active and each not in excluded and not seen.wants
        )
        if not able or able[card.sequence % len(able)] != self.shelves.me:
            return
        for want in card.wants:
            if want == SNAPSHOT:
                if self.snapshot < state.agreed.round - min(self.every, _MOST_ROUNDS) // 2:
                    self.write_snapshot(state)
                continue
            if (found := _COPY.fullmatch(want)) is None:
                continue
            round, digest = int(found[1]), found[2]
            if 0 <= state.agreed.round - round <= _REACH * self.every:  # later `clean` gets there
                data = self.reports.data(digest) or self.memory.contribution(round, digest)
                if data is not None:
                    self._copy(round, digest, data)

    def _copy(self, round: int, digest: str, data: bytes) -> None:
        def put() -> None:
            with suppress(ValueError):  # a shelf that takes no more objects
                self.shelves.put_copy(round, digest, data)

        self.errands.send(("copy", digest), "bulk", put)

    def _writers(self, state: State) -> list[str]:
        """Whose turn it is: of the last round's peers, beginning with another one each time."""
        peers, turn = sorted(state.electorate), state.agreed.round // self.every
        if not peers:
            return []
        missed = (state.agreed.round - max(self._rounds)) // self.every
        first = turn % len(peers)
        return (peers[first:] + peers[:first])[: max(1, missed)]
