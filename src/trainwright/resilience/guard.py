"""Around a worker's whole work: the watchdog beside it, and its failure reported."""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainwright.comm.hooks import LEDGER
from trainwright.errors import UserError
from trainwright.resilience.board import open_board
from trainwright.resilience.reports import report_failure
from trainwright.resilience.watchdog import Limits, Watchdog


@contextmanager
def watched(logs: Path, limits: Limits | None = None) -> Iterator[None]:
    """Do the work of the rank that the launcher's environment describes, watched.

    Enter it before the process group is joined. An error that leaves the block is written among
    the logs, if that folder is there, and to standard error with the rank, if it is no UserError;
    then the other ranks end. A rank without others ends when the process that launched it has.
    If it came of ranks that called different collectives, it says how those differ.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    dog = None
    if world_size > 1:
        dog = Watchdog(open_board, rank, world_size, logs, siblings=_siblings(rank), limits=limits)
        dog.start()
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        _end_with_launcher()
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        comparison = dog.fail(error) if dog is not None else ""
        # Wrong arguments are this rank's own mistake; a broken connection is not.
        in_collective = isinstance(error, RuntimeError) and LEDGER.failed_call(error) is not None
        text = traceback.format_exc()
        report_failure(logs, rank, error, text, in_collective=in_collective, comparison=comparison)
        if not isinstance(error, UserError):
            said = f"{comparison}\n{text}" if comparison else text
            print(f"rank {rank} failed: {said}", file=sys.stderr, flush=True)
        if dog is not None:
            dog.release()
        raise
    if dog is not None:
        dog.finish()


def _end_with_launcher(seconds: float = 1.0) -> None:
    """Have a rank without others end when the process that launched it has been killed: it lives in
    a session of its own, and would train on beside the one that takes its run up again.
    """
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(seconds)
        print(
            "the launching process has ended, and so does its worker", file=sys.stderr, flush=True
        )
        os._exit(1)

    threading.Thread(target=watch, name="launcher", daemon=True).start()


def _siblings(rank: int) -> range:
    """Ranks on this machine, by the launcher's word: they are numbered one after the other."""
    local = int(os.environ.get("LOCAL_RANK", rank))
    count = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return range(rank - local, rank - local + count)
