"""The board that all ranks write their heartbeats on: a key-value store of torch's rendezvous.

Each watchdog has a client of its own, for a store's answer may be long in coming to the thread
that trains. Under an elastic agent (ours or torchrun's) the store lives in the agent, else in
rank 0.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch.distributed as dist

from trainwright.resilience.beats import Beat

PATIENCE_AT_START = timedelta(minutes=30)  # for the store to be there, as torch's rendezvous has
PATIENCE = timedelta(seconds=5)  # for one answer of the store


@dataclass(frozen=True)
class Failure:
    """Why the run ends: the first that any rank has put up."""

    by: int  # rank that tells the user
    kind: str  # "raised", or what `verdict` calls it
    text: str
    lost: int | None = None  # rank that can no longer speak for itself


class Board:
    """Beats, and the one failure, on a store."""

    def __init__(self, store: dist.Store) -> None:
        self._store = store
        self._seen: set[int] = set()  # ranks that have written; a read of others would block

    def publish(self, beat: Beat) -> None:
        """Replace this rank's beat."""
        self._store.set(f"beat/{beat.rank}", beat.to_json())

    def read(self, ranks: Iterable[int]) -> dict[int, Beat]:
        """The newest beats of these ranks; those that never wrote one are left out."""
        known = []
        for rank in ranks:
            if rank in self._seen or self._store.check([f"beat/{rank}"]):
                self._seen.add(rank)
                known.append(rank)
        if not known:
            return {}
        texts = self._store.multi_get([f"beat/{rank}" for rank in known])
        return {
            rank: Beat.from_json(text.decode()) for rank, text in zip(known, texts, strict=True)
        }

    def put_up(self, failure: Failure) -> bool:
        """Announce a failure; whether it is the first, so that its rank is the one to speak."""
        text = json.dumps(asdict(failure))
        return self._store.compare_set("failure", "", text).decode() == text

    def failure(self) -> Failure | None:
        """The announced failure."""
        if not self._store.check(["failure"]):
            return None
        return Failure(**json.loads(self._store.get("failure")))

    def mark_told(self) -> None:
        """The user knows of the failure: the others may go."""
        self._store.set("told", "1")

    def is_told(self) -> bool:
        """Whether the rank that speaks has done so."""
        return self._store.check(["told"])


def open_board(patience: timedelta = PATIENCE_AT_START) -> Board:
    """The board of the run that this process's launcher describes (MASTER_ADDR, MASTER_PORT).

    Waits for the store to answer; RuntimeError when `patience` is at its end.
    """
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=patience,
    )
    store.set_timeout(PATIENCE)
    # A restarted run must not read what was said before.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    job = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return Board(dist.PrefixStore(f"watch/{job}/{attempt}", store))
