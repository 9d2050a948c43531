"""`swarm.rounds` event by event: what a peer does, and what it leaves."""

from __future__ import annotations

import copy

import pytest

from trainwright.swarm.events import (
    Advance,
    Advanced,
    Arrived,
    CardSeen,
    CatchUp,
    Decision,
    Event,
    Fetch,
    Heal,
    Hurry,
    Missing,
    Offered,
    Propose,
    ReportArrived,
    Rules,
    Settled,
    Wake,
)
from trainwright.swarm.rounds import FAR, begin, tick, unread
from trainwright.swarm.rounds_state import Rounds

RULES = Rules(quorum=2, grace=10.0, deadline=100.0, silence=30.0)
ALL = ("a", "b", "c", "d")
START = 1000.0  # of this peer's clock


class Watched:
    """Peer `a` in round 5 after one of `electorate`, and a clock that is moved by hand."""

    def __init__(
        self, electorate: tuple[str, ...] = ALL, rules: Rules = RULES, excluded: str = ""
    ) -> None:
        self.now, self.sequence = START, 0
        advanced = Advanced(5, "base", electorate, frozenset(excluded))
        self.state = begin("a", rules, advanced, self.now)
        self.wants: list[object] = []

    def see(self, *events: Event) -> list[object]:
        """What it wants after these."""
        for event in events:
            kept = copy.deepcopy(self.state)
            state, wants = tick(self.state, event, self.now)
            assert kept == self.state, "a state was changed in place"
            assert tick(self.state, event, self.now) == (state, wants), "it is not a function"
            self.state, self.wants = state, wants
        return self.wants

    def card(
        self, peer: str, round: int = 5, base: str = "base", active: bool = True
    ) -> list[object]:
        self.sequence += 1
        return self.see(CardSeen(peer, self.sequence, round, base, active))

    def cards(self, peers: str, round: int = 5, base: str = "base") -> list[object]:
        for peer in peers:
            self.card(peer, round, base)
        return self.wants

    def later(self, seconds: float, peers: str = "") -> list[object]:
        """Time goes by, looked at every second; these peers go on writing cards."""
        until = self.now + seconds
        while self.now < until:
            self.now = min(until, self.now + 1.0)
            for peer in peers:
                card = self.state.cards[peer]
                self.card(peer, card.round, card.base, card.active)
            self.see(Wake())
        return self.wants

    def arrive(self, peers: str, reason: str = "") -> list[object]:
        return self.see(*(Arrived(5, peer, f"{peer}5", reason) for peer in peers))

    def decide(self, peers: str, proposer: str = "b", attempt: int = 0) -> list[object]:
        return self.see(Settled(5, attempt, decision(peers, proposer)))


def decision(peers: str, proposer: str = "b") -> Decision:
    return Decision(5, proposer, tuple((peer, f"{peer}5") for peer in peers))


def propose(peers: str, attempt: int = 0) -> Propose:
    return Propose(attempt, decision(peers, "a"))


OWN = Offered(5, "a5")

# Proposing


def test_proposes_as_soon_as_all_are_in_sorted_by_peer() -> None:
    a = Watched()
    a.cards("bcd")
    a.see(OWN)
    assert a.arrive("db") == []
    assert a.arrive("c") == [propose("abcd")]
    assert a.later(3, "bcd") == [propose("abcd")], "it asks again until something is settled"


def test_waits_for_grace_after_the_quorum_and_no_longer() -> None:
    a = Watched()
    a.cards("bcd")
    a.see(OWN)
    a.later(20, "bcd")
    a.arrive("b")
    assert a.later(9.5, "bcd") == []
    assert a.later(0.5, "bcd") == [propose("ab")]


def test_round_under_the_quorum_fails_at_the_deadline() -> None:
    a = Watched()
    a.cards("bcd")
    a.see(OWN)
    assert a.later(99, "bcd") == []
    assert a.later(1, "bcd") == [propose("")]
    failed = decision("", "a")
    assert a.see(Settled(5, 0, failed)) == [Advance(failed)]
    assert a.see(Advanced(6, "base", ALL)) == []
    assert a.state.began == a.now


def test_peer_alone_goes_on_from_deadline_to_deadline() -> None:
    a = Watched()
    for round in range(5, 9):
        a.see(Offered(round, "mine"))
        assert a.later(99) == []
        failed = Decision(round, "a", ())
        assert a.later(1) == [Propose(0, failed)]
        assert a.see(Settled(round, 0, failed)) == [Advance(failed)]
        a.see(Advanced(round + 1, "base", ALL))


def test_its_own_contribution_is_waited_for_like_others() -> None:
    a = Watched()
    a.cards("bcd")
    assert a.arrive("bcd") == [Hurry(5)]
    assert a.later(9, "bcd") == [Hurry(5)]
    assert a.see(OWN) == [propose("abcd")]
    b = Watched()
    b.cards("bcd")
    b.arrive("bcd")
    assert propose("bcd") in b.later(10, "bcd"), "still uploading when grace is over"


def test_slow_peers_hurry_once_the_quorum_is_complete_or_half_the_deadline_over() -> None:
    a = Watched()
    a.cards("bcd")
    assert a.arrive("b") == []
    assert a.arrive("c") == [Hurry(5)]
    b = Watched()
    b.cards("bcd")
    assert b.later(49, "bcd") == []
    assert b.later(1, "bcd") == [Hurry(5)]
    assert b.see(OWN) == []


def test_validator_waits_for_the_others_and_nobody_for_it() -> None:
    validator = Watched()
    validator.card("a", active=False)
    validator.cards("bcd")
    validator.arrive("bc")
    assert validator.later(50, "d") == [propose("bc")], "no hurry: it does not contribute"
    peer = Watched(electorate=("a", "b", "v"))
    peer.cards("b")
    peer.card("v", active=False)
    peer.see(OWN)
    assert peer.arrive("b") == [propose("ab")]


def test_refused_contributions_are_neither_proposed_nor_waited_for() -> None:
    a = Watched()
    a.cards("bcd")
    a.see(OWN)
    a.arrive("bc")
    assert a.arrive("d", "not finite") == [propose("abc")]


def test_newest_contribution_of_a_peer_counts() -> None:
    a = Watched(electorate=("a", "b"))
    a.cards("b")
    a.see(OWN)
    a.arrive("b")
    again = a.see(Arrived(5, "b", "again"))
    assert again == [Propose(0, Decision(5, "a", (("a", "a5"), ("b", "again"))))]


def test_contributions_to_other_rounds_are_ignored() -> None:
    a = Watched(electorate=("a", "b"))
    a.cards("b")
    a.see(OWN)
    assert a.see(Arrived(6, "b", "b6"), Arrived(4, "b", "b4"), Offered(6, "a6")) == []


def test_excluded_peers_are_nobody() -> None:
    a = Watched(excluded="d")
    a.cards("bcd", base="base")
    a.see(OWN)
    a.arrive("bd")
    assert a.arrive("c") == [propose("abc")]
    barred = Watched(excluded="a")
    barred.cards("bcd")
    assert barred.arrive("bcd") == []
    assert barred.later(200, "bcd") == []


# Who is expected


def test_nobody_waits_for_a_card_that_stays_the_same() -> None:
    a = Watched(rules=Rules(2, 1000.0, 2000.0, 30.0))
    a.cards("bcd")
    a.see(OWN)
    a.arrive("bc")
    assert a.later(30) == []
    assert a.later(1) == [propose("abc")]


def test_nobody_waits_for_who_came_in_mid_round_but_it_counts() -> None:
    a = Watched(electorate=("a", "b", "c"))
    a.cards("bc")
    a.later(20, "bc")
    a.card("d")
    a.see(OWN)
    a.arrive("b")
    assert a.arrive("c") == [propose("abc")]
    assert a.arrive("d") == [propose("abcd")]
    a.decide("abc")
    a.see(Advanced(6, "next", ("a", "b", "c")))
    a.cards("bcd", 6, "next")
    a.see(Offered(6, "a6"), Arrived(6, "b", "b6"))
    assert a.see(Arrived(6, "c", "c6")) == [], "in the next round it is one of them"


def test_at_the_start_of_a_run_all_that_are_there_are_expected() -> None:
    a = Watched(electorate=())
    a.later(20)
    a.cards("bcd")
    a.see(OWN)
    assert a.arrive("bc") == []
    assert a.arrive("d") == [propose("abcd")]


@pytest.mark.parametrize(
    ("round", "base", "expected"),
    [(5, "base", True), (4, "old", True), (3, "old", False), (6, "new", False), (5, "x", False)],
)
def test_expected_are_those_that_work_on_this_round_or_are_about_to(
    round: int, base: str, expected: bool
) -> None:
    a = Watched()
    a.cards("bc")
    a.card("d", round, base)
    a.see(OWN)
    assert a.arrive("bc") == ([] if expected else [propose("abc")])


# What was settled


def test_first_decision_stands_and_what_comes_late_changes_nothing() -> None:
    a = Watched()
    a.arrive("bcd")
    a.decide("bc")
    assert a.wants == [Advance(decision("bc"))]
    assert unread(a.state, a.now) is None
    assert a.decide("bcd", attempt=1) == [Advance(decision("bc"))]
    assert a.see(Settled(4, 0, None), Settled(6, 0, None)) == [Advance(decision("bc"))]


def test_what_is_no_decision_is_passed_over_for_the_next_register() -> None:
    a = Watched(electorate=("a", "b"))
    a.cards("b")
    a.see(OWN)
    a.arrive("b")
    assert unread(a.state, a.now) == 0
    assert a.see(Settled(5, 0, None)) == [propose("ab", attempt=1)]
    assert unread(a.state, a.now) == 1
    assert a.see(Settled(5, 0, decision("ab"))) == [propose("ab", attempt=1)], "read already"
    assert a.decide("ab", attempt=1) == [Advance(decision("ab"))]


def test_fetches_what_was_decided_before_it_advances() -> None:
    a = Watched()
    a.arrive("b")
    decided = Decision(5, "b", (("b", "b5"), ("c", "c5"), ("d", "d5")), (("c", "scores"),))
    lacks = [Fetch(5, "c", "c5"), Fetch(5, "d", "d5"), Fetch(5, "c", "scores", True)]
    assert a.see(Settled(5, 0, decided)) == lacks
    a.see(Arrived(5, "c", "c5", "too long"), ReportArrived("c", "scores"))
    assert a.wants == [Fetch(5, "d", "d5")], "what all refuse is here like the rest"
    assert a.see(Arrived(5, "d", "another")) == [Fetch(5, "d", "d5")]
    assert a.arrive("d") == [Advance(decided)]


def test_reports_of_scores_are_taken_in_once_the_newest_of_each() -> None:
    a = Watched(electorate=("a", "b"), excluded="x")
    a.cards("b")
    a.see(ReportArrived("b", "old"), ReportArrived("b", "new"), ReportArrived("c", "c"))
    a.see(ReportArrived("x", "x"), OWN)
    (wanted,) = a.arrive("b")
    assert isinstance(wanted, Propose)
    assert wanted.decision.reports == (("b", "new"), ("c", "c"))
    taken = Decision(5, "b", wanted.decision.entries, (("c", "c"),))
    a.see(Settled(5, 0, taken))
    a.see(Advanced(6, "six", ("a", "b"), frozenset("x")), ReportArrived("d", "d"))

    def proposed(round: int) -> tuple[tuple[str, str], ...]:
        (wanted,) = a.see(Offered(round, "mine"), Arrived(round, "b", "theirs"))
        assert isinstance(wanted, Propose)
        return wanted.decision.reports

    a.card("b", 6, "six")
    assert proposed(6) == (("b", "new"), ("d", "d"))
    a.see(Settled(6, 0, Decision(6, "b", (("a", "mine"), ("b", "theirs")))))
    a.see(Advanced(7, "seven", ("a", "b")))
    a.card("b", 7, "seven")
    assert proposed(7) == (("d", "d"),), "what nobody took in for a round is let go"


# Behind


def test_peer_that_is_behind_reads_and_does_not_propose() -> None:
    a = Watched()
    a.cards("bcd")
    a.arrive("bcd")
    a.cards("bcd", 6, "six")
    assert a.wants == []
    assert unread(a.state, a.now) == 0
    assert a.decide("bcd") == [Advance(decision("bcd"))]


def test_one_card_that_is_ahead_stops_nobody() -> None:
    a = Watched()
    a.cards("bcd")
    a.card("d", 1_000_000, "far")
    a.see(OWN)
    assert a.arrive("bc") == [propose("abc")]
    two = Watched(electorate=("a", "d"))
    two.card("d", 1_000_000, "far")
    two.see(OWN)
    assert two.later(100, "d") == [propose("")], "nor one of two"


def test_names_that_took_no_part_in_the_last_round_are_not_believed() -> None:
    a = Watched()
    a.cards("bcd")
    a.cards("efghijkl", 1_000_000, "far")
    assert a.see(OWN) == []
    a.arrive("bc")
    assert a.arrive("d") == [propose("abcd")]


def test_catches_up_when_what_was_decided_is_gone_and_others_have_it() -> None:
    a = Watched(electorate=("a", "b"))
    a.card("b", 6, "six")
    a.decide("ab")
    a.see(OWN)
    assert a.wants == [Fetch(5, "b", "b5")]
    gone = a.see(Missing(5, "b", "b5"))
    assert gone == [CatchUp(6, ("b",)), Fetch(5, "b", "b5")]
    a.see(Advanced(6, "six", ("a", "b")))
    assert a.wants == []


def test_catches_up_when_far_behind_or_when_registers_stay_silent() -> None:
    a = Watched()
    a.cards("bc", 5 + FAR, "far")
    assert a.card("d", 5 + FAR - 1, "near") == [], "three of four are not that far"
    assert a.card("d", 5 + FAR, "far") == [CatchUp(5 + FAR, ("b", "c", "d"))]
    silent = Watched()
    silent.cards("bcd", 7, "seven")
    assert silent.later(29, "bcd") == []
    assert silent.later(1, "bcd") == [CatchUp(7, ("b", "c", "d"))]


def test_snapshot_may_take_it_far_ahead() -> None:
    a = Watched()
    a.cards("bcd", 40, "forty")
    assert a.wants == [CatchUp(40, ("b", "c", "d"))]
    assert a.see(Advanced(40, "forty", ("b", "c"))) == []
    assert a.state.round == 40
    assert unread(a.state, a.now) == 0


# Astray


def test_heals_when_most_have_other_weights() -> None:
    a = Watched(electorate=("a", "b", "c"))
    assert a.cards("bc", base="theirs") == [Heal(5, "theirs", ("b", "c"))]
    a.see(OWN)
    assert a.later(100, "bc") == [Heal(5, "theirs", ("b", "c"))], "it proposes nothing meanwhile"
    a.see(Advanced(5, "theirs", ("a", "b", "c")))
    assert a.wants == []


@pytest.mark.parametrize(
    ("bases", "heals"),
    [
        ("yy", True),  # 2 of 3
        ("y", False),  # a tie of two
        ("xyy", False),  # a tie of four
        ("yyy", True),
        ("xxyy", False),  # a minority
        ("yyzz", False),  # no majority at all
        ("yyyz", True),
        ("xyyy", True),  # 3 of 5
    ],
)
def test_heals_to_a_majority_only(bases: str, heals: bool) -> None:
    others = "bcdefg"[: len(bases)]
    a = Watched(electorate=("a", *others))
    for peer, base in zip(others, bases, strict=True):
        a.card(peer, base="base" if base == "x" else base)
    assert bool(a.wants) == heals, a.wants


def test_those_still_in_an_earlier_round_count_among_all() -> None:
    a = Watched(electorate=tuple("abcdef"))
    a.cards("bc", base="theirs")
    a.cards("def", 4, "before")
    assert a.wants == []
    assert a.card("d", 5, "theirs") == [], "3 of 6"
    assert a.card("e", 5, "theirs") == [Heal(5, "theirs", ("b", "c", "d", "e"))]


def test_the_dead_and_the_excluded_and_strangers_have_no_vote() -> None:
    dead = Watched()
    dead.cards("bc", base="theirs")
    dead.later(31)
    assert dead.card("d") == []
    strangers = Watched(electorate=("a", "b"))
    strangers.cards("bcdefg"[1:], base="theirs")
    assert strangers.card("b") == []
    barred = Watched(electorate=("a", "b", "c", "d"), excluded="cd")
    assert barred.cards("bcd", base="theirs") == []


def test_takes_up_other_weights_once_in_a_round() -> None:
    a = Watched(electorate=("a", "b", "c"))
    a.cards("bc", base="theirs")
    a.see(Advanced(5, "theirs", ("a", "b", "c")))
    assert a.cards("bc", base="others") == [], "not to and fro"
    a.see(Advanced(6, "six", ("a", "b", "c")))
    assert a.cards("bc", 6, "others") == [Heal(6, "others", ("b", "c"))]


def test_astray_peer_left_behind_takes_the_newest_snapshot() -> None:
    a = Watched(electorate=("a", "b", "c"))
    a.cards("bc", base="theirs")
    assert a.cards("bc", 6, "six") == [CatchUp(6, ("b", "c"))]
    a.later(31)
    a.see(OWN)
    assert a.later(100) == [propose("")], "and goes on if nobody is left"


# Sleep


def test_stopped_for_an_hour_it_looks_around_before_it_ends_a_round() -> None:
    a = Watched()
    a.cards("bcd")
    a.see(OWN)
    a.later(5, "bcd")
    a.now += 3600
    assert a.see(Wake()) == [], "nobody fell silent, and nothing is overdue yet"
    assert a.arrive("bc") == [], "d may have contributed as well"
    assert a.arrive("d") == [propose("abcd")]
    b = Watched()
    b.cards("bcd")
    b.see(OWN)
    b.later(99.5, "bcd")
    b.now += 3600
    assert b.later(9, "bcd") == []
    assert b.later(2, "bcd") == [propose("")], "but then it does"


def test_stopped_for_an_hour_it_goes_by_what_the_others_decided() -> None:
    a = Watched()
    a.cards("bcd")
    a.see(OWN)
    a.now += 3600
    a.cards("bcd", 40, "forty")
    assert a.decide("bc") == [CatchUp(40, ("b", "c", "d")), *lacking("bc")]


def lacking(peers: str) -> list[object]:
    return [Fetch(5, peer, f"{peer}5") for peer in peers]


def test_driver_that_always_comes_late_still_ends_a_round() -> None:
    a = Watched()
    a.card("b")
    a.see(OWN)
    ticks = 0
    while not a.wants and ticks < 20:
        a.now, ticks = a.now + 45.0, ticks + 1
        a.card("b")
    assert a.wants == [propose("")]
    assert ticks * 45 < 3 * RULES.deadline


# Decisions that nobody can follow


def test_decision_that_nobody_has_is_given_up_for_another_proposers() -> None:
    a = Watched()
    a.cards("bcd")
    a.see(OWN)
    a.arrive("bc")
    a.decide("abcd", proposer="d")
    a.see(Missing(5, "d", "d5"))
    assert a.later(99, "bcd") == [Fetch(5, "d", "d5")]
    assert unread(a.state, a.now) is None
    assert a.later(1, "bcd") == [Fetch(5, "d", "d5"), propose("abc", attempt=1)]
    assert unread(a.state, a.now) == 1
    a.see(Settled(5, 1, decision("abd", "d")))
    assert a.wants == [Fetch(5, "d", "d5"), propose("abc", attempt=2)], "not the same one's again"
    assert a.decide("abc", "c", attempt=2) == [Advance(decision("abc", "c"))]


def test_it_is_not_given_up_while_it_may_still_come() -> None:
    ahead = Watched()
    ahead.cards("bcd")
    ahead.decide("bcd")
    ahead.cards("cd", 6, "six")
    ahead.later(101, "bcd")
    assert ahead.wants == [CatchUp(6, ("c", "d")), *lacking("bcd")], "half have it"
    passed = Watched()
    passed.cards("bcd")
    passed.decide("xy")
    passed.cards("xy", 9, "nine")
    passed.later(101, "bcdxy")
    assert passed.wants == [CatchUp(9, ("x", "y")), *lacking("xy")], "a quorum went on with it"
    alone = Watched(electorate=("a", "b"))
    alone.card("b")
    alone.decide("ab")
    alone.see(OWN)
    assert alone.later(300) == [Fetch(5, "b", "b5")], "alone it could make no round"
    slow = Watched()
    slow.cards("bcd")
    slow.decide("bc")
    slow.later(150, "bcd")
    slow.arrive("b")
    assert slow.arrive("c") == [Advance(decision("bc"))]


def test_cards_that_are_older_than_known_ones_are_ignored() -> None:
    a = Watched()
    a.see(CardSeen("b", 7, 5, "base", True))
    before: Rounds = a.state
    a.see(CardSeen("b", 7, 6, "other", True), CardSeen("b", 6, 4, "base", False))
    assert a.state.cards == before.cards
