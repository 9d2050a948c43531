"""Layers over unequal stages: no split is better than the one that the dynamic program finds."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from trainwright.planner.schedules import make_schedule
from trainwright.planner.search.stages import Stages, split_stages
from trainwright.planner.timeline import simulate


def random_stages(seed):
    """Layers and stages of random times, sizes and room; the first and last layers are larger."""
    rng = np.random.default_rng(seed)
    count, layers = int(rng.integers(1, 5)), int(rng.integers(4, 9))
    seconds, memory = rng.integers(1, 6, layers), rng.uniform(0.5, 2, (count, layers))
    for ends in (seconds, memory.T):
        ends[0] += 2 * rng.random()
        ends[-1] += 4 * rng.random()
    speeds = rng.uniform(0.3, 1, (count, 1))
    return Stages(seconds / speeds, memory, rng.uniform(4, 12, count))


def every_split(layers, count):
    for cuts in itertools.combinations(range(1, layers), count - 1):
        yield tuple(b - a for a, b in itertools.pairwise((0, *cuts, layers)))


def costs(stages, split):
    """Seconds of each stage, added up layer by layer; None where one does not fit."""
    first, times = 0, []
    for stage, many in enumerate(split):
        own = range(first, first + many)
        first += many
        if sum(stages.memory[stage, layer] for layer in own) > stages.limits[stage]:
            return None
        times.append(sum(stages.seconds[stage, layer] for layer in own))
    return times


@pytest.mark.parametrize("seed", range(60))
def test_no_split_is_better(seed):
    stages = random_stages(seed)
    count, layers = stages.seconds.shape
    for micro_batches in (1, 2, 8, 100):
        totals = {}
        for split in every_split(layers, count):
            times = costs(stages, split)
            if times is not None:
                totals[split] = sum(times) + (micro_batches - 1) * max(times)
        found = split_stages(stages, micro_batches)
        if not totals:
            assert found is None
        else:
            assert totals[found] == pytest.approx(min(totals.values()), rel=1e-6)
            assert stages.pipeline_seconds(found, micro_batches) == pytest.approx(totals[found])


def test_what_does_not_fit_takes_for_ever():
    stages = random_stages(3)
    count, layers = stages.seconds.shape
    for split in every_split(layers, count):
        seconds = stages.pipeline_seconds(split, 4)
        assert math.isinf(seconds) == (costs(stages, split) is None)


def test_head_and_embedding_get_fewer_layers_beside_them():
    """A head that takes as long as six layers, and an embedding that leaves room for one only."""
    layers, count = 16, 4
    seconds, memory = np.ones((2, count, layers))
    seconds[:, -1] += 6
    memory[:, 0] += 9
    stages = Stages(seconds, memory, np.full(count, 10.0))
    split = split_stages(stages, 32)
    assert split[0] == 1 and split[-1] == 1 and sorted(split[1:3]) == [7, 7]
    # The pipeline itself, action by action, is quicker for it than with the layers shared evenly.
    assert step(stages, split) < 0.8 * step(stages, (4, 4, 4, 4))


def step(stages, split, micro_batches=32):
    """A 1F1B pipeline in time; a third of a stage goes forward."""
    roomy = replace(stages, limits=99 * stages.limits)
    times = np.array(costs(roomy, split))
    schedule = make_schedule("1f1b", len(split), 1, micro_batches)
    return simulate(schedule, range(len(split)), times / 3, times / 3, times / 3).makespan


def test_layers_follow_speed():
    """Devices of speeds 1 and 3: a quarter of the layers and three."""
    seconds = np.array([[1.0], [1 / 3]]) * np.ones(32)
    stages = Stages(seconds, np.ones((2, 32)), np.full(2, 100.0))
    assert split_stages(stages, 64) == (8, 24)
