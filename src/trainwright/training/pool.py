"""A pool of worker processes that stays: one function after another runs on all of them.

Starting a process and importing torch takes far longer than a small plan's steps, so whoever runs
many plans starts the workers once. A worker that fails, dies or does not answer ends the pool; the
next call starts another.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any

# A fork of one process that has imported these: they are imported once for all workers.
_PRELOADED = ["torch", "trainwright.training.sameness"]
_SECOND_OPINION = 2.0  # seconds in which other workers may report an error of their own


class WorkersLostError(Exception):
    """A worker raised, died or did not answer; the message says which, and why."""


class WorkerPool:
    """`size` processes of one gloo process group on this machine's CPU, each with one thread."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._workers: list[tuple[BaseProcess, Connection]] = []
        self._folder = tempfile.TemporaryDirectory(prefix="trainwright-pool-")
        self._started = 0

    def run(self, function: Callable[..., Any], *arguments: Any, timeout: float) -> list[Any]:
        """`function(*arguments)` on every worker; what each returned, in rank order.

        The function and its arguments are pickled. Raises WorkersLostError.
        """
        if not self._workers:
            self._start()
        try:
            for _, connection in self._workers:
                connection.send((function, arguments))
            return self._answers(time.monotonic() + timeout)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End all workers; the next `run` starts new ones."""
        workers, self._workers = self._workers, []
        for process, connection in workers:
            process.kill()
            process.join()
            connection.close()

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
        self._folder.cleanup()

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        self._started += 1
        rendezvous = str(Path(self._folder.name) / f"rendezvous-{self._started}")
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, rank, self.size, rendezvous), daemon=True
            )
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def _answers(self, deadline: float) -> list[Any]:
        waiting: dict[Any, int] = {c: rank for rank, (_, c) in enumerate(self._workers)}
        results: list[Any] = [None] * self.size
        failures: list[tuple[int, str]] = []
        while waiting:
            ready: list[Any] = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                rank = waiting.pop(connection)
                try:
                    worked, answer = connection.recv()
                except (EOFError, ConnectionError):
                    worked, answer = False, _death(self._workers[rank][0])
                if worked:
                    results[rank] = answer
                else:
                    failures.append((rank, answer))
                    deadline = min(deadline, time.monotonic() + _SECOND_OPINION)
        if failures:
            # A worker that lost its peers only echoes another's failure.
            failures.sort(key=lambda failure: "Gloo" in failure[1] or "gloo" in failure[1])
            rank, message = failures[0]
            raise WorkersLostError(f"rank {rank}: {message}")
        if waiting:
            ranks = ", ".join(map(str, sorted(waiting.values())))
            raise WorkersLostError(f"no answer from rank {ranks} in time")
        return results


def _death(process: BaseProcess) -> str:
    process.join(timeout=5)
    code = process.exitcode
    if code is not None and code < 0:
        return f"was killed ({signal.Signals(-code).name})"
    return f"died with exit code {code}"


def _serve(connection: Connection, rank: int, size: int, rendezvous: str) -> None:
    import torch
    import torch.distributed as dist

    # torch deprecates, from 2.13 on, names of collectives that earlier releases have only.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    torch.set_num_threads(1)
    # The host's own name may resolve to an address that nothing listens on.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(rendezvous, size),
        rank=rank,
        world_size=size,
        timeout=timedelta(minutes=5),
    )
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:  # whoever asked has ended
            return
        try:
            answer: tuple[bool, Any] = (True, function(*arguments))
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(last.filename).name}:{last.lineno}"
            answer = (False, f"{type(error).__name__}: {error} ({place})")
        connection.send(answer)
