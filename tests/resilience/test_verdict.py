"""Who is stuck, from heartbeats alone, against playing the collectives through."""

from __future__ import annotations

import itertools
import random

import pytest

from trainwright.resilience.beats import Beat, Past, Wait, count_key
from trainwright.resilience.verdict import find_deadlock

GROUPS = {"a": (0, 1), "b": (1, 2), "c": (0, 2), "d": (0, 1, 2)}
HANG = 15.0


def wait_on(group: str, sequence: int, sizes: str = "float32[4]") -> Wait:
    return Wait("all_reduce", "tp", group, GROUPS[group], sequence, sizes, f"model.py:{sequence}")


def play(programs: list[list[str]]) -> dict[int, Beat]:
    """Beats of ranks that have called these groups in turn, as far as they could get."""
    called = [0] * len(programs)  # calls of each rank that have begun
    counts: list[dict[str, int]] = [dict.fromkeys(GROUPS, 0) for _ in programs]
    moved = True
    while moved:
        moved = False
        for rank, program in enumerate(programs):
            if called[rank] and not arrived(program[called[rank] - 1], rank, counts):
                continue
            if called[rank] < len(program):
                counts[rank][program[called[rank]]] += 1
                called[rank] += 1
                moved = True
    beats = {}
    for rank, program in enumerate(programs):
        waits: tuple[Wait, ...] = ()
        if called[rank] and not arrived(program[called[rank] - 1], rank, counts):
            group = program[called[rank] - 1]
            waits = (wait_on(group, counts[rank][group]),)
        beats[rank] = Beat(
            rank,
            state="running" if waits else "finished",
            quiet=HANG,
            computing=False,
            waits=waits,
            counts={count_key(group): count for group, count in counts[rank].items()},
        )
    return beats


def arrived(group: str, rank: int, counts: list[dict[str, int]]) -> bool:
    """Whether all members have called what `rank` has called last on the group."""
    return all(counts[member][group] >= counts[rank][group] for member in GROUPS[group])


def test_every_rank_that_can_never_go_on_is_named_and_no_other():
    rng = random.Random(3)
    hangs = 0
    for _ in range(3000):
        programs = [
            [rng.choice([g for g in GROUPS if rank in GROUPS[g]]) for _ in range(rng.randint(0, 4))]
            for rank in range(3)
        ]
        beats = play(programs)
        stuck = [rank for rank in beats if beats[rank].waits]
        text = find_deadlock(beats, 3, HANG)
        hangs += text is not None
        assert (text is not None) == bool(stuck), programs
        for rank in stuck:
            assert f"  rank {rank} (" in text, programs
        # Whoever waits, directly or not, for a rank that computes is not stuck.
        for slow in range(3):
            with_slow = {**beats, slow: Beat(slow, counts=beats[slow].counts)}
            accused = find_deadlock(with_slow, 3, HANG) or ""
            assert f"  rank {slow} (" not in accused
            for rank in stuck:
                wait = beats[rank].waits[0]
                behind = [
                    member
                    for member in wait.ranks
                    if beats[member].counts[count_key(wait.key)] < wait.sequence
                ]
                if behind == [slow]:
                    assert f"  rank {rank} (" not in accused
    assert hangs > 500


def test_short_waits_and_missing_beats_accuse_nobody():
    beats = play([["a"], ["b"], ["c"]])
    assert find_deadlock(beats, 3, HANG) is not None
    young = {rank: Beat(**{**vars(beat), "quiet": HANG - 1}) for rank, beat in beats.items()}
    assert find_deadlock(young, 3, HANG) is None
    for kept in itertools.combinations(beats, 2):
        assert find_deadlock({rank: beats[rank] for rank in kept}, 3, HANG) is None


def test_a_long_transfer_is_no_hang():
    """All have called the same: that it takes minutes is the network's matter."""
    counts = {count_key("a"): 7}
    history = {"a": (Past("all_reduce", 7, "float32[4]"),)}
    beats = {
        rank: Beat(
            rank,
            quiet=300,
            computing=False,
            waits=(wait_on("a", 7),),
            counts=counts,
            history=history,
        )
        for rank in (0, 1)
    }
    assert find_deadlock(beats, 2, HANG) is None


@pytest.mark.parametrize("other", [Past("broadcast", 7, "float32[4]"), Past("all_reduce", 7, "?")])
def test_a_call_answered_by_another_is_a_hang(other):
    counts = {count_key("a"): 7}
    beats = {
        rank: Beat(
            rank,
            quiet=HANG,
            computing=False,
            waits=(Wait(past.collective, "tp", "a", (0, 1), 7, past.sizes, "x.py:1"),),
            counts=counts,
            history={"a": (past,)},
        )
        for rank, past in enumerate([Past("all_reduce", 7, "float32[4]"), other])
    }
    text = find_deadlock(beats, 2, HANG)
    assert text is not None and "number 7 on the group tp" in text
    assert f"rank 1 called {other.collective}" in text


def test_beats_survive_the_journey():
    beat = play([["a"], ["b"], ["c"]])[1]
    beat = Beat(**{**vars(beat), "history": {"a": (Past("all_reduce", 1, "float32[4]", "x:1"),)}})
    assert Beat.from_json(beat.to_json()) == beat
