"""From all ranks' heartbeats to what is wrong, as pure functions: who is stuck, and in what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from trainwright.resilience.beats import Beat, Past, Wait, count_key

MOST_LINES = 16  # of ranks listed

ADVICE = (
    "All ranks of a group must call the same collectives in the same order and with the same "
    "sizes: look for a branch, a loop's length or an early return that differs between them."
)


def find_deadlock(beats: Mapping[int, Beat], world_size: int, hang_seconds: float) -> str | None:
    """Ranks that wait for each other for ever, told with where each waits; None if there are none.

    A rank is stuck when each of its collectives lacks a member that is stuck itself or has
    finished, or was answered by another collective. One that computes, or whose beat is missing,
    is neither, nor is any that waits for it. `beats` may be some seconds old: only waits of
    `hang_seconds` count, which is older, so that there was a moment with all of them.
    """
    stuck = {rank for rank, beat in beats.items() if beat.is_waiting and beat.quiet >= hang_seconds}
    gone = {rank for rank, beat in beats.items() if beat.state == "finished"}
    while True:
        free = {
            rank
            for rank in stuck
            if not all(
                _differs(wait, rank, stuck, beats) or missing(wait, rank, beats) & (stuck | gone)
                for wait in beats[rank].waits
            )
        }
        if not free:
            break
        stuck -= free
    if not stuck:
        return None
    return _tell_deadlock({rank: beats[rank] for rank in sorted(stuck)}, gone, beats, world_size)


def missing(wait: Wait, rank: int, beats: Mapping[int, Beat]) -> set[int]:
    """Ranks that have not called yet what `rank` waits in; of those that have told their counts."""
    if wait.collective == "receive":
        return _behind({wait.peer} if wait.peer is not None else set(), wait, "to", rank, beats)
    if wait.collective == "send":
        return _behind({wait.peer} if wait.peer is not None else set(), wait, "from", rank, beats)
    return _behind(set(wait.ranks) - {rank}, wait, "", -1, beats)


def _behind(
    members: set[int], wait: Wait, way: str, peer: int, beats: Mapping[int, Beat]
) -> set[int]:
    key = count_key(wait.key, way, peer)
    return {
        member
        for member in members
        if (beat := beats.get(member)) is not None and beat.counts.get(key, 0) < wait.sequence
    }


def _differs(wait: Wait, rank: int, stuck: set[int], beats: Mapping[int, Beat]) -> bool:
    """Whether a stuck rank answered the call with another."""
    own = Past(wait.collective, wait.sequence, wait.sizes)
    return any(
        (other := counterpart(wait, beats.get(member))) is not None and disagree(own, other)
        for member in wait.ranks
        if member != rank and member in stuck
    )


def counterpart(wait: Wait, beat: Beat | None) -> Past | None:
    """What another rank called on the same group as its call of that number, if it is known."""
    if beat is None or wait.peer is not None:
        return None
    return next(
        (past for past in beat.history.get(wait.key, ()) if past.sequence == wait.sequence), None
    )


def disagree(one: Past, other: Past) -> bool:
    """Whether two ranks' calls cannot belong together."""
    return one.collective != other.collective or one.sizes != other.sizes


def describe_wait(wait: Wait) -> str:
    """`all_reduce 41 on tp (ranks 0, 1) of float32[4, 8], at trainwright/training/step.py:97`."""
    if wait.peer is not None:
        way = "to" if wait.collective == "send" else "from"
        call = f"{wait.collective} {wait.sequence} {way} rank {wait.peer} on {wait.group}"
    else:
        call = f"{wait.collective} {wait.sequence} on {wait.group} (ranks {ranks_text(wait.ranks)})"
    sizes = f" of {wait.sizes}" if wait.sizes else ""
    return f"{call}{sizes}" + (f", at {wait.place}" if wait.place else "")


def describe_rank(beat: Beat) -> str:
    """What a rank was doing last."""
    if beat.waits:
        return "; ".join(describe_wait(wait) for wait in beat.waits)
    return f"at {beat.place}" if beat.place else "before its first line"


def ranks_text(ranks: tuple[int, ...] | list[int]) -> str:
    """`0, 1, 2, 3`, or `0, 1, 2 … 511` for many."""
    if len(ranks) <= 8:
        return ", ".join(map(str, ranks))
    return f"{', '.join(map(str, ranks[:3]))} … {ranks[-1]}: {len(ranks)} of them"


def compare(wait: Wait, rank: int, beats: Mapping[int, Beat]) -> str | None:
    """What other ranks of the group called where `rank` called `wait`, if that was another thing.

    Libraries fail obscurely when sizes differ ("op.preamble.length <= op.nbytes").
    """
    own = Past(wait.collective, wait.sequence, wait.sizes, wait.place)
    calls = {rank: own}
    finished = []
    for member in wait.ranks:
        if member == rank or member not in beats:
            continue
        other = counterpart(wait, beats[member])
        if other is not None:
            calls[member] = other
        elif beats[member].state == "finished":
            finished.append(member)
    if not finished and not any(disagree(own, other) for other in calls.values()):
        return None
    ranks = ranks_text(wait.ranks)
    return tell_difference(wait.sequence, wait.group, ranks, dict(sorted(calls.items())), finished)


def tell_difference(
    sequence: int, group: str, ranks: str, calls: Mapping[int, Past], finished: Sequence[int] = ()
) -> str:
    """What each rank called as its call of number `sequence` on the group."""
    lines = [
        f"  rank {rank} called {_past_text(call)}" + (f", at {call.place}" if call.place else "")
        for rank, call in calls.items()
    ]
    lines += [f"  rank {rank} had finished by then" for rank in finished]
    listed = "\n".join(_cut(lines))
    return (
        f"ranks called different collectives as number {sequence} on the group {group} "
        f"(ranks {ranks}):\n{listed}\n{ADVICE}"
    )


def _past_text(past: Past) -> str:
    return past.collective + (f" of {past.sizes}" if past.sizes else "")


def _tell_deadlock(
    stuck: Mapping[int, Beat], gone: set[int], beats: Mapping[int, Beat], world_size: int
) -> str:
    for rank, beat in stuck.items():
        for wait in beat.waits:
            if _differs(wait, rank, set(stuck), beats):
                return f"the run hangs: {compare(wait, rank, beats)}"
    lines = [
        f"  rank {rank} ({beat.host}) waits since {beat.quiet:.0f} s in {describe_rank(beat)}"
        for rank, beat in stuck.items()
    ]
    awaited = {
        member
        for rank, beat in stuck.items()
        for wait in beat.waits
        for member in missing(wait, rank, beats) & gone
    }
    if awaited:
        lines.append(f"  rank {ranks_text(sorted(awaited))} has finished, and is waited for")
    listed = "\n".join(_cut(lines))
    how_many = "all" if len(stuck) == world_size else f"{len(stuck)} of {world_size}"
    return f"the run hangs: {how_many} ranks wait for what will not come\n{listed}\n{ADVICE}"


def _cut(lines: list[str]) -> list[str]:
    if len(lines) <= MOST_LINES:
        return lines
    return [*lines[:MOST_LINES], f"  and {len(lines) - MOST_LINES} more"]
