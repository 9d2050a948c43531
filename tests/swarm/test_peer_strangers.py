"""What a stranger writes on its shelf, into cards and registers, to harm peers that mean well."""

# ruff: noqa: F811 (a fixture of another file)

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from trainwright.swarm import rounds
from trainwright.swarm.checks import contribution_body
from trainwright.swarm.events import (
    MOST_ENTRIES,
    Advance,
    Advanced,
    Arrived,
    Decision,
    Fetch,
    Missing,
    Propose,
    Rules,
    Settled,
    Wake,
)
from trainwright.swarm.identity import Identity
from trainwright.swarm.ledger import Ledger, Standing
from trainwright.swarm.manifest import Manifest
from trainwright.swarm.message import Message, read_message, write_message
from trainwright.swarm.methods.build import build_method
from trainwright.swarm.methods.method import Agreed, Own
from trainwright.swarm.peer_card import Card, Standings
from trainwright.swarm.peer_errands import Errands
from trainwright.swarm.peer_memory import Memory, State
from trainwright.swarm.peer_reports import Reports
from trainwright.swarm.peer_settle import Astray, read_decision, settle, write_decision
from trainwright.swarm.peer_shelves import REPORT_BYTES, Shelves
from trainwright.swarm.peer_upkeep import Upkeep
from trainwright.swarm.runs import find_run
from trainwright.swarm.scores import Score
from trainwright.swarm.transports import store as store_module

from .test_peer import Meeting, Training, agree, meeting, together, wait_for  # noqa: F401
from .toy_peer import LAYOUT, RATE, Toy, open_run

RULES = Rules(quorum=2, grace=0.2, deadline=0.8, silence=1.0)
PATIENT = replace(RULES, deadline=30.0)
RUN = "ab" * 16
ADA, BOB, LIAR = (Identity.from_seed(seed * 32) for seed in (b"\0", b"\1", b"l"))
DIGEST = "d" * 64


class Writer:
    """Whoever writes by hand what peers write otherwise: on a shelf and into registers."""

    def __init__(self, meeting: Meeting, identity: Identity) -> None:
        self.identity, self.peer = identity, identity.peer
        self.shelf = open_run(meeting.root / "run", identity.peer)
        self.manifest = cast(Manifest, find_run(self.shelf))
        self.run = self.manifest.run

    def contribution(self, base: str | None = None) -> bytes:
        """To round 0."""
        method = build_method(self.manifest.settings, LAYOUT)
        agreed, local = Agreed(0, torch.zeros(LAYOUT.count)), torch.full((LAYOUT.count,), 0.5)
        planes, _ = method.outgoing(agreed, method.begin(agreed), 0, local, RATE)
        body = contribution_body(base or self.manifest.genesis, 4, 4, 1.0)
        return write_message("contribution", self.run, 0, body, planes, self.identity)

    def card(self, **more: Any) -> None:
        card = Card(1, 0, self.manifest.genesis, **more)
        self.shelf.put("card", card.message(self.run, self.identity))

    def decide(self, entries: Sequence[tuple[str, str]], *reports: tuple[str, str]) -> None:
        decision = Decision(0, self.peer, tuple(sorted(entries)), reports)
        self.shelf.settle("rounds/0", write_decision(decision, self.run, self.identity), ())


def message(data: bytes, run: str, kind: str = "contribution") -> Message:
    return read_message(data, run=run, kind=kind, limit=10**6)


# Decisions


@pytest.mark.parametrize("digest", ["/dev//" + "./" * 27 + "zero", "²" * 64, "D" * 64, "d" * 63])
def test_decision_names_digests_and_no_paths(digest: str) -> None:
    for what in ("entries", "reports"):
        body = {"entries": [[ADA.peer, DIGEST]], "reports": []} | {what: [[ADA.peer, digest]]}
        data = write_message("decision", RUN, 0, body, [], LIAR)
        assert read_decision(data, RUN, 0, 1, frozenset()) is None
    found = write_decision(Decision(0, LIAR.peer, ((ADA.peer, DIGEST),)), RUN, LIAR)
    assert read_decision(found, RUN, 0, 1, frozenset()) is not None


@pytest.mark.parametrize("lie", ["contribution", "report"])
def test_decision_that_names_ones_message_as_anothers_is_given_up(
    meeting: Meeting, lie: str
) -> None:
    meeting.begin(rules=RULES)
    bob, liar = Writer(meeting, BOB), Writer(meeting, LIAR)
    ours, theirs = bob.contribution(), liar.contribution()
    bob.shelf.put("rounds/0/contribution", ours)
    liar.shelf.put("rounds/0/contribution", theirs)
    mine, its = (message(data, bob.run).digest for data in (ours, theirs))
    if lie == "contribution":
        liar.decide([(ADA.peer, mine), (BOB.peer, mine)])
    else:
        body = {"round": 0, "scores": {}, "arrivals": {}, "refused": {ADA.peer: "so I say"}}
        report = write_message("scores", liar.run, 0, body, [], LIAR)
        liar.shelf.put("rounds/0/scores", report)
        digest = message(report, liar.run, "scores").digest
        liar.card(report=digest)
        liar.decide([(BOB.peer, mine), (LIAR.peer, its)], (BOB.peer, digest))
    toys = [meeting.toy(number) for number in range(2)]
    together(toys, Toy.start)
    with Training(*toys) as training:
        training.until(lambda: all(any(taken for _, taken in toy.rounds) for toy in toys))
    agree(meeting, 0, 1)
    assert (meeting.root / "run" / "registers" / "rounds" / "0.1").exists()  # settled anew


@pytest.mark.parametrize("harm", ["damaged at first", "lost later"])
def test_nothing_is_settled_without_all_that_was_decided(meeting: Meeting, harm: str) -> None:
    meeting.begin(rules=PATIENT)
    liar, ada = Writer(meeting, LIAR), meeting.toy(0)
    theirs = liar.contribution()
    digest, key = message(theirs, liar.run).digest, "rounds/0/contribution"
    liar.card(offered=digest)
    liar.shelf.put(key, theirs if harm == "lost later" else b"no message")
    ada.start()
    while ada.sent is None:
        ada.train()
    contribution = meeting.shelf(0) / key
    wait_for(contribution.exists)
    driver = ada.peer._driver
    wait_for(lambda: LIAR.peer in {peer for peer, _ in driver.rounds.here})
    assert ((LIAR.peer, digest) in driver.rounds.here) == (harm == "lost later")
    if harm == "lost later":
        (driver.memory.directory / "rounds" / "0" / digest).write_bytes(theirs[:-1])
        liar.shelf.delete(key)
    liar.decide(
        [(ADA.peer, message(contribution.read_bytes(), liar.run).digest), (LIAR.peer, digest)]
    )
    wait_for(lambda: f"0/{digest}" in driver.duties.wants)
    assert ada.peer.round == 0
    liar.shelf.put(key, theirs)
    wait_for(lambda: ada.peer.status.round == 1)
    joiner = meeting.toy(1)
    joiner.start()
    assert set(meeting.history(0)[0][1]) == {ADA.peer, LIAR.peer}
    assert agree(meeting, 0, 1) == 1


def test_what_was_here_and_is_lost_is_fetched_again() -> None:
    entry = (BOB.peer, DIGEST)
    state = rounds.begin(ADA.peer, RULES, Advanced(5, "base", ()), 0.0)
    for event in (Arrived(5, *entry), Settled(5, 0, Decision(5, BOB.peer, (entry,)))):
        state, wants = rounds.tick(state, event, 0.0)
    assert [type(each) for each in wants] == [Advance]
    assert rounds.tick(state, Missing(5, *entry), 0.0)[1] == [Fetch(5, *entry)]


def test_register_with_too_much_in_it_is_passed_over(
    meeting: Meeting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "LARGEST_REGISTER", 1000)
    meeting.begin(rules=PATIENT)
    stranger = open_run(meeting.root / "run", LIAR.peer)
    stranger.settle("rounds/0", bytes(2000), ())
    shelves = meeting.toy(0).peer._driver.shelves
    assert shelves.settle(Decision(0, ADA.peer, ()), 0, (), frozenset()) is None


def test_peers_without_end_fit_into_a_decision_and_the_known_come_first() -> None:
    strangers = sorted(f"{number:020x}" for number in range(MOST_ENTRIES + 50))
    known = tuple(strangers[-40:])
    state = rounds.begin(ADA.peer, RULES, Advanced(5, "base", known), 0.0)
    found = {(peer, DIGEST): "" for peer in strangers}
    state = replace(state, here=found, reports=dict.fromkeys(found, 5))
    for now in (0.3, 0.6, 0.9):  # at its deadline, and awake
        state, wants = rounds.tick(state, Wake(), now)
    [decision] = [each.decision for each in wants if isinstance(each, Propose)]
    assert len(decision.entries) == len(decision.reports) == MOST_ENTRIES
    assert set(known) <= set(dict(decision.entries)) & set(dict(decision.reports))
    data = write_decision(decision, RUN, ADA)
    assert read_decision(data, RUN, 5, 2, frozenset()) == decision


# Who has gone astray


@pytest.mark.parametrize(
    ("liars", "strangers", "astray"),
    [(1, 0, False), (1, 3, False), (2, 0, True)],
)
def test_peer_is_astray_only_if_most_of_the_last_round_say_so(
    meeting: Meeting,
    liars: int,
    strangers: int,
    astray: bool,
) -> None:
    meeting.begin(rules=PATIENT)
    terms = meeting.toy(0).peer._driver.shelves.terms
    *others, honest = sorted((ADA, BOB, LIAR), key=lambda each: each.peer)
    electorate = tuple(each.peer for each in (*others, honest))
    agreed, ledger = Agreed(0, torch.zeros(LAYOUT.count)), Ledger(electorate=electorate)
    base = terms.hash(agreed, ledger)
    crowd = [Identity.from_seed(bytes([100 + number]) * 32) for number in range(strangers)]
    told = {honest: base} | dict.fromkeys((*others[:liars], *crowd), "invented")
    messages = [
        message(Writer(meeting, each).contribution(said), terms.run) for each, said in told.items()
    ]
    messages.sort(key=lambda each: each.peer)
    decision = Decision(0, LIAR.peer, tuple((each.peer, each.digest) for each in messages))

    def settled() -> list[str]:
        found = settle(terms, agreed, ledger, base, decision, messages, {}, honest.peer)
        return list(found.ledger.past[-1].tokens)

    if astray:
        with pytest.raises(Astray):
            settled()
    else:
        assert settled() == [honest.peer]


# Cards


class AtOnce:
    """Errands that are done while they are sent."""

    def send(
        self,
        key: object,
        lane: str,
        work: Callable[[], Any],
        then: Callable[[Any], None] = lambda found: None,
        wanted: Callable[[], bool] = lambda: True,
    ) -> None:
        then(work())


class Shelf:
    """Notes what is put there; has one report of everybody's and of every round."""

    def __init__(self, me: Identity) -> None:
        self.me, self.identity, self.run = me.peer, me, RUN
        self.copies, self.cleaned, self.asked = list[tuple[int, str]](), list[int](), list[str]()

    def put_copy(self, round: int, digest: str, data: bytes) -> None:
        self.copies.append((round, digest))
        if len(self.copies) > 3:
            raise ValueError("this shelf is full")

    def put_snapshot(self, agreed: Agreed, ledger: Ledger) -> None: ...

    def put_standings(self, round: int, ledger: Ledger) -> None: ...

    def put_report(self, round: int, data: bytes) -> None:
        self.report_bytes = data

    def read_report(self, data: bytes, peer: str) -> Message:
        return read_message(data, run=RUN, kind="scores", limit=REPORT_BYTES, peer=peer)

    def clean(self, before: int, snapshots: int) -> None:
        self.cleaned.append(before)

    def report(self, round: int, peer: str, digest: str, others: object) -> None:
        self.asked.append(digest)


def upkeep(shelf: Shelf, directory: Path, every: int = 5) -> Upkeep:
    shelves, errands = cast(Shelves, shelf), cast(Errands, AtOnce())
    reports = Reports(shelves, errands, lambda report: None)
    return Upkeep(shelves, Memory(directory, RUN), errands, reports, every)


def state(round: int, ledger: Ledger | None = None) -> State:
    agreed = Agreed(round, torch.zeros(4))
    ledger = replace(ledger or Ledger(), electorate=(ADA.peer, BOB.peer))
    return State(agreed, Own(), ledger, "hash")


def active(**more: Any) -> Card:
    return Card(1, 100, "hash", **({"active": True} | more))


def test_wants_of_a_stranger_are_of_what_is_needed_and_in_reach(tmp_path: Path) -> None:
    shelf = Shelf(ADA)
    kept = upkeep(shelf, tmp_path)
    for round in (79, 80, 100, 101):
        kept.memory.keep_contribution(round, DIGEST, b"x")
    wants = [f"{round}/{DIGEST}" for round in (79, 80, 100, 101, "²", "+99", 10**30)]
    wants += ["100/" + "\U0001f600" * 64, "100/" + "./" * 32, "100//" + DIGEST, "/", ""]
    card = active(wants=tuple(wants))
    kept.serve(state(100), LIAR.peer, card, {ADA.peer: active(), LIAR.peer: card})
    assert shelf.copies == [(80, DIGEST), (100, DIGEST)]
    for _ in range(3):  # a full shelf ends nobody
        kept.serve(state(100), LIAR.peer, card, {ADA.peer: active(), LIAR.peer: card})
    kept.memory.close()


def test_all_who_can_take_turns_at_serving_and_liars_do_not(tmp_path: Path) -> None:
    able = {each.peer: active() for each in (ADA, BOB)}
    ledger = Ledger((), {LIAR.peer: Standing(excluded="lied")})
    served = list[int]()
    for each in (ADA, BOB):
        shelf = Shelf(each)
        kept = upkeep(shelf, tmp_path / each.peer)
        kept.memory.keep_contribution(100, DIGEST, b"x")
        for sequence in range(6):
            card = Card(sequence, 100, "hash", wants=(f"100/{DIGEST}",))
            before = len(shelf.copies)
            kept.serve(state(100, ledger), "ff" * 10, card, {**able, LIAR.peer: active()})
            served += [sequence] * (len(shelf.copies) - before)
        assert len(shelf.copies) == 3
        kept.memory.close()
    assert sorted(served) == list(range(6))  # with every card somebody's, and one's only


def test_snapshots_are_believed_where_one_is_due(tmp_path: Path) -> None:
    shelf = Shelf(Identity.from_seed(b"v" * 32))  # a validator, whose turn it never is
    kept = upkeep(shelf, tmp_path)
    for round in range(1, 20):
        kept.after_round(state(round), {LIAR.peer: active(snapshot=round)})
    assert shelf.cleaned == [5, 10]  # what joiners need since the last snapshot but one is there
    kept.snapshot = 5
    kept.after_round(state(20), {BOB.peer: active(snapshot=20)})
    assert (shelf.cleaned[-1], kept.snapshot) == (15, -1)  # it tells of none that it took away
    kept.memory.close()


def test_what_ails_a_card_ends_no_peer(meeting: Meeting) -> None:
    meeting.begin(rules=PATIENT)
    ada = meeting.toy(0)
    ada.start()

    def fails(*given: object) -> None:
        raise ValueError("nobody thought of that")

    ada.peer._driver.duties.upkeep.serve = fails  # type: ignore[method-assign, assignment]
    Writer(meeting, LIAR).card(wants=("snapshot",))
    log = meeting.root / "peer0" / "swarm.jsonl"
    wait_for(lambda: log.exists() and "not heeded" in log.read_text())
    assert ada.peer._thread.is_alive()


# Reports


def reports(shelf: Shelf) -> Reports:
    return Reports(cast(Shelves, shelf), cast(Errands, AtOnce()), lambda report: None)


def test_report_is_its_writers_alone() -> None:
    shelf, missing = Shelf(LIAR), list[str]()
    found = reports(shelf)
    found.tell(4, {ADA.peer: Score(-1.0, -1.0)})
    assert found.is_of(found.digest, LIAR.peer) and not found.is_of(found.digest, BOB.peer)
    found.fetch(5, LIAR.peer, found.digest, (), lambda: missing.append(LIAR.peer))
    found.fetch(5, BOB.peer, found.digest, (), lambda: missing.append(BOB.peer))
    assert missing == [BOB.peer]


def test_reports_without_end_are_not_fetched(meeting: Meeting) -> None:
    meeting.begin(rules=PATIENT)
    ada, shelf = meeting.toy(0), Shelf(ADA)
    ada.start()
    duties = ada.peer._driver.duties
    ada.peer._driver.stop()
    ada.peer._thread.join()
    duties.reports = reports(shelf)
    digests = [f"{number:064x}" for number in range(20)]
    for number, digest in enumerate(digests):
        card = Card(number + 1, 0, "", report=digest, report_round=[0, 1, 10**15][number % 3])
        duties.heed(LIAR.peer, card, 1)
    assert shelf.asked == digests[0:9:3]  # of rounds to come none, of this one three


def test_messages_of_an_honest_peer_can_be_written_whoever_comes() -> None:
    strangers = [f"{number:020x}" for number in range(5000)]
    reason = "\U0001f600" * 1000
    standings = Standings(1, dict.fromkeys(strangers, -12.25), dict.fromkeys(strangers, reason))
    assert Standings.read(standings.message(RUN, ADA), RUN, ADA.peer).excluded
    shelf = Shelf(ADA)
    found = reports(shelf)
    for peer in strangers:
        found.arrived(4, peer, DIGEST, 10**6)
        found.refused(4, peer, reason)
    found.tell(4, {peer: Score(-1.23456e-5, -1.23456e-5) for peer in strangers[:MOST_ENTRIES]})
    assert json.dumps(shelf.read_report(shelf.report_bytes, ADA.peer).body)
