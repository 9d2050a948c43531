"""What plans are compared by, and how much of the time failing nodes leave."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pytest

from tests.planner.search.machines import LLAMA_8B, cluster, pool
from trainwright.errors import UserError
from trainwright.planner.cost.prediction import Interval, MemoryPrediction, Prediction
from trainwright.planner.job import Job
from trainwright.planner.plan import Plan
from trainwright.planner.search.objective import (
    RESTART_SECONDS,
    Constraints,
    Objective,
    goodput,
)
from trainwright.planner.shapes import parameter_count

JOB = Job(LLAMA_8B, 4096, 256)


def foretold(seconds=2.0, dollars=3.0, joules=500.0, size=60e9):
    memory = MemoryPrediction(Interval.around(size, 0.1), 80e9)
    plan = replace(Plan.alone(), sequence_length=1000)
    made = Interval.around(seconds, 0.1)
    return Prediction(plan, made, memory, 1, {}, 0, 0, 0, 1e12, 1e12, joules, dollars, 7.0)


def test_one_aim_is_its_own_value_of_a_token():
    for aim, value in (("time", 2.0), ("cost", 3.0), ("energy", 500.0), ("carbon", 7.0)):
        assert Objective.parse(aim).score(foretold()) == pytest.approx(value / 1000)


def test_a_mix_trades_percents():
    """With weights 3 and 1, a percent of time is worth three of energy; units do not matter."""
    mix = Objective.parse("time=3, energy=1")
    even = mix.score(foretold())
    assert mix.score(foretold(2.0 * 1.01, joules=500.0 / 1.01**3)) == pytest.approx(even)
    assert mix.score(foretold(2.0 * 1.01, joules=500.0 / 1.01**4)) < even
    thousands = mix.score(foretold(joules=500e3)) / mix.score(foretold(1.0, joules=500e3))
    assert thousands == pytest.approx(even / mix.score(foretold(1.0)))
    arrays = mix.mixed({"time": np.array([2.0, 4.0]), "energy": np.array([500.0, 500.0])}, 1000)
    assert arrays[0] == pytest.approx(even)


def test_aims_that_make_no_sense_are_refused():
    for text, said in (("speed", "speed"), ("time=fast", "fast"), ("time=0", "weight")):
        with pytest.raises(UserError, match=said):
            Objective.parse(text)
    with pytest.raises(UserError, match="dollars_per_hour"):
        Objective.parse("cost").check(cluster())
    with pytest.raises(UserError, match="grams_per_kwh"):
        Objective.parse("time=1,carbon=1").check(cluster())
    Objective.parse("cost").check(cluster(pool(dollars_per_hour=2.0)))


def test_constraints_tell_what_is_broken():
    assert Constraints().broken(foretold()) == []
    assert [each.name for each in Constraints().broken(foretold(size=81e9))] == ["memory"]
    short = Constraints(memory_bytes=50e9, deadline_seconds=100, tokens=51_000, watts=200)
    broken = {each.name: (each.value, each.limit) for each in short.broken(foretold())}
    assert broken == {
        "memory": (60e9, 50e9),
        "deadline": (pytest.approx(102), 100),
        "power": (250, 200),
    }
    # Failures make a run longer.
    just = Constraints(deadline_seconds=103, tokens=51_000)
    assert not just.broken(foretold()) and just.broken(foretold(), 0.9)
    with pytest.raises(UserError, match="how long"):
        Constraints(deadline_seconds=100)


def simulated(interval, write, between, seed=0, wanted=3e6):
    """Share of useful time of a long run whose machine fails at random."""
    random_ = random.Random(seed)
    useful = passed = 0.0
    fails = random_.expovariate(1 / between)
    while useful < wanted:
        if passed + interval + write <= fails:
            passed += interval + write
            useful += interval
        else:
            passed = fails + RESTART_SECONDS
            # Nodes that fail while others start anew are found as well.
            fails = passed + random_.expovariate(1 / between)
    return useful / passed


@pytest.mark.parametrize("per_hour", [0.002, 0.02])
def test_goodput_is_that_of_a_run_that_fails_at_random(per_hour):
    nodes = 64
    machine = cluster(pool(nodes=nodes, failures_per_hour=per_hour))
    found = goodput(JOB, machine, machine.devices)
    between = 3600 / (nodes * per_hour)
    write = 12 * parameter_count(LLAMA_8B) / nodes / machine.pools[0].between.up
    best = max(
        simulated(factor * math.sqrt(2 * write * between), write, between)
        for factor in (0.5, 0.7, 1.0, 1.4, 2.0)
    )
    assert found == pytest.approx(best, rel=0.02)
    assert 0.5 < found < 1


def test_goodput_of_fewer_nodes_is_better_and_of_unknown_ones_perfect():
    machine = cluster(pool(nodes=64, failures_per_hour=0.01))
    some = [goodput(JOB, machine, workers) for workers in (8, 64, 512)]
    assert 1 > some[0] > some[1] > some[2]
    assert goodput(JOB, cluster(), 8) == 1.0
