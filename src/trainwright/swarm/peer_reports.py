"""What peers tell of each other's contributions: this peer's own report of a round, and others'.

The state and calls are the peer's thread's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainwright.swarm.ledger import MOST_REFUSED
from trainwright.swarm.message import Message, write_message
from trainwright.swarm.methods.method import Agreed, Received
from trainwright.swarm.peer_card import plain
from trainwright.swarm.peer_errands import Errands
from trainwright.swarm.peer_shelves import Shelves
from trainwright.swarm.scores import Report, Score, write_report

_KEPT = 16  # rounds for which reports are remembered
_MOST_VERSIONS = 3  # of a peer's report of a round that are fetched
_MOST_ARRIVALS = 1000  # that a report tells of: of strangers there is no end


@dataclass(frozen=True)
class Trial:
    """Contributions to a round that this peer is to try on data, and the state before it."""

    agreed: Agreed = field(repr=False)
    received: Sequence[Received] = field(repr=False)
    rate: float

    @property
    def round(self) -> int:
        """The contributions' round."""
        return self.agreed.round


class Reports:
    """Reports by digest. `heard` is called once with each."""

    def __init__(
        self, shelves: Shelves, errands: Errands, heard: Callable[[Message], None]
    ) -> None:
        self.shelves, self.errands, self.heard = shelves, errands, heard
        self.digest, self.round = "", 0  # of this peer's newest, once it is on its shelf
        self._here: dict[str, tuple[int, bytes, Message]] = {}
        self._arrivals: dict[int, dict[str, tuple[str, int]]] = {}
        self._refused: dict[int, dict[str, str]] = {}
        self._listed: dict[int, dict[str, set[str]]] = {}

    def arrived(self, round: int, peer: str, digest: str, look: int) -> None:
        """A contribution was seen on its shelf in that look at the shelves, if not before. Who puts
        another one there comes later.
        """
        seen = self._arrivals.setdefault(round, {})
        if peer not in seen and len(seen) >= _MOST_ARRIVALS:
            return
        if peer not in seen or seen[peer][0] != digest:
            seen[peer] = digest, look

    def refused(self, round: int, peer: str, reason: str) -> None:
        """A peer has signed what proves itself to be no contribution."""
        known = self._refused.setdefault(round, {})
        if len(known) < MOST_REFUSED:
            known[peer] = plain(reason, 200)

    def tell(self, round: int, scores: Mapping[str, Score]) -> None:
        """Publish what this peer found of a round's contributions, if that is anything."""
        seen, refused = self._arrivals.get(round, {}), self._refused.get(round, {})
        arrivals = {peer: look for peer, (_, look) in seen.items()}
        report = Report(round, scores, arrivals, refused)
        if not (scores or arrivals or refused):
            return
        shelves = self.shelves
        data = write_message(
            "scores", shelves.run, round, write_report(report), [], shelves.identity
        )

        def told(_: object) -> None:
            message = shelves.read_report(data, shelves.me)
            self.digest, self.round = message.digest, round
            self._keep(round, data, message)

        self.errands.send(("tell", round), "small", lambda: shelves.put_report(round, data), told)

    def listed(self, round: int, peer: str, digest: str) -> None:
        """A card tells of that report of a round's contributions: get it, if it is no further one
        of too many.
        """
        known = self._listed.setdefault(round, {}).setdefault(peer, set())
        if digest in known or len(known) < _MOST_VERSIONS:
            known.add(digest)
            self.fetch(round + 1, peer, digest)

    def fetch(
        self,
        round: int,
        peer: str,
        digest: str,
        others: Iterable[str] = (),
        missing: Callable[[], None] = lambda: None,
    ) -> None:
        """Get a report that was made shortly before `round`, if it is not here."""
        if self.is_of(digest, peer):
            return

        def came(found: tuple[bytes, Message] | None) -> None:
            if found is None:
                missing()
            else:
                self._keep(round, *found)

        key, listed = ("report", peer, digest), tuple(others)
        self.errands.send(
            key, "small", lambda: self.shelves.report(round, peer, digest, listed), came
        )

    def bodies(self, entries: Iterable[tuple[str, str]]) -> dict[str, Any]:
        """What the decided reports say, by peer; all of them are here."""
        return {peer: self._here[digest][2].body for peer, digest in entries}

    def is_of(self, digest: str, peer: str) -> bool:
        """Whether that report is here, and that peer's: a decision may name it as another's."""
        return digest in self._here and self._here[digest][2].peer == peer

    def data(self, digest: str) -> bytes | None:
        """The bytes of a report, for somebody who cannot get it."""
        return self._here[digest][1] if digest in self._here else None

    def forget(self, round: int) -> None:
        """Drop what is older than any round that still matters in this one."""
        for seen in (self._arrivals, self._refused, self._listed):
            for old in [each for each in seen if each < round - _KEPT]:
                del seen[old]
        self._here = {d: each for d, each in self._here.items() if each[0] >= round - _KEPT}

    def _keep(self, round: int, data: bytes, message: Message) -> None:
        if message.digest not in self._here:
            self._here[message.digest] = (round, data, message)
            self.heard(message)
