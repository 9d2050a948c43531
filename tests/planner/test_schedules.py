"""Pipeline schedules: complete, executable, and as good as their papers say."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest

from trainwright.planner.schedules import (
    SCHEDULES,
    Action,
    make_schedule,
    placement,
    schedule_mistakes,
    splits_backward,
)
from trainwright.planner.timeline import needs, simulate

VIRTUAL = {"interleaved": (2, 3, 4), "zero_bubble": (1, 2, 3), "zbv": (2,), "dualpipev": (2,)}
GRID = [
    (name, ranks, virtual, micro_batches)
    for name in SCHEDULES
    for ranks in (1, 2, 3, 4, 5, 8)
    for virtual in VIRTUAL.get(name, (1,))
    for micro_batches in (*range(1, 14), 16, 17, 24, 31)
    if not schedule_mistakes(name, ranks, virtual, micro_batches)
]


def timeline(name, ranks, virtual, micro_batches, forward=1.0, inputs=1.0, weights=1.0, **more):
    stages = ranks * virtual
    return simulate(
        make_schedule(name, ranks, virtual, micro_batches),
        placement(name, ranks, virtual),
        [forward] * stages,
        [inputs] * stages,
        [weights] * stages,
        **more,
    )


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_action_once_where_its_stage_is(name):
    for case in (case for case in GRID if case[0] == name):
        _, ranks, virtual, micro_batches = case
        schedule, places = make_schedule(*case), placement(*case[:3])
        assert len(places) == ranks * virtual
        assert Counter(places) == dict.fromkeys(range(ranks), virtual)
        seen = Counter(action for actions in schedule for action in actions)
        assert set(seen.values()) == {1}, case
        for stage in range(ranks * virtual):
            for micro_batch in range(micro_batches):
                kinds = {kind for kind in "FBIW" if Action(kind, stage, micro_batch) in seen}
                assert kinds in ({"F", "B"}, {"F", "I", "W"}), case
        assert len(seen) == sum(len(actions) for actions in schedule)
        assert all(places[a.stage] == rank for rank, part in enumerate(schedule) for a in part)
        assert splits_backward(name) == any(action.kind == "W" for action in seen)


@pytest.mark.parametrize("name", SCHEDULES)
def test_nothing_waits_for_ever_nor_starts_too_early(name):
    for case in (case for case in GRID if case[0] == name):
        _, ranks, virtual, _ = case
        line = timeline(*case, forward=1.0, inputs=1.3, weights=0.7, transfer=0.25)
        ends = {timed.action: timed.end for rank in line.ranks for timed in rank}
        for rank in line.ranks:
            for before, after in pairwise(rank):
                assert after.start >= before.end
            for action, start, _ in rank:
                for need in needs(action, ranks * virtual):
                    whole = need._replace(kind="B")
                    end = ends[whole if need.kind == "I" and whole in ends else need]
                    assert start >= end, (case, action)


@pytest.mark.parametrize("name", SCHEDULES)
def test_micro_batches_cross_a_boundary_in_their_order(name):
    for case in (case for case in GRID if case[0] == name):
        for actions in make_schedule(*case):
            for kinds in ("F", "BI", "W"):
                for stage in {action.stage for action in actions}:
                    turns = [a.micro_batch for a in actions if a.stage == stage and a.kind in kinds]
                    assert turns == sorted(turns), case


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "interleaved"])
def test_bubble_equals_the_closed_form(name):
    """(p - 1)(tF + tB) / v for chunks that take 1/v of a rank's time."""
    for case in (case for case in GRID if case[0] == name):
        _, ranks, virtual, micro_batches = case
        if micro_batches < ranks and name == "interleaved":
            continue  # chunks wait for a group that is too small: more than the formula
        line = timeline(*case, forward=1.0, inputs=1.25, weights=1.0)
        work = micro_batches * virtual * 3.25
        assert line.makespan - work == pytest.approx((ranks - 1) * 3.25), case
        assert max(line.idle) == pytest.approx(1 - work / line.makespan)
        if name != "interleaved":
            fraction = (ranks - 1) / (micro_batches + ranks - 1)
            assert line.idle == pytest.approx([fraction] * ranks)


def test_split_backward_passes_shorten_the_bubble():
    for ranks in (2, 4, 8):
        for micro_batches in (2 * ranks, 2 * ranks + 3, 4 * ranks):
            plain = timeline("1f1b", ranks, 1, micro_batches).idle[0]
            # ZB-H1 loses (p - 1)(tF + tB - tW), a third of it.
            line = timeline("zero_bubble", ranks, 1, micro_batches)
            assert line.makespan - 3 * micro_batches == pytest.approx(ranks - 1)
            for name in ("zbv", "dualpipev"):
                assert max(timeline(name, ranks, 2, micro_batches).idle) < plain / 2
            assert max(timeline("zero_bubble", ranks, 2, micro_batches).idle) < plain / 2


def test_activations_kept():
    for ranks in (2, 3, 4, 8):
        for m in (1, 2, ranks, 3 * ranks):
            assert timeline("gpipe", ranks, 1, m).in_flight == (m,) * ranks
            kept = tuple(min(m, ranks - rank) for rank in range(ranks))
            assert timeline("1f1b", ranks, 1, m).in_flight == kept
            assert max(timeline("zero_bubble", ranks, 1, m).in_flight) <= ranks
            assert max(timeline("zbv", ranks, 2, m).in_flight) <= 2 * ranks
        for v in (2, 3):
            line = timeline("interleaved", ranks, v, 4 * ranks)
            chunks = (2 * (ranks - rank - 1) + (v - 1) * ranks + 1 for rank in range(ranks))
            assert line.in_flight == tuple(chunks)
        assert max(timeline("dualpipev", ranks, 2, 4 * ranks).in_flight) == 2 * ranks + 1


def test_slow_stages_and_transfers_show():
    schedule, places = make_schedule("1f1b", 2, 1, 4), placement("1f1b", 2, 1)
    even = simulate(schedule, places, [1, 1], [1, 1], [1, 1])
    slow = simulate(schedule, places, [1, 2], [1, 2], [1, 2])
    assert slow.makespan == pytest.approx(4 * 6 + 3)  # the slow rank never waits but at the ends
    assert slow.idle[0] > even.idle[0] > slow.idle[1]
    late = simulate(schedule, places, [1, 1], [1, 1], [1, 1], transfer=0.5)
    assert late.makespan > even.makespan
    v = make_schedule("zbv", 1, 2, 2)  # both stages on one rank: nothing travels
    near, far = (simulate(v, (0, 0), *[[1, 1]] * 3, transfer=t) for t in (0.0, 9.0))
    assert near == far


def test_a_schedule_that_halts_is_named():
    schedule = make_schedule("1f1b", 2, 1, 2)
    schedule[1].reverse()
    with pytest.raises(ValueError, match="rank 1 at"):
        simulate(schedule, (0, 1), [1, 1], [1, 1], [1, 1])
    with pytest.raises(ValueError, match="comes to a halt"):  # an action that nobody does
        simulate([schedule[0], []], (0, 1), [1, 1], [1, 1], [1, 1])


@pytest.mark.parametrize(
    ("case", "key", "fix"),
    [
        (("1f1d", 2, 1, 4), "parallel.schedule", "schedule: 1f1b"),
        (("1f1b", 2, 2, 4), "parallel.virtual_stages", "virtual_stages: 1"),
        (("gpipe", 2, 3, 4), "parallel.virtual_stages", "virtual_stages: 1"),
        (("interleaved", 2, 1, 4), "parallel.virtual_stages", "virtual_stages: 2"),
        (("zbv", 2, 1, 4), "parallel.virtual_stages", "virtual_stages: 2"),
        (("dualpipev", 2, 3, 4), "parallel.virtual_stages", "virtual_stages: 2"),
        (("dualpipev", 4, 2, 7), "parallel.micro_batch", "schedule: zbv"),
        (("1f1b", 4, 1, 0), "parallel.micro_batch", "larger batch"),
    ],
)
def test_what_there_is_not_is_refused_with_the_nearest(case, key, fix):
    (mistake,) = schedule_mistakes(*case)
    assert mistake.key == key
    assert fix in mistake.fix
    with pytest.raises(ValueError, match=r"fix:"):
        make_schedule(*case)
