"""Whole swarms in simulated time: faults drawn at random, and some worth a look of their own.

More of the former are in tests/proofs/test_many_swarms.py.
"""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from tests.swarm.scenarios import check, simulate
from tests.swarm.simulated import Inventor, Peer, Scribbler, World
from trainwright.swarm.events import Advanced, Decision, Propose, Rules


def swarm(size: int = 4, quorum: int = 2, seed: int = 0, **seconds: float) -> World:
    """Peers of one speed that start within a second."""
    world = World(Rules(quorum, 5.0, 40.0, 9.0), random.Random(seed))
    for number in range(size):
        peer = Peer(world, f"p{number}", **seconds)
        world.at(world.random.uniform(0, 1), peer.start)
    return world


def decided(world: World, round: int) -> Decision:
    found = world.registers[round, 0]
    assert isinstance(found, Decision)
    return found


def names(decision: Decision) -> list[str]:
    return [peer for peer, _ in decision.entries]


@pytest.mark.parametrize("seed", range(20))
def test_swarms_survive_what_happens_to_them(seed: int) -> None:
    check(simulate(seed))


def test_rounds_of_peers_that_are_well_have_them_all() -> None:
    world = swarm()
    world.run(200)
    rounds = [decided(world, round) for round in range(world.peers["p0"].state.round - 1)]
    assert len(rounds) > 10
    assert all(names(each) == ["p0", "p1", "p2", "p3"] for each in rounds)
    reported = {peer for each in rounds for peer, _ in each.reports}
    assert reported == {"p0", "p1", "p2", "p3"}


@pytest.mark.parametrize("seed", range(3))
def test_joiner_is_part_of_a_round_within_two_and_the_others_wait_less_than_a_second(
    seed: int,
) -> None:
    """`ends` is when all that were there before had a round's contributions on their shelves:
    how much later it is settled tells what they waited for.
    """

    def run(joins: bool) -> tuple[World, dict[int, float]]:
        world = swarm(seed=seed, train=12.0)
        old = list(world.peers.values())
        ready: dict[int, float] = {}
        for peer in old:
            uploaded = peer._uploaded

            def watched(round: int, base: str, uploaded: object = uploaded) -> None:
                ready[round] = world.now
                uploaded(round, base)  # type: ignore[operator]

            peer._uploaded = watched  # type: ignore[method-assign]
        if joins:
            joiner = Peer(world, "new", train=12.0)

            def snapshot() -> None:
                found = old[0].state
                joiner.saved = Advanced(found.round, found.base, found.electorate)
                joiner.start()

            world.at(60.0 + 3 * seed, snapshot)
        world.run(240)
        over = range(min(peer.state.round for peer in old) - 1)
        return world, {round: world.settled_at[round] - ready[round] for round in over}

    _, usual = run(joins=False)
    world, waits = run(joins=True)
    joiner = world.peers["new"]
    worked = min(joiner.entered)
    first = min(round for round in waits if "new" in names(decided(world, round)))
    assert first <= worked + 1
    assert all(waits[round] < max(usual.values()) + 1.0 for round in range(worked, first + 1))


def test_peer_that_returns_after_an_hour_catches_up_and_stalls_nobody() -> None:
    world = swarm(size=3, seed=3, train=30.0, poll=4.0)
    world.keeps = 5
    world.at(50.0, lambda: world.peers["p2"].stop(3600))
    world.run(3650)
    before = world.peers["p0"].state.round
    world.run(3780)
    back = world.peers["p2"]
    assert before > 90
    assert back.state.round >= before
    assert "p2" in names(decided(world, world.peers["p0"].state.round - 2))
    times = [world.settled_at[round] for round in range(5, before)]
    assert max(b - a for a, b in pairwise(times)) < 60.0
    assert not [each for each in world.registers.values() if not names(each)]


def test_machine_that_sleeps_for_an_hour_with_all_its_peers_loses_no_round() -> None:
    """Every clock says that the deadline is long over; the contributions lie on the shelves."""
    for seed in range(3):
        world = swarm(seed=seed, quorum=4, train=12.0, fetch=2.0)
        asleep = 40.0 + 4 * seed
        world.at(asleep, lambda w=world: [peer.stop(3600) for peer in w.peers.values()])
        world.run(asleep + 3600 + 60)
        assert len(world.registers) > 4
        assert all(names(each) for each in world.registers.values())


def test_peer_alone_goes_on_until_others_come() -> None:
    world = swarm(size=1)
    world.run(500)
    alone = world.peers["p0"]
    assert alone.state.round >= 11
    assert not any(names(decided(world, round)) for round in range(alone.state.round))
    other = Peer(world, "p1")
    world.at(500.0, other.start)
    world.run(700)
    assert alone.state.base == other.bases[alone.state.round]
    assert names(decided(world, alone.state.round - 1)) == ["p0", "p1"]


def test_slow_peer_contributes_what_it_has_and_no_round_waits_for_it() -> None:
    world = swarm()
    slow = world.peers["p3"]
    slow.train = 500.0
    world.run(200)
    last = world.peers["p0"].state.round
    assert last > 10
    assert sum("p3" in names(decided(world, round)) for round in range(last)) > 0.8 * last
    assert slow.hurried


def test_liar_that_scribbles_into_registers_costs_attempts_and_no_round() -> None:
    world = swarm(size=3)
    liar = Scribbler(world, "x")
    world.at(0.5, liar.start)
    world.run(200)
    assert any(attempt for _, attempt in world.registers)
    assert len({world.peers[each].bases[10] for each in ("p0", "p1", "p2")}) == 1


def test_liar_that_decides_for_what_does_not_exist_costs_a_deadline() -> None:
    world = swarm(size=3)
    liar = Inventor(world, "x", poll=0.1)
    world.at(0.5, liar.start)
    world.run(400)
    honest = [world.peers[each] for each in ("p0", "p1", "p2")]
    for peer in honest:
        times = [peer.entered[round] for round in sorted(peer.entered)]
        assert max(b - a for a, b in pairwise(times)) < 40.0 + 40.0
    last = min(peer.state.round for peer in honest)
    assert last > 10
    assert len({peer.bases[last] for peer in honest}) == 1
    assert any(attempt for _, attempt in world.registers), "it never came to that"


def test_few_propose_what_is_settled_already() -> None:
    world = swarm(size=6)
    world.run(200)
    proposals = [a for p in world.peers.values() for _, a in p.actions if isinstance(a, Propose)]
    assert len(proposals) < 4 * len(world.registers)
