"""Worker processes for tests: a function run on several ranks, or alone in a process to be killed.

`run_on(2, job, *arguments)` calls `job(*arguments)` on two ranks of a gloo process group and
returns what each returned, in rank order. The ranks live on between tests, one set per world
size, so torch is imported once for all of them. `start(job, *arguments)` calls it in a fresh
process of its own, without a process group.

    from tests.workers import run_on

    def shard_sum(length):                      # at module level; arguments and results pickle
        local = torch.ones(length) * dist.get_rank()
        dist.all_reduce(local)
        return local.sum().item()

    def test_sum():
        assert run_on(2, shard_sum, 4) == [4.0, 4.0]

A job may leave nothing behind that the next one would trip over: undo patches, wait for threads.
It starts with torch seeded with 0 and one thread, and returns numbers or numpy arrays: tensors
would travel as shared memory, which ends with the rank.

When a rank raises, its exception is raised here, with the rank and its traceback as a note; when
one dies or the time is up, WorkerLostError is. Either way that set of ranks is killed, and the
next call starts a new one: nothing hangs.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import importlib.util
import inspect
import itertools
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType
from typing import Any

# One process imports these once; every rank is a fork of it.
PRELOADED = [
    "torch",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "pytest",
]
SECOND_OPINION = 1.0  # seconds in which other ranks may report an error of their own


class WorkerLostError(AssertionError):
    """A rank died, or did not answer in time."""


class Reference:
    """A function by file and name: test modules need not be importable where it runs."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.module, self.name = function.__module__, function.__qualname__
        self.file = str(Path(inspect.getfile(function)).resolve())
        if "<" in self.name:
            raise TypeError(f"{self.name} is not at module level, so no other process can find it")

    def resolve(self) -> Callable[..., Any]:
        module = _module(self.module, self.file, Path(self.file).stat().st_mtime_ns)
        return functools.reduce(getattr, self.name.split("."), module)  # type: ignore[return-value]


@functools.cache
def _module(name: str, file: str, changed: int) -> ModuleType:
    if name.startswith("trainwright"):
        return importlib.import_module(name)
    if (known := sys.modules.get(name)) and getattr(known, "__file__", None) == file:
        return known
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None, file
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # so that what is defined in it can be pickled
    spec.loader.exec_module(module)
    return module


def run_on(
    world_size: int, job: Callable[..., Any], *arguments: Any, timeout: float = 90.0, **named: Any
) -> list[Any]:
    """`job(*arguments, **named)` on `world_size` ranks of a gloo group; the results in rank order.

    Raises the first exception of any rank, with the rank named; WorkerLostError when a rank died
    or `timeout` seconds have passed.
    """
    ranks = _ranks(world_size)
    call = (sys.path, Reference(job), arguments, named)
    try:
        for _, connection in ranks:
            connection.send(call)
        return _answers(ranks, job.__qualname__, time.monotonic() + timeout)
    except BaseException:
        _kill(world_size)
        raise


def start(job: Callable[..., Any], *arguments: Any) -> multiprocessing.process.BaseProcess:
    """`job(*arguments)` in a process of its own, which the caller may kill, and must join."""
    process = _context().Process(
        target=_run_alone, args=(sys.path, Reference(job), arguments), daemon=True
    )
    process.start()
    return process


Rank = tuple[multiprocessing.process.BaseProcess, Connection]
_alive: dict[int, list[Rank]] = {}


@functools.cache
def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="workers-")


_numbers = itertools.count()


def _ranks(world_size: int) -> list[Rank]:
    if world_size in _alive and not all(process.is_alive() for process, _ in _alive[world_size]):
        _kill(world_size)
    if world_size not in _alive:
        rendezvous = str(Path(_folder().name) / f"rendezvous-{next(_numbers)}")
        _alive[world_size] = [
            _start_rank(rank, world_size, rendezvous) for rank in range(world_size)
        ]
    return _alive[world_size]


def _start_rank(rank: int, world_size: int, rendezvous: str) -> Rank:
    ours, theirs = multiprocessing.Pipe()
    process = _context().Process(
        target=_serve, args=(theirs, rank, world_size, rendezvous), daemon=True
    )
    process.start()
    theirs.close()
    return process, ours


@atexit.register
def _kill_all() -> None:
    for world_size in list(_alive):
        _kill(world_size)


def _kill(world_size: int) -> None:
    for process, connection in _alive.pop(world_size, []):
        process.kill()
        process.join()
        connection.close()


def _answers(ranks: list[Rank], job: str, deadline: float) -> list[Any]:
    waiting: dict[Any, int] = {connection: rank for rank, (_, connection) in enumerate(ranks)}
    results: list[Any] = [None] * len(ranks)
    failures: list[tuple[int, BaseException]] = []
    while waiting:
        ready: list[Any] = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        for connection in ready:
            rank = waiting.pop(connection)
            try:
                worked, answer = connection.recv()
            except (EOFError, ConnectionError):
                process = ranks[rank][0]
                process.join(timeout=5)
                failures.append((rank, WorkerLostError(f"died with exit code {process.exitcode}")))
                continue
            if worked:
                results[rank] = answer
            else:
                failures.append((rank, answer))
        if failures:
            deadline = min(deadline, time.monotonic() + SECOND_OPINION)
        if not ready:
            break
    if failures:
        # A rank that lost its peer only echoes another's failure: put first causes first.
        failures.sort(key=lambda failure: isinstance(failure[1], RuntimeError))
        rank, error = failures[0]
        error.add_note(f"on rank {rank} of {len(ranks)}, in {job}")
        for other, echo in failures[1:]:
            error.add_note(f"also on rank {other}: {type(echo).__name__}: {echo}")
        raise error
    if waiting:
        missing = ", ".join(str(rank) for rank in sorted(waiting.values()))
        raise WorkerLostError(f"no answer from rank {missing} of {len(ranks)} in time, in {job}")
    return results


def _serve(connection: Connection, rank: int, world_size: int, rendezvous: str) -> None:
    import torch
    import torch.distributed as dist

    _settle_process()
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(rendezvous, world_size),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=60),
    )
    while True:
        try:
            path, reference, arguments, named = connection.recv()
        except EOFError:  # the test session has ended
            return
        sys.path[:] = path
        torch.manual_seed(0)
        try:
            answer: tuple[bool, Any] = (True, reference.resolve()(*arguments, **named))
            pickle.dumps(answer)
        except BaseException as error:
            answer = (False, _portable(error))
        connection.send(answer)


def _portable(error: BaseException) -> BaseException:
    """`error` with its traceback as a note, if it survives pickling; else its description."""
    text = "".join(traceback.format_exception(error))
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:
        copy = RuntimeError(f"{type(error).__name__}: {error}")
    copy.add_note(text)
    return copy


def _run_alone(path: list[str], reference: Reference, arguments: tuple[Any, ...]) -> None:
    sys.path[:] = path
    _settle_process()
    reference.resolve()(*arguments)


def _settle_process() -> None:
    import torch

    torch.set_num_threads(1)
    if sys.platform == "linux":
        # The host name may resolve to an address that this machine cannot reach.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
