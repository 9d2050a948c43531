"""What must not lead a peer astray: a stranger's word, what was found out before it healed, and a
stop at a bad moment.
"""

# ruff: noqa: F811 (a fixture of another file)

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from trainwright.errors import UserError
from trainwright.recipe.swarm import Swarm
from trainwright.swarm import rounds
from trainwright.swarm.agreed_hash import agreed_hash, write_snapshot
from trainwright.swarm.checks import contribution_body
from trainwright.swarm.events import Decision, Rules
from trainwright.swarm.identity import Identity
from trainwright.swarm.ledger import Ledger
from trainwright.swarm.message import Message, read_message, write_message
from trainwright.swarm.methods.method import Agreed, Own
from trainwright.swarm.peer import Peer
from trainwright.swarm.peer_card import Card
from trainwright.swarm.peer_desk import Outcome
from trainwright.swarm.peer_driver import Driver
from trainwright.swarm.peer_duties import Duties
from trainwright.swarm.peer_memory import Memory, State
from trainwright.swarm.peer_settle import register, settle, write_decision
from trainwright.swarm.runs import find_run, first_ledger

from .test_peer import Meeting, Training, meeting, together, wait_for  # noqa: F401
from .toy_peer import LAYOUT, RATE, Toy, open_run

LIAR = Identity.from_seed(b"liar" * 8)
FAR = 1_000_000


class Stranger:
    """Says again and again that the run is at round FAR, and has the snapshot of it."""

    def __init__(self, meeting: Meeting) -> None:
        meeting.identity = {9: LIAR}.get  # type: ignore[method-assign, assignment]
        self.transport = meeting.transport(9)
        del meeting.identity
        manifest = find_run(self.transport)
        assert manifest is not None
        self.run, self.stopping = manifest.run, threading.Event()
        agreed, ledger = Agreed(FAR, torch.ones(LAYOUT.count)), Ledger().to_json()
        self.transport.put(f"snapshots/{FAR}", write_snapshot(agreed, ledger, self.run, LIAR))
        self.base = agreed_hash(agreed, ledger)
        self._decide(meeting.root / "run")
        self.thread = threading.Thread(target=self._talk)
        self.thread.start()

    def _decide(self, root: Path) -> None:
        """Round FAR too is decided, by a quorum of its own."""
        body, entries = contribution_body(self.base, 1, 1, 1.0), []
        for each in (LIAR, Identity.from_seed(b"also" * 8)):
            data = write_message("contribution", self.run, FAR, body, [], each)
            open_run(root, each.peer).put(f"rounds/{FAR}/contribution", data)
            message = read_message(data, run=self.run, kind="contribution", limit=10**6)
            entries.append((each.peer, message.digest))
        decision = Decision(FAR, LIAR.peer, tuple(sorted(entries)))
        data = write_decision(decision, self.run, LIAR)
        self.transport.settle(register(FAR, 0), data, ())

    def _talk(self) -> None:
        sequence = 0
        while not self.stopping.wait(0.02):
            sequence += 1
            card = Card(sequence, FAR, self.base, active=True, snapshot=FAR)
            self.transport.put("card", card.message(self.run, LIAR))

    def __enter__(self) -> None: ...

    def __exit__(self, *what: object) -> None:
        self.stopping.set()
        self.thread.join()


def test_run_is_not_where_one_stranger_says(meeting: Meeting) -> None:
    meeting.begin()
    toys = [meeting.toy(number, every=2) for number in range(2)]
    with Stranger(meeting):
        together(toys, Toy.start)
        with Training(*toys) as training:
            training.until(lambda: min(toy.peer.round for toy in toys) >= 4)
            joiner = meeting.toy(2)
            joiner.start()  # while the others train
            assert 2 <= joiner.peer.round < FAR
        for toy in (*toys, joiner):
            toy.close()
        last = toys[0].peer.status.round
        meeting.toys.clear()
        late, again = meeting.toy(3), meeting.toy(0)
        together([late, again], Toy.start)  # when the stranger alone is there
    assert 2 <= late.peer.round < FAR
    assert last <= again.peer.round < FAR


@pytest.mark.parametrize(
    ("moving", "still_there", "have", "front"),
    [
        ([50, 51], [5] * 5, -1, 50),  # the dead have no say
        ([50, 51, FAR], [5] * 5, -1, 51),
        ([], [100] * 3 + [5] * 10, -1, 100),  # the run is over
        ([FAR], [100] * 3 + [5] * 10, -1, 100),
        ([FAR], [100] * 3, 95, None),  # what is here is as good, and has what nobody else has
        ([FAR, 120, 120], [], 95, 120),
        ([], [], -1, 0),
    ],
)
def test_run_is_where_most_are_that_live_or_where_a_quorum_ended(
    still: Still, moving: list[int], still_there: list[int], have: int, front: int | None
) -> None:
    shelves, looks, found = still.shelves, Counter[str](), list[int]()
    said = dict(enumerate([*moving, *still_there]))

    def card(peer: str) -> Card:
        looks[peer] += 1
        return Card(looks[peer] if int(peer) < len(moving) else 1, said[int(peer)], "")

    shelves.peers, shelves.card = lambda: [str(each) for each in said], card  # type: ignore
    shelves.newest = lambda cards, after, front: found.append(front)  # type: ignore
    still.driver.heartbeat = 0.0
    state = still.duties.state
    state = replace(state, agreed=replace(state.agreed, round=have))
    still.driver._survey(state if have >= 0 else None)
    assert found == ([] if front is None else [front])


# Found out before a peer healed


class Still:
    """A peer that does nothing by itself: its errands come back when the test wants them."""

    def __init__(self, meeting: Meeting) -> None:
        meeting.begin(rules=Rules(quorum=2, grace=50.0, deadline=50.0, silence=50.0))
        self.meeting, self.toy = meeting, meeting.toy(0)
        self.driver: Driver = self.toy.peer._driver
        self.driver.heartbeat = 50.0
        self.driver._away = False
        self.driver.duties = Duties(self.driver, self._state(0.0))
        advanced = self.driver.duties.advanced()
        self.driver.rounds = rounds.begin(
            self.driver.me, self.driver.manifest.rules, advanced, time.monotonic()
        )
        self.duties, self.shelves = self.driver.duties, self.driver.shelves

    def _state(self, weight: float) -> State:
        agreed, ledger = Agreed(0, torch.full((LAYOUT.count,), weight)), first_ledger("ab" * 10)
        return State(agreed, Own(), ledger, self.driver.shelves.terms.hash(agreed, ledger))

    def heal(self) -> None:
        before, self.duties.state = self.duties.state, self._state(1.0)
        agreed = self.duties.state.agreed
        self.duties._next(Outcome(0, before.agreed, agreed, replaced=True))

    def offer(self, weight: float) -> None:
        local = torch.full((LAYOUT.count,), weight)
        part = self.duties.terms.method.fragment(0)
        local = torch.cat([local[each] for each in part])
        self.duties.offer(0, local, tokens=1, steps=1, loss=1.0)

    def until(self, condition: Callable[[], bool], most: float = 10.0) -> None:
        end = time.monotonic() + most
        while not condition():
            assert time.monotonic() < end
            self.driver.errands.deliver(0.01)

    def contribution(self, by: Identity, base: str, round: int = 0) -> bytes:
        method, agreed = self.duties.terms.method, self.duties.state.agreed
        local = torch.cat([agreed.weights[each] + 0.1 for each in method.fragment(round)])
        planes, _ = method.outgoing(agreed, method.begin(agreed), round, local, RATE)
        body = contribution_body(base, 1, 1, 1.0)
        return write_message("contribution", self.shelves.run, round, body, planes, by)

    def read(self, data: bytes, by: Identity) -> Message:
        return self.shelves.read_contribution(data, 0, by.peer)

    def on_shelf(self) -> str:
        """The base of what this peer has published."""
        found = self.shelves.contribution(0, self.driver.me)
        return str(found[1].body["base"]) if found else ""


@pytest.fixture
def still(meeting: Meeting) -> Iterator[Still]:
    found = Still(meeting)
    yield found
    found.driver.errands.close()


def test_decision_that_was_read_before_healing_is_read_again(still: Still) -> None:
    decision = Decision(0, LIAR.peer, ((LIAR.peer, "0" * 64),))
    still.shelves.decision = lambda *given: (True, decision)  # type: ignore[method-assign]
    for healed in (True, False):
        still.driver.read_register(0, 0)
        if healed:
            still.heal()
        still.until(lambda: not still.driver.errands.under_way(("register", 0, 0)))
        assert (still.driver.rounds.decision is None) == healed


def test_contribution_that_was_checked_before_healing_is_checked_again(still: Still) -> None:
    after = still._state(1.0)
    data = still.contribution(LIAR, after.base)  # right once this peer has healed
    message = still.read(data, LIAR)
    still.shelves.contribution = lambda *given: (data, message)  # type: ignore[method-assign]
    key = ("contribution", 0, LIAR.peer, message.digest)
    for healed in (True, False):
        still.duties._get(0, LIAR.peer, message.digest, decided=False)
        if healed:
            still.heal()
        still.until(lambda: not still.driver.errands.under_way(key))
        expected = {} if healed else {(LIAR.peer, message.digest): ""}
        assert still.driver.rounds.here == expected


@pytest.mark.parametrize("at", ["writing", "publishing"])
def test_who_heals_contributes_from_the_weights_that_it_took(still: Still, at: str) -> None:
    gate, put = threading.Event(), still.shelves.put_contribution

    def put_late(round: int, data: bytes) -> None:
        gate.wait(10.0)
        put(round, data)

    still.shelves.put_contribution = put_late  # type: ignore[method-assign]
    still.offer(0.5)
    if at == "publishing":
        still.until(lambda: still.duties.offered is not None)
    still.heal()
    still.offer(1.5)
    gate.set()
    still.until(lambda: bool(still.duties.published))
    assert still.on_shelf() == still.duties.state.base == still._state(1.0).base


@pytest.mark.parametrize("behind", [0, 30])
def test_report_that_comes_out_after_a_leap_is_not_proposed(still: Still, behind: int) -> None:
    """Others look for reports of the last rounds only, and could not settle what names another."""
    still.duties.reports.arrived(0, LIAR.peer, "0" * 64, 1)
    still.duties.reports.tell(0, {})
    state = still._state(1.0)
    still.duties.state = replace(state, agreed=replace(state.agreed, round=1 + behind))
    still.until(lambda: not still.driver.errands.under_way(("tell", 0)))
    assert len(still.driver.rounds.reports) == (0 if behind else 1)


def test_reason_of_a_refusal_is_no_longer_than_a_line(still: Still) -> None:
    still.duties.log.refused(0, LIAR.peer, "made from state " + 60_000 * "\x1b[2J")
    assert len(still.meeting.said[-1]) < 300
    assert still.meeting.said[-1].isprintable()


@pytest.mark.parametrize(
    ("named", "others", "elsewhere", "believed"),
    [(1, 0, 0, True), (1, 0, 1, False), (2, 2, 0, False), (3, 1, 1, True), (0, 0, 2, False)],
)
def test_cards_vouch_for_a_state_where_most_of_them_name_it(
    still: Still, named: int, others: int, elsewhere: int, believed: bool
) -> None:
    said = [(5, "named")] * named + [(5, "other")] * others + [(6, "named")] * elsewhere
    cards = {str(number): Card(1, *each) for number, each in enumerate(said)}
    assert still.shelves._vouched(5, cards) == ("named" if believed else None)


# What shelves hold


def test_shelf_keeps_a_thousand_rounds_however_seldom_snapshots_are(still: Still) -> None:
    shelves, upkeep = still.shelves, still.duties.upkeep
    upkeep.every = 5000
    for round in (5, 1150):
        shelves.put_contribution(round, b"a contribution")
        shelves.put_copy(round, "d" * 64, b"a copy")
    shelves.transport.put("snapshots/40", b"the last but one, from other times")
    state = still.duties.state
    upkeep.after_round(replace(state, agreed=replace(state.agreed, round=1201)), {})
    still.until(lambda: not still.driver.errands.under_way("clean"))
    left = {listed.key for listed in shelves.transport.keys(shelves.me, "")}
    expected = {"rounds/1150/contribution", f"copies/1150/{'d' * 64}", "snapshots/40"}
    assert {key for key in left if key.count("/") and key != "snapshots/0"} == expected


# Who takes part is agreed on


def test_electorate_is_part_of_what_is_agreed(still: Still) -> None:
    terms, state = still.duties.terms, still.duties.state
    peers = sorted((Identity.from_seed(bytes([n]) * 32) for n in range(3)), key=lambda x: x.peer)
    bases = dict(zip([each.peer for each in peers], [state.base, "other", state.base], strict=True))
    data = [still.contribution(each, bases[each.peer]) for each in peers]
    messages = [
        read_message(each, run=terms.run, kind="contribution", limit=10**6, peer=peer.peer)
        for each, peer in zip(data, peers, strict=True)
    ]
    entries = tuple((each.peer, each.digest) for each in messages)

    def after(state: State, decision: Decision, found: list[Message]) -> State:
        given = (terms, state.agreed, state.ledger, state.base, decision, found)
        end = settle(*given, reports={}, me=still.driver.me)
        return State(end.agreed, Own(), end.ledger, end.base)

    first = after(state, Decision(0, LIAR.peer, entries), messages)
    assert first.electorate == (peers[0].peer, peers[2].peer)  # not who was refused
    failed = after(first, Decision(1, LIAR.peer, ()), [])
    assert failed.electorate == first.electorate
    written = Ledger.from_json(failed.ledger.to_json())  # as in a snapshot
    assert written == failed.ledger
    others = replace(written, electorate=("ab" * 10,))
    assert terms.hash(failed.agreed, others) != failed.base


# Stops


def test_exchange_that_is_under_way_outlives_a_clean_stop(meeting: Meeting) -> None:
    meeting.begin("sparseloco", codec="top-k")
    lonely = meeting.toy(0)
    lonely.start()
    lonely.peer._driver.memory._due["offered"] = float("inf")  # no time to keep it as it is offered
    while lonely.sent is None:
        lonely.train()
    wait_for((meeting.shelf(0) / "rounds" / "0" / "contribution").exists)
    lonely.close()
    meeting.toys.clear()
    memory = Memory(meeting.root / "peer0", lonely.peer._driver.manifest.run)
    kept = memory.offered(0)
    memory.close()
    assert kept is not None and kept.after is not None
    assert kept.after.vectors["unsent"].any()


def test_too_few_bytes_for_the_codec_are_refused_at_once(meeting: Meeting) -> None:
    meeting.begin()
    toy = meeting.toy(0)
    most = max(toy.method.most_bytes(round) for round in range(2))
    driver = toy.peer._driver

    def build(most_bytes: int) -> None:
        given = (driver.shelves.transport, meeting.identity(0), driver.manifest, toy.method)
        section, directory = Swarm(max_bytes=most_bytes), meeting.root / "other"
        Peer(*given, section, directory, rate=lambda round: RATE, most_tokens=1).close()

    build(most)
    with pytest.raises(UserError, match=f"needs up to {most}"):
        build(most - 1)
