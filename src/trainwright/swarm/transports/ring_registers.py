"""Registers of the ring: `registers` (Paxos) with acceptors on disk and messages over links.

registers/<name>     what was settled, as far as it is known here
ballots/<name>       this peer's state as an acceptor, flushed to disk before it answers
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from threading import Condition, RLock, Thread

from trainwright.files import write_atomically
from trainwright.swarm.transports.keys import checked_key
from trainwright.swarm.transports.registers import (
    Acceptor,
    Ballot,
    Proposal,
    is_quorum,
)
from trainwright.swarm.transports.ring_frames import Header, Link
from trainwright.swarm.transports.ring_links import Links
from trainwright.swarm.transports.ring_server import MOST_BODY
from trainwright.swarm.transports.transport import TransportError

_SETTLING = 10.0  # seconds for which a quorum is asked again
_ASK_AGAIN = 2.0  # seconds after which others are asked again for a register that none of them had


class Registers:
    """Thread-safe; `serve` is what the server calls, the rest is for this peer."""

    def __init__(self, directory: Path, me: str, links: Links) -> None:
        self._settled, self._ballots = directory / "registers", directory / "ballots"
        for folder in (self._settled, self._ballots):
            folder.mkdir(parents=True, exist_ok=True)
        self._me, self._links = me, links
        self._changed = Condition(RLock())
        self._asked: dict[str, float] = {}

    def read(self, register: str) -> bytes | None:
        """What was settled: as it is known here, or else to any of the others."""
        found = self._known(register)
        now = time.monotonic()
        if found is not None or now < self._asked.get(register, 0) + _ASK_AGAIN:
            return found
        self._asked[register] = now
        asked, answered = self._links.live(), list[str]()

        def ask(peer: str) -> None:
            question = {"ask": "register", "register": register}
            with suppress(TransportError, OSError):
                answer, value = self._links.ask(peer, question, most=MOST_BODY)
                if answer.get("settled"):  # on a slow link perhaps too late for who waits below
                    self._learn(register, value)
            with self._changed:
                answered.append(peer)
                self._changed.notify_all()

        def known() -> bool:  # perhaps from whoever settles it just now
            return len(answered) == len(asked) or self._known(register) is not None

        for peer in asked:
            Thread(target=ask, args=(peer,), name="ring-register", daemon=True).start()
        with self._changed:
            self._changed.wait_for(known, _ASK_AGAIN)
        return self._known(register)

    def settle(self, register: str, value: bytes, electorate: tuple[str, ...]) -> bytes:
        """Write it, or read what others have written. Raises TransportError without a quorum."""
        if len(value) > MOST_BODY:
            raise ValueError(f"a register of {len(value):,} bytes, over {MOST_BODY:,}")
        end, number, tries = time.monotonic() + _SETTLING, 1, 0
        while (found := self._known(register)) is None:
            ballot = Ballot(number, self._me)
            found, newest, heard = self._attempt(register, Proposal(electorate, ballot, value))
            if found is not None:
                self._learn(register, found)
                everybody = {*electorate, *self._links.live()} - {self._me}
                self._links.tell(everybody, {"ask": "learn", "register": register}, found)
                break
            if time.monotonic() > end:
                voters = f"{len(heard)} of the last round's {len(electorate)} peers"
                raise TransportError(f"{register} cannot be settled: {voters} answer")
            number, tries = max(newest, number) + 1, tries + 1
            with self._changed:  # proposers that met once must not meet at every try
                pause = random.uniform(0, min(0.05 * 2**tries, 1.0))
                self._changed.wait_for(lambda: self._known(register) is not None, pause)
        return found

    def serve(self, link: Link, header: Header, body: bytes) -> None:
        """Answer another peer."""
        link.send(*self.answer(header, body))

    def answer(self, header: Header, body: bytes) -> tuple[Header, bytes]:
        """Answer as an acceptor, or as one who knows. Raises ValueError, KeyError, TypeError for
        what no peer asks.
        """
        register = checked_key(header["register"])
        with self._changed:
            known = self._known(register)
            if known is not None:
                return {"settled": True}, known
            match header["ask"]:
                case "register":
                    return {}, b""
                case "learn":
                    self._learn(register, body)
                    return {"settled": True}, b""
            before, ballot = self._voter(register), _ballot(header["ballot"])
            if header["ask"] == "prepare":
                after = before.prepare(ballot)
            else:
                after = before.accept(ballot, body)
            if after is None:
                return {"newest": before.promised.number}, b""
            text = json.dumps([after.promised, after.taken]).encode()
            write_atomically(self._file(self._ballots, register), text + b"\n" + after.value)
            return {"yes": True, "taken": before.taken}, before.value

    def _attempt(self, register: str, proposal: Proposal) -> tuple[bytes | None, int, set[str]]:
        """One ballot: what stands in the register if that is known now, the newest ballot's number
        that others know of, and who answered.
        """
        heard, refused, newest = set[str](), set[str](), 0
        for ask in ("prepare", "accept"):
            question = {"ask": ask, "register": register, "ballot": proposal.ballot}
            for voter, answer, value in self._voters(proposal, question):
                heard.add(voter)
                if answer.get("settled"):
                    return value, newest, heard
                if not answer.get("yes"):
                    refused.add(voter)
                    newest = max(newest, int(answer.get("newest", 0)))
                    if not is_quorum(set(proposal.electorate) - refused, proposal.electorate):
                        break
                elif ask == "prepare":
                    proposal = proposal.promised(voter, _ballot(answer["taken"]), value)
                    if proposal.prepared:
                        break
                else:
                    proposal = proposal.voted(voter)
                    if proposal.chosen:
                        return proposal.value, newest, heard
            if not proposal.prepared:
                break
        return None, newest, heard

    def _voters(self, proposal: Proposal, question: Header) -> Iterator[tuple[str, Header, bytes]]:
        """What the electorate answers, this peer first if it is of it."""
        body = proposal.value if question["ask"] == "accept" else b""
        others = [voter for voter in proposal.electorate if voter != self._me]
        answers = self._links.ask_all(others, question, body, MOST_BODY)
        if self._me in proposal.electorate:
            yield self._me, *self.answer(question, body)
        yield from answers

    def _known(self, register: str) -> bytes | None:
        try:
            return self._file(self._settled, register).read_bytes()
        except FileNotFoundError:
            return None

    def _learn(self, register: str, value: bytes) -> None:
        with self._changed:
            write_atomically(self._file(self._settled, register), value)
            self._file(self._ballots, register).unlink(missing_ok=True)  # needed no more
            self._asked.pop(register, None)
            self._changed.notify_all()

    def _voter(self, register: str) -> Acceptor:
        try:
            text, _, value = self._file(self._ballots, register).read_bytes().partition(b"\n")
        except FileNotFoundError:
            return Acceptor()
        promised, taken = json.loads(text)
        return Acceptor(Ballot(*promised), Ballot(*taken), value)

    def _file(self, folder: Path, register: str) -> Path:
        return folder / checked_key(register).replace("/", "+")  # no key has a +


def _ballot(value: object) -> Ballot:
    match value:
        case [int(number), str(proposer)]:
            return Ballot(number, proposer)
    raise ValueError("no ballot")
