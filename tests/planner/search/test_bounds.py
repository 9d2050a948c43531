"""No plan is quicker than its bound, nor smaller, whatever the cost model makes of it."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from tests.planner.search.machines import FAR, LLAMA_70B, SLOW, cluster, llama, mixture, pool
from trainwright.planner.cost.memory import predict_memory
from trainwright.planner.cost.step import predict
from trainwright.planner.job import Job
from trainwright.planner.schedules import SCHEDULES, make_schedule, placement
from trainwright.planner.search.asked import like_of
from trainwright.planner.search.bounds import least_bytes, least_seconds
from trainwright.planner.search.columns import Columns
from trainwright.planner.search.estimate import likely_bytes, likely_seconds
from trainwright.planner.search.grid import make_grid
from trainwright.planner.stacks import MEGATRON, MEGATRON_CORE, TORCHTITAN
from trainwright.planner.timeline import simulate
from trainwright.recipe.schema import Adapter

SMALL = llama()
CASES = {
    "dense": (Job(SMALL, 4096, 64), {}),
    "deep": (Job(llama(1024, 30, 16, 16, 4096), 2048, 96), {}),
    "70B": (Job(LLAMA_70B, 8192, 128), {}),
    "experts": (Job(mixture(), 2048, 64), {}),
    "tied": (Job(llama(tie_word_embeddings=True), 4096, 64), {}),
    "adapter": (Job(LLAMA_70B, 8192, 64, adapter=Adapter(rank=8)), {}),
    "nf4": (Job(SMALL, 4096, 64, adapter=Adapter(rank=8, quantise="nf4")), {}),
    "fp32": (Job(SMALL, 1024, 32), {"precision": "fp32"}),
    "float8": (Job(SMALL, 4096, 64), {"precision": "float8"}),
    "muon": (Job(SMALL, 4096, 64, optimizer="muon"), {}),
    "packed": (Job(SMALL, 4096, 64, visible_share=0.2), {}),
    "megatron": (Job(SMALL, 2048, 64, stack=MEGATRON), {}),
    "megatron-core": (Job(SMALL, 4096, 64, stack=MEGATRON_CORE), {}),
    "torchtitan": (Job(SMALL, 4096, 64, stack=TORCHTITAN), {}),
}
MACHINES = {
    "one": cluster(pool(nodes=4)),
    "two": cluster(pool(nodes=2), pool("slow", SLOW, nodes=2), wide=FAR),
}


def sample(job, machine, more, count, seed=0, offload=True):
    like = replace(like_of(job, machine), **more)
    grid = make_grid(like, [machine.devices], {}, offload)
    some = sorted(random.Random(seed).sample(range(len(grid)), min(count, len(grid))))
    return grid.where(np.array(some))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("machine", MACHINES)
def test_bounds_are_below_predictions(name, machine):
    job, more = CASES[name]
    machine = MACHINES[machine]
    grid = sample(job, machine, more, 60)
    columns = Columns(job, grid)
    seconds, size = least_seconds(columns, machine), least_bytes(columns)
    assert (size > 0).all() and (seconds > 0).all()
    for index in range(len(grid)):
        plan = grid.candidate(index).plan(threads=1, compile=False)
        found = predict(job, plan, machine, simulated=False).step_seconds.value
        assert seconds[index] <= found * (1 + 1e-9), plan
        held = predict_memory(job, plan, machine).total.value
        assert size[index] <= held * (1 + 1e-9), plan


def test_bounds_say_something():
    """Half of the time of the quicker half, and a third of its memory, are known beforehand."""
    job, more = CASES["70B"]
    machine = MACHINES["one"]
    grid = sample(job, machine, more, 100)
    columns = Columns(job, grid)
    seconds = least_seconds(columns, machine) / likely_seconds(columns, machine)
    size = least_bytes(columns) / likely_bytes(columns)
    assert np.median(seconds) > 0.5
    assert np.median(size) > 0.33


def test_pipelines_of_uneven_stages_are_no_quicker_than_the_bound_says():
    """What is said of schedules alone: by simulating them with stages of any times."""
    random_ = random.Random(1)
    for _ in range(150):
        name = random_.choice(list(SCHEDULES))
        ranks, virtual = random_.choice((2, 3, 4, 6)), max(1, SCHEDULES[name].least_virtual)
        many = random_.choice((1, 2, 5, 16)) + (2 * ranks if name == "dualpipev" else 0)
        stages = ranks * virtual
        # A stage's time there and back, a third of it forward.
        times = [random_.uniform(0.7, 1.3) for _ in range(stages)]
        third = [each / 3 for each in times]
        schedule = make_schedule(name, ranks, virtual, many)
        taken = simulate(schedule, placement(name, ranks, virtual), third, third, third).makespan
        mean = sum(times) / ranks
        waits = max(0, ranks - 2) if name == "1f1b" else 0
        through = 1 if SCHEDULES[name].splits else ranks
        assert max(many + waits, through) * mean <= taken * (1 + 1e-9), (name, ranks, many)


def test_estimates_are_near_predictions():
    """They order what is looked at: three of four are within a third of the truth or so."""
    job, machine = CASES["dense"][0], MACHINES["one"]
    grid = sample(job, machine, {}, 100, seed=2, offload=False)
    columns = Columns(job, grid)
    plans = [grid.candidate(index).plan(threads=1, compile=False) for index in range(len(grid))]
    found = [predict(job, p, machine, simulated=False).step_seconds.value for p in plans]
    held = [predict_memory(job, p, machine).total.value for p in plans]
    seconds = np.abs(np.log(likely_seconds(columns, machine) / found))
    size = np.abs(np.log(likely_bytes(columns) / held))
    assert np.quantile(seconds, 0.75) < 0.35
    assert np.quantile(size, 0.75) < 0.35
