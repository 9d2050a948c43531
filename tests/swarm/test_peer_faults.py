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

FOREVER = 1_000_000  # rounds: peers go on until the test has seen what it waits for
LINES = ["before-sending", "sending", "after-sending", "advancing", "saving", "deciding"]


@pytest.fixture
def swarm(tmp_path: Path) -> Iterator[ToySwarm]:
    found = ToySwarm(tmp_path)
    yield found
    found.close()


def until_all_contribute(swarm: ToySwarm) -> None:
    """Until every peer is part of a round that comes after all there are now."""
    now = max(map(swarm.round, swarm.processes))
    for peer, process in swarm.processes.items():
        swarm.until(lambda peer=peer: max(swarm.contributed(peer), default=-1) > now, most=120.0)
        assert process.poll() is None, swarm.log(peer)


@pytest.mark.prove
@pytest.mark.parametrize("line", LINES)
def test_peer_killed_at_a_line_comes_back(swarm: ToySwarm, line: str) -> None:
    for peer in (0, 1):
        swarm.launch(peer, FOREVER)
    swarm.launch(2, FOREVER, f"--die={line}:3")
    assert swarm.ended(2) == -signal.SIGKILL
    swarm.launch(2, FOREVER)
    until_all_contribute(swarm)
    swarm.close()
    swarm.agreed()
    assert not swarm.events(0, "took up")
    for peer in (0, 1):  # nobody lost more than a deadline to it
        waited = [line["waited"] for line in swarm.events(peer)]
        longest = max(after - before for before, after in itertools.pairwise([0.0, *waited]))
        assert longest < RULES.deadline + RULES.silence


@pytest.mark.prove
def test_starter_of_the_run_is_gone_and_others_still_join(swarm: ToySwarm) -> None:
    for peer in range(3):
        swarm.launch(peer, FOREVER)
    swarm.until(lambda: swarm.round(0) >= 3)
    swarm.signal(0, signal.SIGKILL)
    swarm.ended(0)
    del swarm.processes[0]
    swarm.launch(3, FOREVER)
    until_all_contribute(swarm)
    swarm.close()
    swarm.agreed()


@pytest.mark.prove
def test_peer_stopped_for_a_minute(swarm: ToySwarm) -> None:
    for peer in range(3):
        swarm.launch(peer, FOREVER)
    swarm.until(lambda: min(map(swarm.round, range(3))) >= 3)
    swarm.signal(2, signal.SIGSTOP)
    before = swarm.round(0)
    time.sleep(60)  # the fault itself
    assert swarm.round(0) > before + 20
    swarm.signal(2, signal.SIGCONT)
    gone_on = swarm.round(0)
    swarm.until(lambda: max(swarm.contributed(2), default=-1) > gone_on)
    swarm.close()
    assert swarm.agreed() > gone_on
    assert not swarm.events(0, "took up")


@pytest.mark.prove
def test_store_away_for_a_minute(swarm: ToySwarm) -> None:
    for peer in range(3):
        swarm.launch(peer, FOREVER)
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
    try:
        for peer in range(3):
            swarm.launch(peer, FOREVER)
        for _ in range(3):
            victim, fault = draw.randrange(4), draw.choice(["kill", "stop", "line"])
            at = swarm.round(1) + draw.randrange(1, 6)
            swarm.until(partial(reached, swarm, at))
            if 3 not in swarm.processes:
                swarm.launch(3, FOREVER)
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
                swarm.launch(victim, FOREVER, f"--die={line}:{swarm.round(victim) + 2}")
                die_or_end(swarm, victim)
                swarm.signal(victim, signal.SIGKILL)
                swarm.ended(victim)
            swarm.launch(victim, FOREVER)
        until_all_contribute(swarm)
        swarm.close()
        swarm.agreed()
    finally:
        swarm.close()
