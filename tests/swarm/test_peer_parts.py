"""What a peer is made of, each part alone: desk, errands, memory, card, status."""

from __future__ import annotations

import itertools
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from trainwright.swarm.identity import Identity
from trainwright.swarm.layout import Layout
from trainwright.swarm.ledger import Ledger, Standing
from trainwright.swarm.message import BadMessage, write_message
from trainwright.swarm.methods.build import build_method
from trainwright.swarm.methods.method import Agreed, Own
from trainwright.swarm.peer_card import Card, Standings, plain
from trainwright.swarm.peer_desk import Desk, Outcome
from trainwright.swarm.peer_errands import Errands
from trainwright.swarm.peer_memory import Memory, Offered, State
from trainwright.swarm.runs import find_run
from trainwright.swarm.status import Watch, table
from trainwright.swarm.transports.transport import TransportError

from .toy_peer import Toy, begin_run, open_run, settings

RUN = "ab" * 16


def outcome(round: int, included: bool = False, replaced: bool = False) -> Outcome:
    before = Agreed(round, torch.full((4,), float(round)))
    after = Agreed(round + 1, torch.full((4,), round + 1.0))
    return Outcome(round, before, after, included=included, replaced=replaced)


# Desk


@pytest.mark.parametrize("delay", [0, 2])
def test_desk_says_when_to_contribute_and_when_to_merge(delay: int) -> None:
    desk, sent = Desk(inner_steps=4, delay=delay), list[int]()
    desk.begin(Agreed(5, torch.zeros(4)), offered=False)
    assert [desk.wanted(steps) for steps in (0, 1, 3)] == ["go on"] * 3
    assert desk.wanted(4) == "contribute"
    assert desk.offer(sent.append)
    assert not desk.offer(sent.append)
    assert sent == [5]
    desk.deliver(outcome(5, included=True))
    # However early it is there: with a delay every peer merges after the same number of steps.
    assert [desk.wanted(steps) for steps in range(delay + 1)] == ["go on"] * delay + ["merge"]
    taken = desk.outcome(0.0)
    assert taken is not None
    assert (taken.round, desk.round) == (5, 6)
    assert desk.wanted(3) == "go on"


def test_desk_hurries_who_has_something_to_give() -> None:
    desk = Desk(inner_steps=100, delay=0)
    desk.begin(Agreed(0, torch.zeros(4)), offered=False)
    desk.hurry(0)
    assert desk.wanted(0) == "go on"
    assert desk.wanted(1) == "contribute"
    desk.deliver(outcome(0))
    assert desk.wanted(1) == "merge"
    assert not desk.offer(lambda round: None)  # the outcome comes first
    desk.outcome(None)
    assert desk.wanted(1) == "go on"  # that hurry was for the round before


def test_desk_wants_another_contribution_of_who_healed_in_the_same_round() -> None:
    desk = Desk(inner_steps=4, delay=0)
    desk.begin(Agreed(5, torch.zeros(4)), offered=False)
    assert desk.offer(lambda round: None)
    desk.deliver(Outcome(5, Agreed(5, torch.zeros(4)), Agreed(5, torch.ones(4)), replaced=True))
    assert desk.wanted(0) == "merge"
    assert desk.outcome(0.0) is not None
    assert [desk.wanted(steps) for steps in (0, 3, 4)] == ["go on", "go on", "contribute"]
    assert desk.offer(lambda round: None)


@pytest.mark.parametrize("included", [True, False])
def test_desk_goes_back_to_a_round_whose_exchange_ended_while_nobody_trained(
    included: bool,
) -> None:
    desk, agreed = Desk(inner_steps=4, delay=1), Agreed(5, torch.zeros(4))
    desk.begin(agreed, offered=False, included=included)
    assert not desk.go_back(3)
    assert desk.go_back(4) == included
    assert desk.round == 5 - included and desk.offered == included
    if included:
        assert [desk.wanted(0), desk.wanted(1)] == ["go on", "merge"]
        found = desk.outcome(0.0)
        assert found and (found.round, found.included) == (4, True) and found.after is agreed
        assert desk.round == 5 and not desk.offered


def test_desk_gives_up_what_was_trained_rather_than_pile_up_outcomes() -> None:
    desk = Desk(inner_steps=1, delay=0)
    desk.begin(Agreed(0, torch.zeros(4)), offered=False)
    for round in range(40):
        desk.deliver(outcome(round))
    taken = []
    while (found := desk.outcome(0.0)) is not None:
        taken.append(found)
    assert taken[0].replaced and taken[0].before.round == 0
    assert [each.after.round for each in taken][-1] == 40
    assert all(a.after.round == b.before.round for a, b in itertools.pairwise(taken))


def test_desk_tells_the_trainer_of_the_peers_fault() -> None:
    desk = Desk(inner_steps=1, delay=0)
    waiting = threading.Timer(0.05, lambda: desk.fail(ZeroDivisionError("in the thread")))
    waiting.start()
    with pytest.raises(ZeroDivisionError):
        desk.outcome(None)
    with pytest.raises(ZeroDivisionError):
        desk.wanted(0)


def test_outcome_that_replaces_drops_what_was_trained() -> None:
    layout = Layout((("a", (4,)),))
    method = build_method(settings(codec="fp32"), layout)
    local, sent = torch.full((4,), 9.0), torch.full((4,), 8.0)
    assert outcome(3, replaced=True).merged(method, local, None).tolist() == [4.0] * 4
    assert outcome(3, included=True).merged(method, local, sent).tolist() == [5.0] * 4
    assert outcome(3).merged(method, local, sent).tolist() == [10.0] * 4  # offered, not taken in
    assert local.tolist() == [9.0] * 4


# Errands


def test_errands_are_tried_again_while_the_transport_fails() -> None:
    errands, found = Errands(), list[int]()
    calls = iter(range(3))

    def work() -> int:
        if (call := next(calls)) < 2:
            raise TransportError("away")
        return 5 + call

    assert errands.send("key", "small", work, found.append)
    assert not errands.send("key", "small", work, found.append)  # one of a key at a time
    away = []
    while not found:
        errands.deliver(0.05)
        away.append(errands.away > 0)
    assert found == [7]
    assert any(away) and errands.away == 0.0
    assert not errands.under_way("key")
    errands.close()


def test_fault_of_an_errand_is_raised_where_it_is_delivered() -> None:
    errands = Errands()

    def work() -> None:
        raise ZeroDivisionError

    errands.send("key", "compute", work)
    with pytest.raises(ZeroDivisionError):
        while True:
            errands.deliver(0.05)
    errands.close()


def test_errand_that_nobody_wants_any_more_is_dropped() -> None:
    errands = Errands()
    wanted = iter([True, False])

    def work() -> None:
        raise TransportError("away")

    errands.send("key", "small", work, lambda found: None, lambda: next(wanted))
    while errands.under_way("key"):
        errands.deliver(0.05)
    errands.close()


# Memory


def state(round: int) -> State:
    agreed = Agreed(round, torch.randn(10), {"momentum": torch.randn(10)})
    standing = {"aa" * 10: Standing(mean=12.0, excluded="lied")}
    ledger = Ledger(("ff" * 10,), standing, electorate=("aa" * 10,))
    return State(agreed, Own({"unsent": torch.randn(10)}), ledger, "hash", included=True)


def test_memory_gives_back_what_it_was_given(tmp_path: Path) -> None:
    memory, kept = Memory(tmp_path, "run"), state(7)
    memory.save(kept)
    offered = Offered(7, "d" * 64, b"bytes of a message", kept.own)
    memory.keep_offered(offered)
    memory.close()
    memory = Memory(tmp_path, "run")
    found, again = memory.load(), memory.offered(7)
    assert found is not None and again is not None and again.after is not None
    assert (found.agreed.round, found.base, found.electorate) == (7, "hash", ("aa" * 10,))
    assert found.ledger == kept.ledger and found.included
    assert torch.equal(found.agreed.weights, kept.agreed.weights)
    assert torch.equal(found.agreed.outer["momentum"], kept.agreed.outer["momentum"])
    assert torch.equal(found.own.vectors["unsent"], kept.own.vectors["unsent"])
    assert (again.digest, again.data) == (offered.digest, offered.data)
    assert memory.offered(6) is None
    memory.close()


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_half_a_state_is_none(tmp_path: Path, size: int) -> None:
    memory = Memory(tmp_path, "run")
    assert memory.load() is None
    memory.save(state(1))
    path = tmp_path / "state"
    path.write_bytes(path.read_bytes()[:size])
    assert memory.load() is None
    memory.close()


def test_memory_forgets_rounds(tmp_path: Path) -> None:
    memory = Memory(tmp_path, "run")
    for round in range(4):
        memory.keep_contribution(round, "d" * 64, bytes([round]))
        memory.keep_offered(Offered(round, "d" * 64, b"x"))
    memory.forget(contributions=2, offered=3)
    kept = [memory.contribution(round, "d" * 64) for round in range(4)]
    assert kept == [None, None, b"\2", b"\3"]
    assert [memory.offered(round) is None for round in range(4)] == [True, True, True, False]
    memory.close()


def test_older_state_never_replaces_a_newer_one(tmp_path: Path) -> None:
    memory, older, newer = Memory(tmp_path, "run"), state(7), state(6)  # newer: it healed
    for each in (newer, older):
        memory.save(each)
    found = memory.load()
    assert found is not None and found.agreed.round == 6
    memory.save(newer)
    memory.close()


def test_two_threads_may_keep_the_same_contribution(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, both, write = Memory(tmp_path, "run"), threading.Barrier(2), Path.write_bytes

    def write_together(path: Path, data: bytes) -> None:
        write(path, data)
        both.wait(10.0)

    monkeypatch.setattr(Path, "write_bytes", write_together)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda data: memory.keep_contribution(3, "d" * 64, data), [b"x", b"x"]))
    assert memory.contribution(3, "d" * 64) == b"x"
    memory.close()


def test_what_a_killed_process_left_is_swept(tmp_path: Path) -> None:
    left = [tmp_path / ".state.123.tmp", tmp_path / "offered" / ".5.123.tmp"]
    (tmp_path / "offered").mkdir()
    for each in left:
        each.write_bytes(b"half of it")
    Memory(tmp_path, "run").close()
    assert not any(each.exists() for each in left)


# Card


def test_card_says_what_was_written_and_little_more() -> None:
    identity = Identity.from_seed(b"c" * 32)
    full = Card(
        sequence=9,
        round=4,
        base="ab" * 16,
        active=True,
        leaving=True,
        ready=12.5,
        offered="c" * 64,
        report="d" * 64,
        report_round=3,
        snapshot=2,
        wants=("snapshot", "3/" + "e" * 64),
        name="attic",
        version="1.0",
        loss=3.25,
        tokens=10**9,
        sent=5,
        received=6,
        rates=(1e6, 2e6),
    )
    for card in (full, Card(0, 0, "")):
        assert Card.read(card.message(RUN, identity), RUN, identity.peer) == card
    assert len(Card(1, 100, "ab" * 16, active=True).message(RUN, identity)) < 300


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"sequence": -1, "base": ""},
        {"sequence": 1, "base": "", "active": 1},
        {"sequence": 1, "base": "", "wants": ["x"] * 1000},
        {"sequence": 1, "base": "", "wants": "snapshot"},
        {"sequence": 1, "base": "", "offered": "key.pem"},
        {"sequence": 1, "base": "", "rates": [1.0]},
        {"sequence": 1, "base": "", "name": "x" * 500},
        {"sequence": 1, "base": "", "message": "no such field"},
        {"sequence": 1, "base": "", "round": 3},
    ],
)
def test_strange_cards_are_refused(body: dict[str, object]) -> None:
    identity = Identity.from_seed(b"c" * 32)
    data = write_message("card", RUN, 1, body, [], identity)
    with pytest.raises(BadMessage):
        Card.read(data, RUN, identity.peer)


def test_no_text_of_a_stranger_keeps_a_peer_from_writing_messages() -> None:
    identity = Identity.from_seed(b"c" * 32)
    for text in ("../x", "a/..", "..", "tab\t line\n \u202e", "\ud800", "x" * 10_000):
        card = Card(1, 0, "", name=plain(text, 100))
        assert Card.read(card.message(RUN, identity), RUN, identity.peer) == card
        standings = Standings(1, {}, {"ab" * 10: text})
        assert Standings.read(standings.message(RUN, identity), RUN, identity.peer).round == 1
    assert plain("round 3: 12.5 % of it", 100) == "round 3: 12.5 % of it"


def test_card_of_another_peer_is_no_card_of_this_one() -> None:
    one, other = Identity.from_seed(b"1" * 32), Identity.from_seed(b"2" * 32)
    with pytest.raises(BadMessage):
        Card.read(Card(1, 1, "").message(RUN, one), RUN, other.peer)


# Status


def test_status_tells_who_is_alive_and_who_is_excluded(tmp_path: Path) -> None:
    names = ("attic", "shed", "liar", "gone", "only looks")
    identities = [Identity.from_seed(bytes([number]) * 32) for number in range(5)]
    shelves = [open_run(tmp_path, each.peer) for each in identities]
    begin_run(shelves[0], identities[0], settings())
    manifest = find_run(shelves[1])
    assert manifest is not None
    peers = [each.peer for each in identities]
    liar, why = peers[2], "copy, round 3: the same as attic's"

    def write(number: int, **more: object) -> None:
        card = Card(0, 8, "", active=True, name=names[number], loss=2.5, sent=12_345)
        data = replace(card, **more).message(manifest.run, identities[number])  # type: ignore[arg-type]
        shelves[number].put("card", data)

    for number in range(5):
        write(number, sequence=1, active=number < 4, round=3 if number == 3 else 8)
    for number in (0, 1, 2):
        excluded = {liar: why} if number < 2 else {peers[0]: "says the liar"}
        standings = Standings(8, {peers[0]: 27.0 + number}, excluded)
        shelves[number].put("standings", standings.message(manifest.run, identities[number]))
    open_run(tmp_path, "ab" * 10).put("card", b"nonsense")

    watch = Watch(shelves[4], manifest)
    first = watch.look()
    for number in (0, 1, 2, 4):
        write(number, sequence=2, active=number < 4)
    second = watch.look()
    assert [each.alive for each in first.peers] == [None] * 5
    states = {each.peer: each.state for each in second.peers}
    assert states == dict(
        zip(peers, ["training", "training", "excluded", "silent", "watching"], strict=True)
    )
    assert second.round == 8
    assert second.excluded == {liar: why}
    rows = {row[0].split(" (")[0]: row for row in table(second)}
    assert rows["attic"][1:] == ("training", "8", "2.500", "0 ", "12.3 kB", "0 B", "28.0")
    assert [row[1] for row in table(second)][-1] == "excluded"
    third = table(watch.look())  # who has only looked is gone, who has trained is missed
    assert sorted(row[1] for row in third) == ["excluded", "silent", "silent", "silent"]


def test_who_never_came_in_has_nobody_to_take_leave_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainwright.swarm.peer._LAST_WORDS", 3600.0)
    identity = Identity.new()
    shelf = open_run(tmp_path / "run", identity.peer)
    begin_run(shelf, identity, settings())
    shelf.delete("snapshots/0")  # which everybody begins with
    toy = Toy(shelf, identity, tmp_path / "own")
    assert toy.peer.start(wait=0.1) is None
    toy.close()


def test_place_without_a_run_has_none(tmp_path: Path) -> None:
    assert find_run(open_run(tmp_path, "ab" * 10)) is None


def test_mutated_cards_never_do_harm() -> None:
    identity, draw = Identity.from_seed(b"c" * 32), random.Random(1)
    data = Card(9, 4, "ab" * 16, wants=("snapshot",)).message(RUN, identity)
    for _ in range(300):
        at = draw.randrange(len(data))
        mutated = data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :]
        with pytest.raises(BadMessage):
            Card.read(mutated, RUN, identity.peer)
