"""Paxos: never two values in a register, in every order of messages, and after any crash."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations, product

import pytest

from trainwright.swarm.transports.registers import (
    NO_BALLOT,
    Acceptor,
    Ballot,
    Proposal,
    is_quorum,
)

Vote = tuple[str, int, bytes]  # voter, whose proposal, what it took


@dataclass(frozen=True)
class World:
    """Everything that was ever sent stays under way: it may come late, twice, or never."""

    acceptors: tuple[tuple[str, Acceptor], ...]
    proposals: tuple[Proposal, ...]
    promises: frozenset[tuple[int, str, Ballot, bytes]] = frozenset()
    votes: frozenset[Vote] = frozenset()

    @classmethod
    def of(cls, voters: str, ballots: list[Ballot]) -> World:
        electorate = tuple(voters)
        values = (f"value {at}".encode() for at in range(len(ballots)))
        proposals = tuple(map(Proposal, [electorate] * len(ballots), ballots, values))
        return cls(tuple((voter, Acceptor()) for voter in electorate), proposals)

    def chosen(self) -> set[bytes]:
        """What stands in the register, by the votes that were ever cast."""
        found = set()
        for at, proposal in enumerate(self.proposals):
            for value in {value for _, whose, value in self.votes if whose == at}:
                voters = {
                    voter for voter, whose, what in self.votes if (whose, what) == (at, value)
                }
                if is_quorum(voters, proposal.electorate):
                    found.add(value)
        return found

    def next(self) -> Iterator[World]:
        """Every world that one message makes of it."""
        for at, proposal in enumerate(self.proposals):
            for place, (voter, acceptor) in enumerate(self.acceptors):
                after = acceptor.prepare(proposal.ballot)
                if after is not None:
                    promise = (at, voter, acceptor.taken, acceptor.value)
                    yield replace(
                        self,
                        acceptors=self._with(place, after),
                        promises=self.promises | {promise},
                    )
                if proposal.prepared:
                    after = acceptor.accept(proposal.ballot, proposal.value)
                    if after is not None and after != acceptor:
                        vote = (voter, at, proposal.value)
                        acceptors = self._with(place, after)
                        yield replace(self, acceptors=acceptors, votes=self.votes | {vote})
        for at, voter, taken, value in self.promises:
            after = self.proposals[at].promised(voter, taken, value)
            if after != self.proposals[at]:
                yield replace(
                    self, proposals=(*self.proposals[:at], after, *self.proposals[at + 1 :])
                )

    def _with(self, place: int, acceptor: Acceptor) -> tuple[tuple[str, Acceptor], ...]:
        name = self.acceptors[place][0]
        return (*self.acceptors[:place], (name, acceptor), *self.acceptors[place + 1 :])


def explore(start: World) -> tuple[int, set[bytes]]:
    """How many worlds can come of it, and all values that are chosen in some; safe in each."""
    seen, left, chosen = {start}, [start], set[bytes]()
    while left:
        world = left.pop()
        now = world.chosen()
        assert len(now) < 2, world
        chosen |= now
        new = set(world.next()) - seen
        seen |= new
        left += new
    return len(seen), chosen


def ballots(*numbers: int) -> list[Ballot]:
    return [Ballot(number, f"p{at}") for at, number in enumerate(numbers)]


@pytest.mark.parametrize(("voters", "numbers"), [("a", (1, 1)), ("ab", (1, 2)), ("abc", (1, 2))])
def test_every_order_of_messages_is_safe(voters, numbers):
    worlds, chosen = explore(World.of(voters, ballots(*numbers)))
    assert chosen == {b"value 0", b"value 1"}  # either can be first: nothing was ruled out
    assert worlds > 10


@pytest.mark.prove
@pytest.mark.parametrize(("voters", "numbers"), [("ab", (1, 2, 3)), ("abcd", (1, 2))])
def test_every_order_of_more_messages_is_safe(voters, numbers):
    _, chosen = explore(World.of(voters, ballots(*numbers)))
    assert len(chosen) == len(numbers)


class Forgetful(Acceptor):
    """Breaks its promise."""

    def accept(self, ballot, value):
        return Forgetful(self.promised, ballot, value)

    def prepare(self, ballot):
        return Forgetful(ballot, self.taken, self.value) if ballot > self.promised else None


def test_the_search_finds_a_broken_promise():
    start = World.of("abc", ballots(1, 2))
    start = replace(start, acceptors=tuple((name, Forgetful()) for name, _ in start.acceptors))
    with pytest.raises(AssertionError):
        explore(start)


def test_a_ballot_used_again_after_a_crash_is_safe():
    _, chosen = explore(World.of("abc", [Ballot(1, "p"), Ballot(1, "p")]))
    assert chosen == {b"value 0", b"value 1"}


class Hasty(Acceptor):
    """Promises the same ballot twice."""

    def prepare(self, ballot):
        return Hasty(ballot, self.taken, self.value) if ballot >= self.promised else None

    def accept(self, ballot, value):
        return Hasty(ballot, ballot, value) if ballot >= self.promised else None


def test_the_search_finds_a_promise_given_twice():
    start = World.of("abc", [Ballot(1, "p"), Ballot(1, "p")])
    start = replace(start, acceptors=tuple((name, Hasty()) for name, _ in start.acceptors))
    with pytest.raises(AssertionError):
        explore(start)


def test_any_two_quorums_meet_and_half_with_the_first_is_one():
    for size in range(1, 8):
        electorate = tuple("abcdefg"[:size])
        sets = [set(voters) for n in range(size + 1) for voters in combinations(electorate, n)]
        quorums = [voters for voters in sets if is_quorum(voters, electorate)]
        assert all(a & b for a, b in product(quorums, quorums))
        # None is left out that could be one: of a set and its complement, exactly one decides.
        assert len(quorums) * 2 == len(sets)
    assert is_quorum({"a", "c"}, tuple("abcd"))
    assert not is_quorum({"b", "c"}, tuple("abcd"))
    assert not is_quorum({"x", "y", "z"}, tuple("abc"))  # strangers do not count


def run_at_random(seed: int, steps: int) -> int:
    """Proposers that come, stop and come back; messages lost, late, doubled; voters away for a
    while, with what they had on disk. How many proposals were chosen.
    """
    draw = random.Random(seed)
    voters = tuple("abcdefg"[: draw.randint(1, 7)])
    acceptors = {voter: Acceptor() for voter in voters}
    proposals, sent = list[Proposal](), list[tuple]()
    votes, stands = dict[tuple[int, bytes], set[str]](), set[bytes]()

    def propose(number: int) -> None:
        ballot = Ballot(number, f"p{draw.randint(0, 2)}")  # maybe one that it used before
        proposals.append(Proposal(voters, ballot, f"value {len(proposals)}".encode()))
        sent.extend(("prepare", len(proposals) - 1, voter) for voter in voters)

    def deliver(message: tuple) -> None:
        kind, at, voter, *rest = message
        match kind:
            case "prepare":
                before = acceptors[voter]
                after = before.prepare(proposals[at].ballot)
                if after is not None:
                    acceptors[voter] = after
                    sent.append(("promise", at, voter, before.taken, before.value))
            case "promise":
                was = proposals[at]
                proposals[at] = was.promised(voter, *rest)
                if proposals[at].prepared and not was.prepared:
                    sent.extend(("accept", at, each, proposals[at].value) for each in voters)
            case "accept":
                after = acceptors[voter].accept(proposals[at].ballot, *rest)
                if after is not None:
                    acceptors[voter] = after
                    voted = votes.setdefault((at, *rest), set())
                    voted.add(voter)
                    if is_quorum(voted, voters):
                        stands.update(rest)
                    sent.append(("vote", at, voter))
            case "vote":
                proposals[at] = proposals[at].voted(voter)
                if proposals[at].chosen:
                    assert proposals[at].value in stands

    away = set[str]()
    for _ in range(steps):
        if not sent or draw.random() < 0.03:
            propose(draw.randint(1, 4))
        if draw.random() < 0.05:
            away ^= {draw.choice(voters)}
        message = draw.choice(sent)
        if draw.random() < 0.7:
            sent.remove(message)  # else it comes once more, some time
        if message[2] not in away and draw.random() < 0.9:
            deliver(message)
        assert len(stands) < 2, (seed, stands)
    # When all is calm, one more proposer gets through, and finds what stands already.
    propose(9)
    last = len(proposals) - 1
    while calm := [message for message in sent if message[1] == last]:
        for message in calm:
            sent.remove(message)
            deliver(message)
    assert proposals[last].chosen and len(stands) == 1, seed
    return len({at for at, _ in votes})


def test_random_crashes_delays_and_rivals_are_safe_and_end():
    assert sum(run_at_random(seed, 300) for seed in range(150)) > 300


@pytest.mark.prove
def test_many_more_random_runs_are_safe_and_end():
    for seed in range(20_000):
        run_at_random(seed, 400)


def test_nothing_was_taken_says_no_ballot():
    promised = Acceptor().prepare(Ballot(1, "p"))
    assert promised == Acceptor(Ballot(1, "p"), NO_BALLOT, b"")
    assert promised.prepare(Ballot(1, "p")) is None
