"""Runs with one rank at fault: killed, stopped or raising, from outside of the product."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.training.runs import write_recipe

# Python imports a module of this name when it starts, so the workers raise without a hook in the
# product.
RAISE_AT = """
import os
if os.environ.get("RANK") == "{rank}":
    from trainwright.data.batches import Batches
    plain = Batches.batch
    def batch(self, index, rows=None):
        if index == {step}:
            raise ValueError("the disk of rank {rank} says no")
        return plain(self, index, rows)
    Batches.batch = batch
"""
TORCHRUN = [
    *("-m", "torch.distributed.run"),
    *("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"),
]
LIMIT = 30.0  # seconds in which all workers end


@dataclass
class Outcome:
    """What became of a run whose rank was at fault."""

    code: int
    said: str  # both streams together
    seconds: float  # from the fault to the end of the last worker
    run: Path

    def first_line(self) -> str:
        """The first line about the failure, past those of the training."""
        return next(line for line in self.said.splitlines() if "rank " in line)

    def log(self, rank: int) -> str:
        return (self.run / "logs" / f"rank{rank}.log").read_text()


def run_with_fault(
    folder: Path, kind: str, rank: int, step: int, workers: int = 2, *, torchrun: bool = False
) -> Outcome:
    """Train until `step`, and see one rank fail: `kind` is killed, stopped or raising."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    if kind == "raising":
        site = folder / "site"
        site.mkdir(parents=True)
        (site / "sitecustomize.py").write_text(RAISE_AT.format(rank=rank, step=step))
        environment["PYTHONPATH"] = str(site)
    recipe = write_recipe(
        folder,
        training={"steps": 100_000, "batch_sequences": 2 * workers},
        parallel={"workers": workers, "micro_batch": 2},
    )
    launcher = []
    if torchrun:
        launcher = [*TORCHRUN, "--nproc-per-node", str(workers)]
    process = subprocess.Popen(
        [sys.executable, *launcher, "-m", "trainwright", "train", str(recipe)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=environment,
    )
    metrics = folder / "run" / "metrics.jsonl"
    workers_seen: dict[int, psutil.Process] = {}
    goal = 1 if kind == "raising" else step
    while process.poll() is None and (len(workers_seen) < workers or steps_done(metrics) < goal):
        workers_seen = worker_processes(process.pid)
        time.sleep(0.02)
    if kind != "raising":
        workers_seen[rank].send_signal(signal.SIGKILL if kind == "killed" else signal.SIGSTOP)
    whole = len(workers_seen)
    began = time.monotonic()
    while there := alive(workers_seen):
        if kind == "raising" and len(there) == whole:
            began = time.monotonic()  # from the first end on: when it raised is not seen here
        assert time.monotonic() - began < 120, "workers outlive the failure"
        time.sleep(0.02)
    seconds = time.monotonic() - began
    said, _ = process.communicate(timeout=60)
    return Outcome(process.returncode, said, seconds, folder / "run")


def steps_done(metrics: Path) -> int:
    return metrics.read_text().count('"kind": "step"') if metrics.exists() else 0


def worker_processes(launcher: int) -> dict[int, psutil.Process]:
    """The workers of a launcher, by rank."""
    found = {}
    for child in psutil.Process(launcher).children():
        try:
            found[int(child.environ()["RANK"])] = child
        except (psutil.Error, KeyError):
            continue
    return found


def alive(workers: dict[int, psutil.Process]) -> list[int]:
    """Ranks that are still there; a stopped one is."""
    there = []
    for rank, process in workers.items():
        try:
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                there.append(rank)
        except psutil.Error:
            continue
    return there
