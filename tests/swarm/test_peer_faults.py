"""Peers as processes, and what happens to them: killed at a certain line, stopped, cut off."""

from __future__ import annotations

import itertools
import random
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from .toy_peer import RULES
from .toy_swarm import ToySwarm

LINES = ["before-sending", "sending", "after-sending", "advancing", "saving", "deciding"]


@pytest.fixture
def swarm(tmp_path: Path) -> Iterator[ToySwarm]:
    found = ToySwarm(tmp_path)
    yield found
    found.close()


@pytest.mark.prove
@pytest.mark.parametrize("line", LINES)
def test_peer_killed_at_a_line_comes_back(swarm: ToySwarm, line: str) -> None:
    rounds = 30
    for peer in (0, 1):
        swarm.launch(peer, rounds)
    swarm.launch(2, rounds, f"--die={line}:3")
    assert swarm.ended(2) == -signal.SIGKILL
    swarm.launch(2, rounds)
    assert [swarm.ended(peer) for peer in range(3)] == [0, 0, 0], swarm.log(2)
    assert swarm.agreed() == rounds
    assert swarm.events(2)[-1]["round"] == rounds - 1
    assert not swarm.events(0, "took up")
    for peer in (0, 1):  # nobody lost more than a deadline to it
        waited = [line["waited"] for line in swarm.events(peer)]
        longest = max(after - before for before, after in itertools.pairwise([0.0, *waited]))
        assert longest < RULES.deadline + RULES.silence


@pytest.mark.prove
def test_starter_of_the_run_is_gone_and_others_still_join(swarm: ToySwarm) -> None:
    swarm.launch(0, 1000)
    swarm.launch(1, 40)
    swarm.launch(2, 40)
    swarm.until(lambda: swarm.round(0) >= 3)
    swarm.signal(0, signal.SIGKILL)
    swarm.launch(3, 40)
    assert [swarm.ended(peer) for peer in (1, 2, 3)] == [0, 0, 0]
    assert swarm.agreed() == 40
    assert swarm.contributed(3)


@pytest.mark.prove
def test_peer_stopped_for_a_minute(swarm: ToySwarm) -> None:
    for peer in range(3):
        swarm.launch(peer, 10_000)
    swarm.until(lambda: min(map(swarm.round, range(3))) >= 3)
    swarm.signal(2, signal.SIGSTOP)
    before = swarm.round(0)
    time.sleep(60)  # the fault itself
    assert swarm.round(0) > before + 20
    swarm.signal(2, signal.SIGCONT)
    gone_on = swarm.round(0)
    swarm.until(lambda: max(swarm.contributed(2)) > gone_on)
    swarm.close()
    assert swarm.agreed() > gone_on
    assert not swarm.events(0, "took up")


@pytest.mark.prove
def test_store_away_for_a_minute(swarm: ToySwarm) -> None:
    for peer in range(3):
        swarm.launch(peer, 10_000)
    swarm.until(lambda: min(map(swarm.round, range(3))) >= 3)
    away = swarm.root / "away"
    swarm.run.rename(away)
    time.sleep(60)  # the fault itself
    away.rename(swarm.run)
    before = swarm.round(0)
    swarm.until(lambda: min(map(swarm.round, range(3))) >= before + 5)
    swarm.close()
    swarm.agreed()
    failed = [line["round"] for line in swarm.events(0) if not line["peers"]]
    assert not failed, "an outage is nobody's fault, and no round is lost by it"


@pytest.mark.prove
def test_clock_that_is_off_by_an_hour_changes_nothing(swarm: ToySwarm) -> None:
    for peer, clock in enumerate((0, 3600, -3600)):
        swarm.launch(peer, 20, f"--clock={clock}")
    assert [swarm.ended(peer) for peer in range(3)] == [0, 0, 0]
    assert swarm.agreed() == 20
    for peer in range(3):
        assert len(swarm.contributed(peer)) > 10
    times = [swarm.events(peer)[-1]["time"] for peer in range(3)]
    assert times[1] - times[2] > 7000  # they do see other clocks


def reached(swarm: ToySwarm, round: int) -> bool:
    """Whether anybody has."""
    return max(map(swarm.round, range(4))) >= round


def die_or_end(swarm: ToySwarm, victim: int) -> None:
    """Until a peer has met its fault, or the others are so far that it will not."""
    process, end = swarm.processes[victim], max(map(swarm.round, range(4))) + 8
    swarm.until(lambda: process.poll() is not None or reached(swarm, end))


@pytest.mark.prove
@pytest.mark.parametrize("seed", range(50))
def test_faults_at_random(tmp_path: Path, seed: int) -> None:
    """Four peers of which some are killed, stopped or late, at random; the starter too."""
    draw = random.Random(seed)
    swarm = ToySwarm(tmp_path, draw.choice(["diloco", "sparseloco", "streaming"]))
    rounds = 40
    try:
        for peer in range(3):
            swarm.launch(peer, rounds)
        for _ in range(3):
            victim, fault = draw.randrange(4), draw.choice(["kill", "stop", "line"])
            at = swarm.round(1) + draw.randrange(1, 6)
            swarm.until(partial(reached, swarm, at))
            if 3 not in swarm.processes:
                swarm.launch(3, rounds)
                continue
            if fault == "stop":
                swarm.signal(victim, signal.SIGSTOP)
                time.sleep(draw.uniform(0.5, 4.0))
                swarm.signal(victim, signal.SIGCONT)
                continue
            swarm.signal(victim, signal.SIGKILL)
            swarm.ended(victim)
            if fault == "line":
                line = draw.choice(LINES)
                swarm.launch(victim, rounds, f"--die={line}:{swarm.round(victim) + 2}")
                die_or_end(swarm, victim)
                swarm.signal(victim, signal.SIGKILL)
                swarm.ended(victim)
            swarm.launch(victim, rounds)
        peers = list(swarm.processes)
        assert [swarm.ended(peer, within=120.0) for peer in peers] == [0] * len(peers)
        assert swarm.agreed() == rounds
        for peer in peers:
            assert swarm.events(peer)[-1]["round"] == rounds - 1
    finally:
        swarm.close()
