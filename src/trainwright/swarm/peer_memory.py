"""What a peer must not lose: its directory, from which it comes back after any crash.

    key.pem               who it is (`swarm.identity`)
    state                 the agreed state before some round, the ledger, and the peer's own vectors
    offered/<round>       its contribution, and its own vectors if the round takes that in
    rounds/<round>/<…>    others' contributions, by digest, while they are needed
    swarm.jsonl           what happened, for people to read

`state` and `offered` are safetensors files, replaced whole. A contribution is in `offered` before
it is on the shelf: a peer that comes back offers the same bytes for the same round again.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import shutil
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from trainwright.errors import Mistake, UserError
from trainwright.files import write_atomically
from trainwright.swarm.ledger import Ledger
from trainwright.swarm.methods.method import Agreed, Own

_SHARE = 40  # of the time at most one part in so many goes into writing either


@dataclass(frozen=True)
class State:
    """All that a peer knows between two rounds; its parts are never changed, only replaced. Later
    ones have greater numbers.
    """

    agreed: Agreed
    own: Own
    ledger: Ledger
    base: str  # hash of agreed state and ledger
    included: bool = False  # this peer's contribution, in the last round
    number: int = field(init=False, compare=False, default_factory=itertools.count().__next__)

    @property
    def electorate(self) -> tuple[str, ...]:
        """Who took part in the last round that agreed on something."""
        return self.ledger.electorate


@dataclass(frozen=True)
class Offered:
    """A peer's own contribution to a round: the message, its digest, and the own state after it;
    `after` is None where a crash took it, and the own state then stays as it was.
    """

    round: int
    digest: str
    data: bytes = field(repr=False)
    after: Own | None = field(repr=False, default=None)


class Memory:
    """The directory, locked: raises UserError where another process has it. What is there of
    another run than `run` is none of this one's.
    """

    def __init__(self, directory: Path, run: str) -> None:
        self.directory, self.run = directory, run
        directory.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(directory / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            what = "another process is this peer already"
            fix = "wait for it to end, or give this one a directory of its own"
            raise UserError(Mistake(what, fix, where=str(directory))) from None
        for left in (*directory.glob(".state.*.tmp"), *directory.glob("offered/.*.tmp")):
            left.unlink(missing_ok=True)  # half a file of a process that was killed
        self._writing = threading.RLock()
        self._saved = -1  # number of the state that stands there
        self._due: dict[str, float] = {}  # when to write again, by what and the monotonic clock

    # The state

    def save(self, state: State) -> None:
        """Replace the state that stands there, unless that is a newer one; from any thread."""
        agreed = state.agreed
        facts = {
            "round": agreed.round,
            "base": state.base,
            "included": state.included,
            "ledger": state.ledger.to_json(),
            "run": self.run,
        }
        outer = {f"outer.{name}": values for name, values in agreed.outer.items()}
        tensors = {"weights": agreed.weights, **outer, **_own(state.own)}
        with self._writing:
            if state.number >= self._saved:
                self._saved = state.number
                self._write("state", "", tensors, facts)

    def load(self) -> State | None:
        """What `save` wrote last; None where nothing readable is."""
        found = _read(self.directory / "state")
        if found is None:
            return None
        tensors, facts = found
        if facts.get("run") != self.run:
            return None
        agreed = Agreed(facts["round"], tensors["weights"], _under("outer.", tensors))
        own = Own(_under("own.", tensors))
        ledger = Ledger.from_json(facts["ledger"])
        return State(agreed, own, ledger, facts["base"], facts.get("included", False))

    def due(self, what: str) -> bool:
        """Whether enough time went by since the last `state` or `offered` for one of its length."""
        return time.monotonic() >= self._due.get(what, 0.0)

    # This peer's contributions

    def keep_offered(self, offered: Offered) -> None:
        """Called before the contribution is published."""
        data = torch.frombuffer(bytearray(offered.data), dtype=torch.uint8)
        tensors = {"data": data, **_own(offered.after or Own())}
        facts = {"digest": offered.digest, "after": offered.after is not None, "run": self.run}
        self._write("offered", str(offered.round), tensors, facts)

    def offered(self, round: int) -> Offered | None:
        """What was offered for a round, if it was kept."""
        found = _read(self.directory / "offered" / str(round))
        if found is None:
            return None
        tensors, facts = found
        if facts.get("run") != self.run:
            return None
        after = Own(_under("own.", tensors)) if facts["after"] else None
        return Offered(round, facts["digest"], tensors["data"].numpy().tobytes(), after)

    # Contributions of others

    def keep_contribution(self, round: int, digest: str, data: bytes) -> None:
        """Keep a message until its round is long over; read again by digest, so not flushed."""
        path = self.directory / "rounds" / str(round) / digest
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(f".{threading.get_ident()}.tmp")
        beside.write_bytes(data)
        beside.replace(path)

    def contribution(self, round: int, digest: str) -> bytes | None:
        """A message that was kept."""
        try:
            return (self.directory / "rounds" / str(round) / digest).read_bytes()
        except FileNotFoundError:
            return None

    def forget(self, contributions: int, offered: int) -> None:
        """Drop contributions of rounds before the one, and what was offered before the other."""
        for name, first in (("rounds", contributions), ("offered", offered)):
            folder = self.directory / name
            for entry in folder.iterdir() if folder.is_dir() else ():
                if entry.name.isdigit() and int(entry.name) < first:
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink(missing_ok=True)

    # The log

    def log(self, event: str, **facts: Any) -> None:
        """Add a line to `swarm.jsonl`: what happened, and when by this machine's clock."""
        line = {"event": event, "time": round(time.time(), 3), **facts}
        with (self.directory / "swarm.jsonl").open("a") as file:
            file.write(json.dumps(line, default=str) + "\n")

    def close(self) -> None:
        """Let another process have the directory."""
        os.close(self._lock)

    def _write(
        self, what: str, name: str, tensors: dict[str, Tensor], facts: dict[str, Any]
    ) -> None:
        with self._writing:
            started = time.monotonic()
            whole = {key: values.contiguous() for key, values in tensors.items()}
            written = save(whole, {"facts": json.dumps(facts)})
            write_atomically(self.directory / what / name, written)
            now = time.monotonic()
            self._due[what] = now + _SHARE * (now - started)


def _own(own: Own) -> dict[str, Tensor]:
    return {f"own.{name}": values for name, values in own.vectors.items()}


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): values
        for name, values in tensors.items()
        if name.startswith(prefix)
    }


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and facts of a file; None where it is not there, or cannot be read."""
    try:
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")  # the header's, as safetensors writes it
        facts = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["facts"])
        return load(data), facts
    except (OSError, ValueError, KeyError, SafetensorError):
        return None
