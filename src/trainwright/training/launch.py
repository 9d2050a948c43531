"""Starting a run's workers on this machine, through torch's elastic agent.

Under torchrun, or whatever else sets RANK and WORLD_SIZE, the workers are there already:
`is_launched` sees that, and each process joins instead of starting others.
"""

from __future__ import annotations

import inspect
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainwright.errors import Mistake, UserError
from trainwright.files import write_json
from trainwright.planner.plan import Plan

INTERRUPTED = 143  # exit code of a run that was asked to stop
INTERRUPTED_MARK = "interrupted"  # a file among the logs of a run that was, and that saved first
# Workers have this long to end their step and save, before they are killed. Not longer: survivors
# of a failed worker, stuck waiting for it, are ended by the same clock.
STOP_SECONDS = 60

# glibc hands every large tensor back to the kernel and faults its pages in again the next time:
# keeping them made training steps 2 to 26 % faster on the CPUs where it was measured.
MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 36), "MALLOC_TOP_PAD_": "0"}


class RunInterrupted(Exception):  # noqa: N818
    """Not an error: the run stopped on request; `saved` says whether after saving its last step."""

    def __init__(self, saved: bool) -> None:
        super().__init__("the run was asked to stop")
        self.saved = saved


class WorkerFailed(Exception):  # noqa: N818
    """A worker died of a fault; the message carries its rank and its own traceback."""


def is_launched() -> bool:
    """Whether a launcher has started this process as one of several workers."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def worker_environment(plan: Plan) -> dict[str, str]:
    """Environment variables of a worker; what the user has set already stays."""
    wanted = {"OMP_NUM_THREADS": str(plan.threads), "TOKENIZERS_PARALLELISM": "false", **MALLOC}
    return {name: value for name, value in wanted.items() if name not in os.environ}


def launch_workers(run_directory: Path, plan: Plan) -> None:
    """Run the plan's workers until all are done.

    Raises UserError with a worker's own mistakes, RunInterrupted, or WorkerFailed.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The agent's own log repeats a worker's failure at length; `_explain` says it once.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    logs = run_directory / "logs"
    for file in [*logs.glob("error-rank*.json"), logs / INTERRUPTED_MARK]:
        file.unlink(missing_ok=True)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=plan.world_size,
        run_id=f"trainwright-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=0,
        monitor_interval=0.1,
        logs_specs=DefaultLogsSpecs(),
        local_addr="127.0.0.1",
        **_patience(LaunchConfig),
    )
    with _environment(worker_environment(plan)), _own_signals():
        try:
            elastic_launch(config, sys.executable)(
                "-m", "trainwright.training.worker", str(run_directory)
            )
        except ChildFailedError as error:
            raise _explain(run_directory, error) from error
        except SignalException as error:
            if list(logs.glob("error-rank*.json")):
                raise _explain(run_directory, error) from error
            raise RunInterrupted((logs / INTERRUPTED_MARK).exists()) from error
    if (logs / INTERRUPTED_MARK).exists():
        raise RunInterrupted(saved=True)


def report_failure(logs: Path, rank: int, error: BaseException, traceback_text: str) -> None:
    """Leave a worker's failure where the launching process finds it."""
    mistakes = [vars(mistake) for mistake in error.mistakes] if isinstance(error, UserError) else []
    write_json(
        logs / f"error-rank{rank}.json",
        {"rank": rank, "mistakes": mistakes, "traceback": traceback_text},
    )


def _explain(run_directory: Path, error: Exception) -> Exception:
    """The first failure that a worker reported: a user's mistake, or a fault with its traceback."""
    reports = sorted(
        (run_directory / "logs").glob("error-rank*.json"), key=lambda file: file.stat().st_mtime_ns
    )
    killed = _first_killed(error)
    if killed is not None and not (run_directory / "logs" / f"error-rank{killed}.json").exists():
        return WorkerFailed(
            f"rank {killed} was killed (SIGKILL), most likely for lack of memory: try a smaller "
            f"`parallel.micro_batch`, `training.recompute: full` or fewer workers.\nIts log is "
            f"{run_directory / 'logs' / f'rank{killed}.log'}"
        )
    if not reports:
        return WorkerFailed(
            f"a worker died without a word; see the logs in {run_directory / 'logs'}\n{error}"
        )
    first = json.loads(reports[0].read_text())
    if first["mistakes"]:
        return UserError([Mistake(**mistake) for mistake in first["mistakes"]])
    return WorkerFailed(f"rank {first['rank']} failed:\n{first['traceback']}")


def _first_killed(error: Exception) -> int | None:
    """The rank whose death by SIGKILL came before any other failure."""
    failures = getattr(error, "failures", None)
    if not failures:
        return None
    rank, first = min(failures.items(), key=lambda item: item[1].timestamp)
    return rank if first.exitcode == -signal.SIGKILL else None


def _patience(config: type) -> dict[str, Any]:
    """Time for workers to save when asked to stop; older torch always gives them 30 s."""
    known = "shutdown_timeout" in inspect.signature(config).parameters
    return {"shutdown_timeout": STOP_SECONDS} if known else {}


@contextmanager
def _own_signals() -> Iterator[None]:
    """Put back the signal handlers that torch's agent replaces and leaves behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _environment(values: dict[str, str]):
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
