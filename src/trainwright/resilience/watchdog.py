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
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import psutil

from trainwright.comm.hooks import LEDGER, install
from trainwright.files import write_atomically
from trainwright.resilience.beats import Beat, State
from trainwright.resilience.board import PATIENCE, PATIENCE_AT_START, Board, Failure
from trainwright.resilience.observe import look, with_state
from trainwright.resilience.recorder import find_mismatch
from trainwright.resilience.reports import write_verdict
from trainwright.resilience.verdict import compare, describe_rank, find_deadlock


@dataclass(frozen=True)
class Limits:
    """Seconds after which something is believed. Survivors have 30 in all to end."""

    period: float = 1.0  # between beats
    # Stopped (state T of the system): longer than anybody who samples a stack needs.
    stopped: float = 8.0
    # Silence of a rank on another machine, where only silence can be seen. A thread that needs a
    # millisecond a second is starved for less, even with several workers on each core.
    silent: float = 20.0
    hang: float = 15.0  # no collective begins or ends: stuck, if what it waits for cannot come
    waiting: float = 4.0  # in one collective, before it is written down
    farewell: float = 5.0  # for the rank that speaks to have spoken


SMALL_WORLD = 32  # up to so many, every rank watches every other
FAILED = 1  # exit code


class Watchdog:
    """Watches the ranks from a thread of this worker's. `open_board` is called in that thread."""

    def __init__(
        self,
        open_board: Callable[[timedelta], Board],
        rank: int,
        world_size: int,
        logs: Path,
        *,
        siblings: range | None = None,  # ranks that the same launcher started on this machine
        limits: Limits | None = None,
    ) -> None:
        self.limits = limits or Limits()
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
        self._speaking = threading.Lock()  # two threads write this rank's beat
        self._unheard = 0.0  # seconds without an answer of the store
        self._overtime = 0.0  # seconds since this rank's own failure was put up
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
        self._thread.join(timeout=self.limits.farewell)
        self._publish_last("finished")
        self._waiting_file.unlink(missing_ok=True)

    def fail(self, error: BaseException) -> str:
        """This rank ends with `error`: let the others end.

        Call it before the error is reported, then `release`. Where a collective raised, the others
        may have called another, or be lost: waits some seconds for what they or their watchdogs
        have to say. Returns how their calls differ, "" if they do not.
        """
        call = LEDGER.failed_call(error)
        with self._speaking:
            self._failing.set()
            self.beat = look(self.beat, self._main, quiet=self._quiet, full=True, failed=call)
            self._publish_last("failed")
        if self.board is None:
            return ""
        with suppress(RuntimeError):  # without the store, nobody is left to talk to
            text = "" if call is None else self._others_say()
            if text is not None:
                said = f"{type(error).__name__}: {error}"
                self.board.put_up(Failure(self.rank, "raised", said, self.rank))
                return text
            self._await_told()
        return ""

    def release(self) -> None:
        """The error of `fail` has been reported."""
        if self.board is not None:
            with suppress(RuntimeError):
                failure = self.board.failure()
                if failure is not None and failure.by == self.rank:
                    self.board.mark_told()
                    self._linger()

    def _others_say(self) -> str | None:
        """How others' calls differ from the one that raised here, "" if it is not known.

        None when another rank has the word.
        """
        assert self.board is not None
        wait = self.beat.waits[-1]
        others = [rank for rank in wait.ranks if rank != self.rank]
        deadline = time.monotonic() + self.limits.farewell
        while time.monotonic() < deadline:
            if self.board.failure() is not None:
                return None
            # The records tell of ranks on this machine at once, even of one that is no more.
            text = find_mismatch(self.logs) or compare(wait, self.rank, self.board.read(others))
            if text is not None:
                return text
            time.sleep(0.1)
        return ""

    def _await_told(self) -> None:
        assert self.board is not None
        deadline = time.monotonic() + self.limits.farewell
        with suppress(RuntimeError):  # the store has gone: so has whoever spoke
            while time.monotonic() < deadline and not self.board.is_told():
                time.sleep(0.1)

    def _publish_last(self, state: State) -> None:
        self.beat = with_state(self.beat, state)
        if self.board is not None:
            with suppress(RuntimeError):
                self.board.publish(self.beat)

    def _run(self) -> None:
        try:
            self.board = self.open_board(PATIENCE_AT_START)
        except RuntimeError as error:
            print(f"watchdog: no store to watch through: {error}", file=sys.stderr, flush=True)
            return
        before, complained = time.monotonic(), False
        while not self._stopping.wait(self.limits.period):
            now = time.monotonic()
            # After a suspension of this process too, no more time has passed for the others than
            # it could have watched them.
            seconds, before = min(now - before, 2 * self.limits.period), now
            try:
                self._round(seconds)
                self._unheard = 0.0
            except RuntimeError:  # of the store
                self._reopen()
                self._unheard += max(seconds, time.monotonic() - now)
                # Whoever has suspended the launching process will want to go on with the run.
                suspended = _status(self.beat.parent) == psutil.STATUS_STOPPED
                if suspended or self._failing.is_set():
                    self._unheard = 0.0
                elif self._unheard >= self.limits.silent:
                    self._tell(
                        "unheard",
                        "the launching process, or rank 0 where there is none, has not answered "
                        f"for {self._unheard:.0f} s: it has ended, or its machine is cut off",
                    )
            except Exception:  # a fault here must not leave the ranks unwatched
                if not complained:
                    traceback.print_exc()
                complained = True

    def _reopen(self) -> None:
        """A client that has not had its answer would take it for that of its next question."""
        with suppress(RuntimeError):
            self.board = self.open_board(PATIENCE)

    def _round(self, seconds: float) -> None:
        """One beat, and a look at the others."""
        assert self.board is not None
        with self._speaking:
            failing = self._failing.is_set()
            if not failing:
                self._look(seconds)
                self.board.publish(self.beat)
                self._write_down()
        failure = self.board.failure()
        if failure is not None and failure.by != self.rank:
            self._leave(failure)
        elif failure is not None:
            self._overtime += seconds
            if self._overtime >= 2 * self.limits.farewell:  # its end may hang, too
                _end()
        else:
            self._judge(seconds, failing)

    def _judge(self, seconds: float, failing: bool) -> None:
        """Look for ranks that are lost, and for a hang."""
        assert self.board is not None
        for peer in self.board.read(self.watched).values():
            lost = self._pulses.setdefault(peer.rank, _Pulse(self.limits)).judge(
                peer, self.beat, seconds
            )
            if lost is not None:
                self._declare(Failure(self.rank, *lost, lost=peer.rank), peer)
        if not failing and self.beat.is_waiting and self.beat.quiet >= self.limits.hang:
            beats = self.board.read(range(self.world_size))
            hang = find_deadlock({**beats, self.rank: self.beat}, self.world_size, self.limits.hang)
            if hang is not None:
                self._declare(Failure(self.rank, "hang", hang), None)

    def _look(self, seconds: float) -> None:
        moves = LEDGER.moves
        self._quiet = self._quiet + seconds if moves == self._moves else 0.0
        self._moves = moves
        full = self._quiet >= self.limits.waiting
        self.beat = look(self.beat, self._main, quiet=self._quiet, full=full)

    @property
    def _waiting_file(self) -> Path:
        return self.logs / f"waiting-rank{self.rank}.json"

    def _write_down(self) -> None:
        """What this rank waits in, while it waits for long."""
        long = self.beat.is_waiting and self.beat.quiet >= self.limits.waiting
        if long and self.logs.is_dir():
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
                self._linger()
        finally:
            _end()

    def _linger(self) -> None:
        """Where no agent keeps the store, it ends with rank 0: the others must read it first."""
        if self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            time.sleep(2 * self.limits.period)

    def _leave(self, failure: Failure) -> None:
        """End this process, as soon as the rank that speaks has spoken."""
        assert self.board is not None
        with self._speaking:
            if not self._failing.is_set():
                self.beat = look(self.beat, self._main, quiet=self._quiet, full=True)
                self.board.publish(with_state(self.beat, "failed"))
        self._await_told()
        if self._failing.is_set():
            time.sleep(self.limits.farewell)  # the main thread is writing its own report
        else:
            said = failure.text.split("\n", 1)[0]
            why = f"rank {failure.by} failed" if failure.kind == "raised" else "a rank is lost"
            if failure.kind == "hang":
                why = "the run hangs"
            print(f"rank {self.rank} ends because {why}: {said}", file=sys.stderr, flush=True)
        _end()


class _Pulse:
    """Another rank's heartbeat as this rank has seen it."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
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
            if self.silent < self.limits.silent:
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
        if status == psutil.STATUS_STOPPED and self.silent >= self.limits.stopped:
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
