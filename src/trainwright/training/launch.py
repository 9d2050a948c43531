"""Starting a run's workers on this machine, through torch's elastic agent.

Under torchrun, or whatever else sets RANK and WORLD_SIZE, the workers are there already:
`is_launched` sees that, and each process joins instead of starting others.
"""

from __future__ import annotations

import inspect
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainwright.planner.plan import Plan
from trainwright.resilience.reports import (
    WorkerFailed,
    clear_reports,
    first_cause,
    has_own_failure,
)
from trainwright.training.machine import oom_kills
from trainwright.training.memory_report import explained
from trainwright.training.run_directory import RunDirectory

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

__all__ = ["RunInterrupted", "WorkerFailed", "is_launched", "launch_workers", "worker_environment"]

INTERRUPTED = 143  # exit code of a run that was asked to stop
INTERRUPTED_MARK = "interrupted"  # a file among the logs of a run that was, and that saved first
# When the run is asked to stop, workers have this long to end their step and save before they are
# killed. Survivors of a failed worker end at once: their watchdogs see to it, and torch's agent
# kills after 30 s whoever could not.
STOP_SECONDS = 60

# glibc hands every large tensor back to the kernel and faults its pages in again the next time:
# keeping them made training steps 2 to 26 % faster on the CPUs where it was measured.
MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 36), "MALLOC_TOP_PAD_": "0"}


class RunInterrupted(Exception):  # noqa: N818
    """Not an error: the run stopped on request; `saved` says whether after saving its last step."""

    def __init__(self, saved: bool) -> None:
        super().__init__("the run was asked to stop")
        self.saved = saved


def is_launched() -> bool:
    """Whether a launcher has started this process as one of several workers."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def worker_environment(plan: Plan) -> dict[str, str]:
    """Environment variables of a worker; what the user has set already stays."""
    wanted = {"OMP_NUM_THREADS": str(plan.threads), "TOKENIZERS_PARALLELISM": "false", **MALLOC}
    return {name: value for name, value in wanted.items() if name not in os.environ}


def launch_workers(
    run_directory: Path, plan: Plan, *, verbose: bool = False, trial_steps: int | None = None
) -> None:
    """Run the plan's workers until all are done; `verbose` shows more while they train.

    With `trial_steps` they take no more steps than that, show and save nothing.

    Raises UserError with a worker's own mistakes, RunInterrupted, or WorkerFailed.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from trainwright.resilience.out_of_memory import childrens_peak

    # The agent's own log repeats a worker's failure at length; `first_cause` says it once.
    for name in [*logging.root.manager.loggerDict]:  # each has a level of its own
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    logs = run_directory / "logs"
    clear_reports(logs)
    (logs / INTERRUPTED_MARK).unlink(missing_ok=True)
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
    run, kills = RunDirectory(run_directory), oom_kills()
    with _environment(worker_environment(plan)), _own_signals():
        try:
            elastic_launch(config, sys.executable)(
                "-m",
                "trainwright.training.worker",
                str(run_directory),
                *(["--verbose"] if verbose else []),
                *([] if trial_steps is None else ["--trial", str(trial_steps)]),
            )
        except ChildFailedError as error:
            starved = childrens_peak() if oom_kills() != kills else None
            raise explained(run, first_cause(logs, _exit_codes(error), starved)) from error
        except SignalException as error:
            if has_own_failure(logs):
                raise explained(run, first_cause(logs, {})) from error
            raise RunInterrupted((logs / INTERRUPTED_MARK).exists()) from error
    if (logs / INTERRUPTED_MARK).exists():
        raise RunInterrupted(saved=True)


def _exit_codes(error: ChildFailedError) -> dict[int, int]:
    """Exit codes of the ranks that ended first, by rank: the others were ended for their sake."""
    first = min(failure.timestamp for failure in error.failures.values())
    return {
        rank: failure.exitcode
        for rank, failure in error.failures.items()
        if failure.timestamp <= first + 1
    }


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
