"""The ranking has the best plans there are, the same ones each time, and accounts for the rest."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from tests.planner.search.machines import BETWEEN, LLAMA_70B, cluster, llama, mixture, pool
from trainwright.errors import UserError
from trainwright.planner.cost.memory import predict_memory
from trainwright.planner.cost.prediction import Interval, MemoryPrediction, Prediction
from trainwright.planner.cost.step import predict
from trainwright.planner.job import Job
from trainwright.planner.plan import Machine
from trainwright.planner.search.asked import asked_of, like_of, machines_here
from trainwright.planner.search.frontier import NOISE, Ranked
from trainwright.planner.search.grid import make_grid
from trainwright.planner.search.objective import Constraints, Objective
from trainwright.planner.search.ranking import in_order, rank
from trainwright.recipe.schema import Recipe

JOB = Job(llama(2048, 8), 4096, 16)
FOUR = cluster(pool(devices=4))
EVERY = 100_000


def exhaustive(job, machine, **fixed):
    """Seconds of every legal plan that fits, by the plan; nothing is left out."""
    grid = make_grid(like_of(job, machine), [machine.devices], fixed)
    found = {}
    for index in range(len(grid)):
        candidate = grid.candidate(index)
        plan = candidate.plan(threads=1, compile=not candidate.splits)
        if predict_memory(job, plan, machine).fits:
            found[plan] = predict(job, plan, machine, simulated=False).step_seconds.value
    return found


SPACES = {
    "dense": (JOB, {"recompute": "none", "cp": 1}),
    "large": (Job(llama(4096, 24, 32, 8, 14336), 4096, 16), {"cp": 1, "schedule": "1f1b"}),
    "experts": (Job(mixture(8, 6), 2048, 16), {"recompute": "none", "cp": 1}),
}


@pytest.mark.parametrize("name", SPACES)
def test_the_winner_is_that_of_an_exhaustive_search(name):
    job, fixed = SPACES[name]
    seconds = exhaustive(job, FOUR, **fixed)
    best = min(seconds.values())
    # Uneven stages and the like may be better than all that the grid has.
    pruned = rank(job, FOUR, fixed=fixed, predictions=EVERY)
    assert pruned.winner.prediction.step_seconds.value <= best * (1 + NOISE)
    unpruned = rank(job, FOUR, fixed=fixed, predictions=EVERY, prune=False)
    assert [each.plan for each in pruned.best] == [each.plan for each in unpruned.best]
    assert unpruned.pruned == unpruned.unseen == pruned.unseen == 0
    assert pruned.considered == unpruned.considered >= len(seconds)
    if name == "large":  # where recomputing takes time, and not all fit
        assert pruned.too_large > 10 and pruned.pruned > 10
    # And a search that looks at few of them finds one as good.
    few = rank(job, FOUR, fixed=fixed, predictions=24)
    assert few.winner.prediction.step_seconds.value <= best * (1 + 2 * NOISE)
    assert few.predicted < len(seconds) / 4


def test_all_candidates_are_accounted_for():
    found = rank(JOB, FOUR, predictions=20)
    polished = found.predicted + found.too_large + found.pruned + found.unseen - found.considered
    assert found.unseen and found.pruned
    # What is looked at besides are the best, with layers and policies that no candidate has.
    assert 0 <= polished <= 20


def test_plans_are_legal_and_fit_and_the_best_come_first():
    found = rank(JOB, FOUR, top=20)
    assert len(found.best) == 20
    scores = [each.score for each in found.best]
    assert all(b >= a / (1 + NOISE) for a, b in itertools.pairwise(scores))
    for each in found.best:
        assert not each.broken and each.prediction.memory.fits
        seconds = each.prediction.step_seconds.value
        assert each.score == pytest.approx(seconds / each.plan.batch_tokens)
        assert each.plan.batch_sequences == JOB.batch_sequences
    assert len({each.plan for each in found.best}) == 20


def stand_in(seconds):
    """A cost model that knows nothing but `seconds` of a plan; everything fits."""

    def memory(job, plan, machine):
        return MemoryPrediction(Interval.around(1e9, 0.1), 80e9)

    def foretell(job, plan, machine):
        made = Interval.around(seconds(plan), 0.1)
        sums = memory(job, plan, machine)
        return Prediction(plan, made, sums, 1.0, {}, 0, 0, 0, 1e12, 1e12, 1.0, 1.0, 1.0)

    return {"predict": foretell, "predict_memory": memory}


def test_of_plans_as_good_as_equal_the_simplest_is_taken():
    def seconds(plan):
        # Half a percent for each dimension above one, in favour of many of them.
        many = sum(degree > 1 for degree in (plan.pp, plan.dp_replicate, plan.dp_shard, plan.tp))
        return 1.0 - 0.001 * many - 0.5 * (plan.cp > 1)

    given = {"recompute": "none", "cp_method": "ring"}
    search = {"predictions": EVERY, "prune": False, **stand_in(seconds)}
    found = rank(JOB, FOUR, fixed={**given, "cp": 1}, **search)
    assert sum(d > 1 for d in (found.winner.plan.pp, found.winner.plan.tp)) <= 1
    assert found.winner.plan.virtual_stages == 1
    found = rank(JOB, FOUR, fixed=given, **search)
    assert found.winner.plan.cp > 1  # which is worth far more


def test_the_cost_model_decides_whatever_the_estimate_expects():
    """Every plan takes a second but one that nothing speaks for."""

    def seconds(plan):
        odd = (plan.tp, plan.pp, plan.schedule, plan.recompute) == (2, 2, "zero_bubble", "full")
        return 0.1 if odd else 1.0

    found = rank(JOB, FOUR, predictions=EVERY, prune=False, **stand_in(seconds))
    plan = found.winner.plan
    assert (plan.tp, plan.pp, plan.schedule, plan.recompute) == (2, 2, "zero_bubble", "full")


def test_what_is_given_is_kept():
    fixed = {"tp": 2, "zero": 1, "recompute": "selective", "micro_batch": 1}
    found = rank(JOB, FOUR, fixed=fixed)
    for each in found.best:
        plan = each.plan
        assert (plan.tp, plan.zero, plan.recompute, plan.micro_batch) == (2, 1, "selective", 1)
    fewer = rank(JOB, FOUR, fixed={"world_size": 2})
    assert {each.plan.world_size for each in fewer.best} == {2}
    with pytest.raises(UserError, match="tp: 3"):
        rank(JOB, FOUR, fixed={"tp": 3})


def test_a_batch_that_all_devices_cannot_share_leaves_some_alone():
    job, alone = replace(JOB, batch_sequences=5), {"pp": 1, "cp": 1, "tp": 1}
    found = rank(job, cluster(pool(devices=8)), fixed=alone)
    assert {each.plan.world_size for each in found.best} == {5}


def test_the_host_helps_where_nothing_else_fits():
    job = Job(llama(4096, 24, 32, 8, 14336), 2048, 4)
    found = rank(job, cluster(pool(devices=1)))
    assert found.winner is not None and found.winner.plan.offload == "optimizer"
    assert rank(job, cluster(pool(devices=1)), fixed={"offload": "none"}).winner is None


def test_what_cannot_fit_comes_with_near_misses():
    found = rank(Job(LLAMA_70B, 4096, 8), cluster(pool(devices=1)))
    assert found.winner is None and found.near_misses
    assert {broken.name for each in found.near_misses for broken in each.broken} == {"memory"}
    assert found.too_large + found.unseen >= found.considered
    # Among them is the one that comes nearest.
    smallest = min(each.prediction.memory.total.value for each in found.near_misses)
    some = rank(
        Job(LLAMA_70B, 4096, 8), cluster(pool(devices=1)), fixed={"zero": 0, "offload": "none"}
    )
    assert smallest <= min(each.prediction.memory.total.value for each in some.near_misses)


def test_constraints_are_kept():
    free = rank(JOB, FOUR)
    size = free.winner.prediction.memory.total.value
    tight = rank(JOB, FOUR, constraints=Constraints(memory_bytes=0.6 * size))
    assert tight.winner.prediction.memory.total.value <= 0.6 * size
    assert tight.winner.score > free.winner.score
    watts = free.winner.prediction.joules / free.winner.prediction.step_seconds.value
    calm = rank(JOB, FOUR, constraints=Constraints(watts=0.9 * watts))
    for each in calm.best:
        assert each.prediction.joules / each.prediction.step_seconds.value <= 0.9 * watts
    steps, seconds = 100, free.winner.prediction.step_seconds.value
    late = Constraints(deadline_seconds=0.5 * steps * seconds, tokens=steps * JOB.batch_tokens)
    assert rank(JOB, FOUR, constraints=late).winner is None


def test_money_and_energy_can_ask_for_fewer_devices():
    """Talking over a slow network costs money too: the fewer devices, the less of it."""
    thin = replace(BETWEEN, up=1e8, down=1e8)
    slow = replace(pool(nodes=4, dollars_per_hour=2.0), between=thin)
    machine = cluster(slow)
    quick = rank(JOB, machine).winner
    cheap = rank(JOB, machine, objective=Objective({"cost": 1.0})).winner
    frugal = rank(JOB, machine, objective=Objective({"energy": 1.0})).winner
    assert cheap.prediction.dollars < quick.prediction.dollars
    assert frugal.prediction.joules < quick.prediction.joules
    assert cheap.plan.world_size < machine.devices
    mixed = rank(JOB, machine, objective=Objective({"time": 0.5, "cost": 0.5})).winner
    assert mixed.prediction.dollars <= quick.prediction.dollars * (1 + NOISE)


def test_a_cpu_is_searched_from_one_worker_to_one_a_core():
    here = machines_here(Machine(devices=1, device_kind="cpu", cores=4, memory_bytes=64 * 10**9))
    assert [machine.devices for machine in here] == [1, 2, 3, 4]
    job = Job(llama(128, 2, 2, 1, 256, 512), 64, 12)
    fixed = {"recompute": "none", "cp": 1, "schedule": "1f1b"}
    found = rank(job, here, fixed=fixed, top=EVERY, predictions=EVERY)
    assert {each.plan.world_size for each in found.best} == {1, 2, 3, 4}
    assert {each.plan.threads * each.plan.world_size for each in found.best} <= {3, 4}
    for each in found.best:
        assert each.cluster.devices == each.plan.world_size


def test_a_recipe_says_what_is_open():
    recipe = Recipe.model_validate(
        {
            "model": {"family": "llama", "preset": "4m"},
            "training": {"steps": 10, "batch_sequences": 16, "recompute": "full"},
            "parallel": {"tp": 2, "micro_batch": "auto", "threads": 3, "stage_layers": None},
            "data": {"sequence_length": 128},
        }
    )
    asked = asked_of(recipe, llama(256, 4, 8, 4, 512, 1000), FOUR, has_compiler=True)
    assert asked.job.batch_tokens == 16 * 128
    assert asked.fixed == {
        "tp": 2,
        "recompute": "full",
        "threads": 3,
        "activation_offload": False,
    }
    found = rank(asked.job, FOUR, like=asked.like, fixed=asked.fixed)
    assert {(each.plan.tp, each.plan.recompute) for each in found.best} == {(2, "full")}
    assert {each.plan.threads for each in found.best} == {3}


def test_near_scores_are_in_the_order_of_simplicity():
    def ranked(plan, score):
        return Ranked(stand_in(lambda _: score)["predict"](JOB, plan, FOUR), FOUR, score)

    plan = rank(JOB, FOUR, top=1).winner.plan
    two = replace(plan, dp_shard=1, zero=0, tp=2, pp=2)
    one = replace(plan, dp_shard=4, zero=3, tp=1, pp=1)
    found = in_order([ranked(two, 1.0), ranked(one, 1.005), ranked(two, 1.2), ranked(one, 1.3)], 4)
    assert [(each.plan, each.score) for each in found] == [
        (one, 1.005),
        (two, 1.0),
        (two, 1.2),
        (one, 1.3),
    ]


def test_the_same_every_time():
    """Whatever the seed of Python's hashes."""
    script = (
        "from tests.planner.search.test_ranking import *\n"
        "from tests.planner.search.machines import *\n"
        "slow = cluster(pool(), pool('slow', SLOW))\n"
        "print([each.plan.hash for each in rank(JOB, slow, predictions=12).best])"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1 and len(outputs.pop()) > 100
