"""One worker of a run: `python -m trainwright.training.worker RUN [--verbose] [--trial STEPS]`.

`launch` starts it. Joins the other workers, builds its part of the model, takes up the newest
checkpoint, trains.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from trainwright.errors import UserError
from trainwright.training.launch import INTERRUPTED, INTERRUPTED_MARK

if TYPE_CHECKING:
    from trainwright.comm.meter import Meter
    from trainwright.parallel.world import World
    from trainwright.training.loop import Trainer
    from trainwright.training.run_directory import RunDirectory
    from trainwright.training.step import TrainStep


def main() -> None:
    """Run the worker of a run directory; exit code 2 for a user's mistake, 1 for a fault."""
    arguments = parsed()
    logs = arguments.run / "logs"
    rank = int(os.environ.get("RANK", "0"))
    _redirect_output(logs, rank, quiet=rank != 0 or arguments.trial is not None)

    # After the redirection: what importing torch has to say belongs in the log.
    try:
        from trainwright.resilience.guard import watched

        with watched(logs):
            from trainwright.parallel.world import join_world, leave_world
            from trainwright.training.run_directory import RunDirectory

            world = join_world()
            run = RunDirectory(arguments.run)
            finished = run_worker(
                run, world, verbose=arguments.verbose, trial_steps=arguments.trial
            )
            leave_world(world)
    except BaseException as error:
        if isinstance(error, UserError):  # any other has been told by `watched`
            traceback.print_exc()
        sys.stderr.flush()
        # Not sys.exit: collectives still in flight on other threads must not delay the news.
        os._exit(2 if isinstance(error, UserError) else 1)
    if not finished:
        (logs / INTERRUPTED_MARK).touch()


def parsed() -> argparse.Namespace:
    """The command line's run directory, `verbose`, and `trial`, which is None or steps."""
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--trial", type=int, metavar="STEPS")
    return parser.parse_args()


def run_worker(
    run: RunDirectory, world: World, *, verbose: bool = False, trial_steps: int | None = None
) -> bool:
    """Train the run's remaining steps; False if the run was asked to stop before its end.

    `verbose` shows each dimension's traffic. With `trial_steps` it trains no more than so many, and
    neither evaluates nor saves.
    """
    from trainwright.resilience.recorder import Recorder
    from trainwright.training.assemble import assemble

    recorder = Recorder(run.logs, world.rank) if world.size > 1 else None
    device = world.device.type
    with told_of_memory(device):
        assembled = assemble(run, world)
    if trial_steps is not None:
        shorten(assembled.trainer, trial_steps)
    if assembled.progress is not None:
        assembled.progress.standing.verbose = verbose
    meter = measure_traffic(assembled.trainer) if world.size > 1 and world.is_first else None

    def request_stop(signum: int, frame: object) -> None:
        if assembled.trainer.stop_requested:
            os._exit(INTERRUPTED)  # asked twice: whoever asks does not want to wait
        assembled.trainer.stop_requested = True

    before = {
        number: signal.signal(number, request_stop)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        if signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        with told_of_memory(device, assembled.trainer.step):
            done = assembled.trainer.run()
    except UserError:
        with suppress(UserError):
            assembled.store.wait()  # a checkpoint under way is a good one
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if meter is not None:
            meter.stop()
    assembled.close(done)
    if recorder is not None:
        recorder.close()
    return done == assembled.trainer.total_steps


@contextmanager
def told_of_memory(device: str, step: TrainStep | None = None) -> Iterator[None]:
    """Where memory runs out, say how much there was of it, and what `step` held."""
    from trainwright.resilience.out_of_memory import is_out_of_memory
    from trainwright.training.memory_report import measured

    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise measured(error, device, step) from error


def shorten(trainer: Trainer, steps: int) -> None:
    """Leave a trainer `steps` steps at most, of which it only keeps the metrics."""
    from trainwright.training.hooks import MetricsHook

    trainer.total_steps = min(trainer.total_steps, trainer.start + steps)
    trainer.hooks = [hook for hook in trainer.hooks if isinstance(hook, MetricsHook)]


def measure_traffic(trainer: Trainer) -> Meter:
    """Count this worker's collectives; each step's record gets what the step moved."""
    from trainwright.comm.meter import Meter
    from trainwright.training.hooks import ForgetTrafficHook, MetricsHook

    meter = Meter()
    for hook in trainer.hooks:
        if isinstance(hook, MetricsHook):
            hook.meter = meter
    trainer.hooks = [*trainer.hooks, ForgetTrafficHook(meter)]
    meter.start()
    return meter


def _redirect_output(logs: Path, rank: int, *, quiet: bool) -> None:
    """Logs by rank. The first worker keeps the terminal for its progress line, if not `quiet`."""
    logs.mkdir(parents=True, exist_ok=True)
    log = os.open(logs / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stderr.flush()
    os.dup2(log, 2)
    if quiet:
        sys.stdout.flush()
        os.dup2(log, 1)
    os.close(log)


if __name__ == "__main__":
    main()
