"""What a peer tells people: lines on the terminal, and `swarm.jsonl` in its directory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainwright.swarm.events import Decision
from trainwright.swarm.peer_card import plain
from trainwright.swarm.peer_settle import Settlement

if TYPE_CHECKING:
    from trainwright.swarm.peer_driver import Driver

_LONGEST = 200  # characters of a reason, which may quote a stranger


class Log:
    """Called on the peer's thread."""

    def __init__(self, driver: Driver) -> None:
        self.driver, self.memory, self.say = driver, driver.memory, driver.say

    def name(self, peer: str) -> str:
        """A peer by its own name and the first digits of its id."""
        driver = self.driver
        sight = driver.sights.get(peer)
        card = driver.card if peer == driver.me else sight.card if sight else None
        return f"{card.name} ({peer[:6]})" if card and card.name else peer[:6]

    def round(self, decision: Decision, found: Settlement) -> None:
        """A round is over."""
        round = decision.round
        sent, received = self.driver.shelves.transport.bytes_moved()
        self.memory.log(
            "round",
            round=round,
            peers=[peer for peer, _ in decision.entries],
            proposer=decision.proposer,
            base=found.base,
            losses=found.losses,
            waited=float(f"{self.driver.desk.waited:.3f}"),
            sent=sent,
            received=received,
        )
        if decision.failed:
            self.say(f"round {round} failed: too few contributions; nobody's work is lost")
        for peer, refused in found.refused.items():
            reason = plain(refused.reason, _LONGEST)
            self.memory.log("passed over", round=round, peer=peer, reason=reason)
        for each in found.verdicts:
            self.memory.log(
                "verdict",
                round=round,
                peer=each.peer,
                kind=each.kind,
                what=each.what,
                excludes=each.excludes,
            )
            does = "is excluded" if each.excludes else "is suspected"
            self.say(f"{self.name(each.peer)} {does} ({each.kind}): {each.what}")

    def refused(self, round: int, peer: str, reason: str) -> None:
        """A peer has signed what cannot be a contribution."""
        reason = plain(reason, _LONGEST)
        self.say(f"round {round}: refused what {self.name(peer)} sent: {reason}")
        self.memory.log("refused", round=round, peer=peer, reason=reason)

    def took_up(self, why: str, before: int, now: int) -> None:
        """This peer's state was replaced."""
        self.say(f"{why}: went from round {before} to {now}")
        self.memory.log("took up", why=why, before=before, now=now)
