"""The watchdog: a thread in every worker that sees to it that no worker outlives the run.

Once a second it writes a heartbeat on the board and reads others'. It ends its process when any
rank has failed, when one is stopped, silent or gone, or when ranks wait for each other for ever;
the first rank to see it tells the user. Nobody is accused of being slow: a rank that computes,
compiles or saves keeps its heart beating.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from trainwright.comm.hooks import LEDGER, install
from trainwright.files import write_atomically
from trainwright.resilience.beats import Beat, State
from trainwright.resilience.board import Board, Failure
from trainwright.resilience.observe import look, with_state
from trainwright.resilience.reports import write_verdict
from trainwright.resilience.stacks import place_of_error
from trainwright.resilience.verdict import HANG_SECONDS, compare, describe_rank, find_deadlock

PERIOD = 1.0  # seconds between beats
# Stopped (state T of the system) for so long: longer than anybody who samples a stack needs.
STOPPED_SECONDS = 8.0
# Silence of a rank on another machine, where only silence can be seen. A thread that needs a
# millisecond a second is starved for less even with several workers on each core; and those who
# remain have 30 seconds in all to end.
SILENT_SECONDS = 20.0
WAITING_SECONDS = 4.0  # in one collective, before it is written down
FAREWELL_SECONDS = 5.0  # for the rank that speaks to have spoken
SMALL_WORLD = 32  # up to so many, every rank watches every other
FAILED = 1  # exit code


class Watchdog:
    """Watches the ranks from a thread of this worker's. `open_board` is called in that thread."""

    def __init__(
        self,
        open_board: Callable[[], Board],
        rank: int,
        world_size: int,
        logs: Path,
        *,
        siblings: range | None = None,  # ranks that the same launcher started on this machine
    ) -> None:
        self.rank, self.world_size, self.logs = rank, world_size, logs
        self.open_board = open_board
        near = set(siblings or ())
        others = range(world_size) if world_size <= SMALL_WORLD else near
        self.watched = sorted({*others, (rank + 1) % world_size} - {rank})
        self.board: Board | None = None
        self.beat = Beat(rank, host=socket.gethostname(), pid=os.getpid(), parent=os.getppid())
        self._pulses: dict[int, _Pulse] = {}
        self._stopping = threading.Event()
        self._failing = threading.Event()  # the main thread is on its way out with an error
        self._unheard = 0.0  # seconds without an answer of the store
        self._moves, self._quiet = -1, 0.0
        self._main = threading.main_thread().ident or 0
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        """Watch from now on."""
        install()
        self._thread.start()

    def finish(self) -> None:
        """This rank is done: it needs the others no more, nor they it."""
        self._stopping.set()
        self._thread.join(timeout=FAREWELL_SECONDS)
        self._publish_last("finished")

    def fail(self, error: BaseException) -> str:
        """This rank ends with `error`: let the others end; what they say about it, or "".

        Call it before the error is reported, then `release`.
        """
        self._failing.set()
        call = LEDGER.failed_call(error)
        failed = None if call is None else (call, place_of_error(error))
        self.beat = look(self.beat, self._main, quiet=self._quiet, full=True, failed=failed)
        self._publish_last("failed")
        if self.board is None:
            return ""
        try:
            speaks = self.board.put_up(
                Failure(self.rank, "raised", f"{type(error).__name__}: {error}", self.rank)
            )
            if call is None or not speaks:
                return ""
            return self._comparison()
        except RuntimeError:  # the store has gone: nobody is left to compare with
            return ""

    def release(self) -> None:
        """The error of `fail` has been reported."""
        if self.board is not None:
            with suppress(RuntimeError):
                failure = self.board.failure()
                if failure is None or failure.by == self.rank:
                    self.board.mark_told()

    def _comparison(self) -> str:
        """What the other ranks called, once they have all said it, or have had time to."""
        assert self.board is not None
        wait = self.beat.waits[0] if self.beat.waits else None
        if wait is None:
            return ""
        others = [rank for rank in wait.ranks if rank != self.rank]
        deadline = time.monotonic() + FAREWELL_SECONDS / 2
        while True:
            beats = self.board.read(others)
            told = all(rank in beats and beats[rank].state == "failed" for rank in others)
            text = compare(wait, self.rank, beats)
            if text is not None or told or time.monotonic() > deadline:
                return text or ""
            time.sleep(0.1)

    def _publish_last(self, state: State) -> None:
        self.beat = with_state(self.beat, state)
        if self.board is not None:
            with suppress(RuntimeError):
                self.board.publish(self.beat)
        self._waiting_file.unlink(missing_ok=True)

    def _run(self) -> None:
        try:
            self.board = self.open_board()
        except RuntimeError as error:
            print(f"watchdog: no store to watch through: {error}", file=sys.stderr, flush=True)
            return
        before = time.monotonic()
        while not self._stopping.wait(PERIOD):
            now = time.monotonic()
            # After a suspension of this process too, no more time has passed for the others than
            # it could have watched them.
            seconds, before = min(now - before, 2 * PERIOD), now
            try:
                self._round(seconds)
                self._unheard = 0.0
            except RuntimeError:
                self._unheard += max(seconds, time.monotonic() - now)
                if self._unheard >= SILENT_SECONDS and not self._failing.is_set():
                    self._tell(
                        "unheard",
                        "the launching process, or rank 0 where there is none, has not answered "
                        f"for {self._unheard:.0f} s: it has ended, or its machine is cut off",
                    )

    def _round(self, seconds: float) -> None:
        """One beat, and a look at the others."""
        assert self.board is not None
        if self._failing.is_set():
            return  # `fail` speaks for this rank now
        self._look(seconds)
        self.board.publish(self.beat)
        self._write_down()
        failure = self.board.failure()
        if failure is not None:
            self._leave(failure)
            return
        for peer in self.board.read(self.watched).values():
            lost = self._pulses.setdefault(peer.rank, _Pulse()).judge(peer, self.beat, seconds)
            if lost is not None:
                kind, text = lost
                self._declare(Failure(self.rank, kind, text, peer.rank), peer)
                return
        if self.beat.is_waiting and self.beat.quiet >= HANG_SECONDS:
            beats = self.board.read(range(self.world_size))
            text = find_deadlock({**beats, self.rank: self.beat}, self.world_size)
            if text is not None:
                self._declare(Failure(self.rank, "hang", text), None)

    def _look(self, seconds: float) -> None:
        moves = LEDGER.moves
        self._quiet = self._quiet + seconds if moves == self._moves else 0.0
        self._moves = moves
        full = self._quiet >= WAITING_SECONDS
        self.beat = look(self.beat, self._main, quiet=self._quiet, full=full)

    @property
    def _waiting_file(self) -> Path:
        return self.logs / f"waiting-rank{self.rank}.json"

    def _write_down(self) -> None:
        """What this rank waits in, while it waits for long."""
        if self.beat.is_waiting and self.beat.quiet >= WAITING_SECONDS:
            self.logs.mkdir(parents=True, exist_ok=True)
            write_atomically(self._waiting_file, self.beat.to_json() + "\n")
        else:
            self._waiting_file.unlink(missing_ok=True)

    def _declare(self, failure: Failure, lost: Beat | None) -> None:
        """Put up a failure that this rank has found; if it is the first to, tell the user."""
        assert self.board is not None
        if not self.board.put_up(failure):
            first = self.board.failure()
            assert first is not None
            self._leave(first)
            return
        if failure.kind == "stopped" and lost is not None:
            os.kill(lost.pid, signal.SIGKILL)  # it cannot end by itself
        self._tell(failure.kind, failure.text, failure.lost)

    def _tell(self, kind: str, text: str, lost: int | None = None) -> None:
        write_verdict(self.logs, kind, text, lost)
        print(text, file=sys.stderr, flush=True)
        try:
            if self.board is not None:
                self.board.mark_told()
        finally:
            _end()

    def _leave(self, failure: Failure) -> None:
        """End this process, as soon as the rank that speaks has spoken."""
        assert self.board is not None
        self.beat = look(self.beat, self._main, quiet=self._quiet, full=True)
        self.board.publish(with_state(self.beat, "failed"))
        deadline = time.monotonic() + FAREWELL_SECONDS
        while time.monotonic() < deadline and not self.board.is_told():
            time.sleep(0.1)
        if self._failing.is_set():
            time.sleep(FAREWELL_SECONDS)  # the main thread is writing its own report
        else:
            said = failure.text.split("\n", 1)[0]
            why = f"rank {failure.by} failed" if failure.kind == "raised" else "a rank is lost"
            if failure.kind == "hang":
                why = "the run hangs"
            print(f"rank {self.rank} ends because {why}: {said}", file=sys.stderr, flush=True)
        _end()


class _Pulse:
    """Another rank's heartbeat as this rank has seen it."""

    def __init__(self) -> None:
        self.number, self.silent, self.absent = -1, 0.0, 0

    def judge(self, peer: Beat, own: Beat, seconds: float) -> tuple[str, str] | None:
        """`seconds` after the last look: (kind, text) if the rank is lost."""
        if peer.number != self.number:
            self.number, self.silent, self.absent = peer.number, 0.0, 0
            return None
        self.silent += seconds
        if peer.state != "running":
            return None
        who = f"rank {peer.rank} (process {peer.pid} on {peer.host})"
        last = f"it was last {_in_or_at(peer)}"
        if peer.host != own.host or peer.parent != own.parent:
            if self.silent < SILENT_SECONDS:
                return None
            return "silent", (
                f"{who} has not been heard of for {self.silent:.0f} s: it is stopped, or its "
                f"machine is down or cut off; {last}"
            )
        status = _status(peer.pid)
        if status is None:
            self.absent += 1
            if self.absent < 2:  # its last beat may just be on the way
                return None
            return "gone", f"{who} was killed, or ended without a word; {last}"
        if status == psutil.STATUS_STOPPED and self.silent >= STOPPED_SECONDS:
            return "stopped", (
                f"{who} was stopped (SIGSTOP) and did not go on for {self.silent:.0f} s; {last}"
            )
        return None


def _status(pid: int) -> str | None:
    """The system's word on a process; None for one that is no more."""
    try:
        status = psutil.Process(pid).status()
    except psutil.Error:
        return None
    return None if status in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD) else status


def _in_or_at(beat: Beat) -> str:
    what = describe_rank(beat)
    return what if what.startswith(("at ", "before ")) else f"in {what}"


def _end() -> None:
    sys.stderr.flush()
    # Not sys.exit: this is not the main thread, and that one may wait for ever.
    os._exit(FAILED)
