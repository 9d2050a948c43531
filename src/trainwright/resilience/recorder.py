"""The last collectives of a rank, in a file that outlives it.

A call that does not fit the other ranks' may abort the process from inside of the library (gloo
does, when sizes differ), without an exception. The file is a small ring in shared memory, so the
newest call is always in it, and writing one costs no system call.
"""

from __future__ import annotations

import mmap
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from trainwright.comm.calls import Call
from trainwright.comm.hooks import LEDGER
from trainwright.resilience.beats import Past
from trainwright.resilience.verdict import disagree, ranks_text, tell_difference

SLOTS, SLOT = 32, 512  # calls kept, bytes for each
MOST_SIZES, MOST_PLACE = 120, 200  # letters
NEXT = "\x1f"  # between fields


class Recorder:
    """Writes every collective of this process, until `close`."""

    def __init__(self, logs: Path, rank: int) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self.path = file_of(logs, rank)
        with self.path.open("w+b") as file:
            file.truncate(SLOTS * SLOT)
            self._memory = mmap.mmap(file.fileno(), SLOTS * SLOT)
        self._count = 0
        self._ranks: dict[str, str] = {}
        LEDGER.recorders.append(self.write)

    def write(self, call: Call) -> None:
        """Put `call` in the place of the oldest."""
        if call.peer is not None:
            return
        key = call.facts.key
        ranks = self._ranks.setdefault(key, "") or ranks_text(call.facts.ranks)
        self._ranks[key] = ranks
        fields = (
            key,
            call.group,
            ranks,
            str(call.sequence),
            call.collective,
            call.sizes_text[:MOST_SIZES],
            call.place[-MOST_PLACE:],
        )
        text = NEXT.join(fields).encode()[:SLOT]
        start = self._count % SLOTS * SLOT
        self._memory[start : start + SLOT] = text.ljust(SLOT, b"\0")
        self._count += 1

    def close(self) -> None:
        """Record no more, and remove the file: nothing went wrong."""
        LEDGER.recorders.remove(self.write)
        self._memory.close()
        self.path.unlink(missing_ok=True)


class Recorded(NamedTuple):
    """A call read back."""

    key: str
    group: str
    ranks: str
    past: Past


def file_of(logs: Path, rank: int) -> Path:
    """Where a rank records."""
    return logs / f"calls-rank{rank}.bin"


def find_mismatch(logs: Path) -> str | None:
    """The first place where ranks' records tell of different calls, with their lines."""
    calls: dict[tuple[str, int], dict[int, Recorded]] = defaultdict(dict)
    for file in logs.glob("calls-rank*.bin"):
        rank = int(file.stem.removeprefix("calls-rank"))
        for call in _read(file):
            calls[call.key, call.past.sequence][rank] = call
    for (_, sequence), by_rank in sorted(calls.items(), key=lambda item: item[0][1]):
        first = by_rank[min(by_rank)]
        if any(disagree(first.past, other.past) for other in by_rank.values()):
            pasts = {rank: by_rank[rank].past for rank in sorted(by_rank)}
            return tell_difference(sequence, first.group, first.ranks, pasts)
    return None


def _read(file: Path) -> list[Recorded]:
    found = []
    content = file.read_bytes()
    for start in range(0, len(content), SLOT):
        fields = content[start : start + SLOT].rstrip(b"\0").decode(errors="replace").split(NEXT)
        if len(fields) == 7 and fields[3].isdigit():
            key, group, ranks, sequence, collective, sizes, place = fields
            found.append(Recorded(key, group, ranks, Past(collective, int(sequence), sizes, place)))
    return found
