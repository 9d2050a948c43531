"""What this process is doing: its collectives and lines of code, as a heartbeat."""

from __future__ import annotations

import threading
from dataclasses import replace
from types import FrameType

from trainwright.comm.calls import Call
from trainwright.comm.hooks import LEDGER
from trainwright.comm.stacks import frames, is_resting, place
from trainwright.resilience.beats import Beat, Past, State, Wait, count_key


def look(before: Beat, main: int, *, quiet: float, full: bool, failed: Call | None = None) -> Beat:
    """The beat after `before`; `main` is the thread that trains.

    `full` adds what other ranks need for a comparison. `failed` is a collective that has raised: to
    the others the rank still is in it.
    """
    stacks = frames()
    waits = [_wait(call) for call in list(LEDGER.inside.values())]
    if failed is not None:
        waits.append(_wait(failed))
    return replace(
        before,
        number=before.number + 1,
        place=place(stacks.get(main)),
        quiet=quiet,
        computing=_computes(stacks, main),
        waits=tuple(waits),
        counts=_counts() if full else {},
        history=_history() if full else {},
    )


def with_state(beat: Beat, state: State) -> Beat:
    """The next beat, in another state."""
    return replace(beat, number=beat.number + 1, state=state)


def _computes(stacks: dict[int, FrameType], main: int) -> bool:
    """Whether any thread that talks to other ranks is neither in a collective nor at rest."""
    watched = {main, *LEDGER.talkers} & stacks.keys() - {threading.get_ident()}
    return any(thread not in LEDGER.inside and not is_resting(stacks[thread]) for thread in watched)


def _wait(call: Call) -> Wait:
    return Wait(
        call.collective,
        call.group,
        call.facts.key,
        call.facts.ranks,
        call.sequence,
        call.sizes_text,
        call.place,
        call.peer,
    )


def past(call: Call) -> Past:
    """The call as it is told to other ranks."""
    return Past(call.collective, call.sequence, call.sizes_text, call.place)


def _counts() -> dict[str, int]:
    return {count_key(*counter): count for counter, count in list(LEDGER.counts.items())}


def _history() -> dict[str, tuple[Past, ...]]:
    return {
        key: tuple(past(call) for call in list(calls))
        for key, calls in list(LEDGER.history.items())
    }
