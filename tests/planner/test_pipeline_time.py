"""The quick way through a schedule against the plain one."""

from __future__ import annotations

import random

import pytest

from trainwright.planner.cost.pipeline import pipeline_time
from trainwright.planner.cost.stage import StageTimes, Work
from trainwright.planner.plan import Plan
from trainwright.planner.schedules import make_schedule, placement
from trainwright.planner.timeline import simulate

SCHEDULES = [
    ("gpipe", 1),
    ("1f1b", 1),
    ("interleaved", 2),
    ("interleaved", 4),
    ("zero_bubble", 1),
    ("zbv", 2),
    ("dualpipev", 2),
]


def _plan(name: str, pp: int, virtual: int) -> Plan:
    return Plan(
        world_size=pp,
        dp_replicate=1,
        dp_shard=1,
        micro_batch=1,
        accumulation=1,
        threads=1,
        precision="bf16",
        recompute="none",
        compile=False,
        device="cuda",
        sequence_length=128,
        optimizer="adamw",
        pp=pp,
        schedule=name,  # type: ignore[arg-type]
        virtual_stages=virtual,
        stage_layers=(1,) * (pp * virtual),
    )


@pytest.mark.parametrize(("name", "virtual"), SCHEDULES)
@pytest.mark.parametrize("pp", [2, 4, 8])
def test_uneven_stages_take_as_long_as_simulated(name: str, virtual: int, pp: int) -> None:
    draw = random.Random(pp)
    stages = pp * virtual
    passes = [[draw.uniform(1, 2) for _ in range(stages)] for _ in range(3)]
    transfers = [draw.uniform(0, 0.3) for _ in range(stages - 1)]
    times = [
        StageTimes(Work(products=f), Work(products=i), Work(products=w))
        for f, i, w in zip(*passes, strict=True)
    ]
    plan = _plan(name, pp, virtual)

    def simulated(many: int) -> float:
        schedule = make_schedule(name, pp, virtual, many)
        return simulate(schedule, placement(name, pp, virtual), *passes, transfers).makespan

    few, many = 2 * pp + 1, 16 * pp + 3
    found, timeline = pipeline_time(plan, few, times, transfers, whole=False)
    assert found == pytest.approx(simulated(few), rel=1e-12)
    assert timeline is None
    # Told from its first rounds; where none repeats another exactly, within a hundredth.
    found, _ = pipeline_time(plan, many, times, transfers, whole=False)
    assert found == pytest.approx(simulated(many), rel=0.01)


def test_a_timeline_is_kept_where_it_is_wanted() -> None:
    times = [StageTimes(Work(products=1.0), Work(products=1.0), Work(products=1.0))] * 2
    found, timeline = pipeline_time(_plan("1f1b", 2, 1), 4, times, [0.5], whole=True)
    assert timeline is not None
    assert timeline.makespan == found
    assert sum(len(actions) for actions in timeline.ranks) == 2 * 4 * 2
