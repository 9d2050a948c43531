"""Measures this machine for the planner, and keeps what it finds: `trainwright doctor --calibrate`.

Processes are started as a run's workers are, 1, 2 and 4 at once, each with its share of the cores:
what one of several gets of a machine is measured, not supposed. Every number is kept as soon as it
is there, so that who interrupts loses nothing, and the next time goes on where this one ended.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path

import psutil

from trainwright.errors import Mistake, UserError
from trainwright.files import write_json
from trainwright.planner.cluster.calibration import (
    Calibration,
    Crowd,
    MemoryConstants,
    Probe,
    Sample,
    machine_facts,
    read_calibration,
    write_calibration,
)
from trainwright.planner.job import Job
from trainwright.planner.known_model import known_config
from trainwright.planner.plan import Machine, Precision
from trainwright.recipe.load import load_recipe
from trainwright.training.calibration_points import basics, grid, of_job
from trainwright.training.launch import MALLOC
from trainwright.training.machine import usable_cores
from trainwright.training.probes import with_lessons
from trainwright.training.stopwatch import Point

BUDGET_SECONDS = 255.0  # of measuring; starting the processes takes some more
_CPU_WORKERS = (1, 2, 4)
# Many at once have more to measure, and take longer for each.
_SHARES = {1: 0.5, 2: 1.0}
_SAVE_SECONDS = 5.0
_BUSY_SHARE = 0.3  # of the cores
_STARTING_SECONDS = 90.0  # importing torch and meeting, on a busy machine
Say = Callable[[str], None]


def calibrate(
    machine: Machine,
    job: Job | None = None,
    precision: Precision = "bf16",
    *,
    budget_seconds: float = BUDGET_SECONDS,
    say: Say = lambda text: None,
    folder: Path | None = None,
    points: Callable[[int], Iterable[Point]] | None = None,
) -> Calibration:
    """Measure what is not known of `machine` yet, or everything anew where all is; and keep it.

    What every plan needs comes first, then shapes of `job`'s plans in `precision`, then a grid;
    what does not fit the time budget is left for the next time. `points` by number of workers are
    measured instead, where given. Raises RuntimeError with a worker's last words if it fails.
    """
    known = read_calibration(machine, folder) or Calibration(machine_facts(machine))
    counts = worker_counts(machine)
    wanted = {count: _wanted(count, job, precision, points) for count in counts}
    missing = {count: _missing(known, count, wanted[count]) for count in counts}
    if not any(missing.values()):
        missing = wanted
    ends = time.monotonic() + budget_seconds
    for turn, count in enumerate(counts):
        weights = [_SHARES.get(each, 1.5) for each in counts[turn:]]
        share = (ends - time.monotonic()) * weights[0] / sum(weights)
        known = _measure_crowd(known, machine, count, missing[count], share, say, folder)
    known = with_lessons(known, machine)
    write_calibration(known, folder)
    return known


def job_of(file: Path | None) -> tuple[Job | None, Precision]:
    """What a recipe trains, and in which precision; no job without a recipe.

    Raises UserError for a recipe with mistakes, and for a model whose shape is not known here.
    """
    if file is None:
        return None, "bf16"
    recipe = load_recipe(file)
    config = known_config(recipe.model, recipe.tokenizer, recipe.objective)
    if config is None:
        what = f"the shape of {recipe.model.path} is not known here"
        raise UserError(Mistake(what, "download it, or give a recipe of one of our families"))
    job = Job(config, recipe.data.sequence_length, recipe.batch_sequences, recipe.optimizer.name)
    return job, recipe.training.precision


def obstacles() -> list[str]:
    """What would spoil a measurement, in words for the user."""
    busy, cores = psutil.getloadavg()[0], usable_cores()
    if busy < _BUSY_SHARE * cores:
        return []
    return [
        f"other programs keep {busy:.1f} of {cores} cores busy: collectives will be measured as "
        "slow as they make them; better measure again on a quiet machine"
    ]


def worker_counts(machine: Machine) -> tuple[int, ...]:
    """How many workers are measured at once: a GPU each, or 1, 2 and 4 on a CPU."""
    if machine.device_kind == "cpu":
        return _CPU_WORKERS
    doubled = {2**power for power in range(machine.devices.bit_length())}
    return tuple(sorted({n for n in doubled if n <= machine.devices} | {machine.devices}))


def _wanted(
    workers: int,
    job: Job | None,
    precision: Precision,
    points: Callable[[int], Iterable[Point]] | None,
) -> list[Point]:
    if points is not None:
        return list(points(workers))
    own = of_job(job, precision, workers) if job is not None else ()
    return list(dict.fromkeys([*basics(workers, precision), *own, *grid()]))


def _missing(known: Calibration, workers: int, points: Sequence[Point]) -> list[Point]:
    crowd = next((c for c in known.crowds if c.workers == workers), Crowd(workers, 1))
    there = {(s.kernel, s.precision, s.shape) for s in crowd.samples}
    return [p for p in points if (p.kernel, p.precision, p.shape) not in there]


def _measure_crowd(
    known: Calibration,
    machine: Machine,
    workers: int,
    points: Sequence[Point],
    seconds: float,
    say: Say,
    folder: Path | None,
) -> Calibration:
    """Start `workers`, let them measure for so long, and keep what they write as it comes."""
    if not points or seconds <= 0:
        return known
    threads = max(1, machine.cores // workers)
    with tempfile.TemporaryDirectory(prefix="trainwright-calibration-") as name:
        place = Path(name)
        write_json(place / "points.json", [asdict(point) for point in points])
        processes = _start(place, machine, workers, threads, seconds)
        saved = time.monotonic()
        try:
            while any(process.poll() is None for process in processes):
                if any(process.poll() for process in processes):
                    break
                if time.monotonic() - saved > seconds + _STARTING_SECONDS:
                    raise RuntimeError(f"no answer in {seconds + _STARTING_SECONDS:.0f} s")
                found = len(_lines(place))
                say(
                    f"measuring with {workers} worker{'s' * (workers > 1)} at once: "
                    f"{found} of {len(points)}"
                )
                _wait(processes[0])
                write_calibration(_with(known, place, workers, threads), folder)
        finally:
            for process in processes:
                process.kill()
                process.wait()
            known = _with(known, place, workers, threads)
            write_calibration(known, folder)
        if any(process.returncode for process in processes):
            raise RuntimeError(_last_words(place, workers))
    return known


def _wait(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(_SAVE_SECONDS)
    except subprocess.TimeoutExpired:
        return


def _start(
    place: Path, machine: Machine, workers: int, threads: int, seconds: float
) -> list[subprocess.Popen[bytes]]:
    environment = {**os.environ, **MALLOC, "OMP_NUM_THREADS": str(threads)}
    environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    processes = []
    for rank in range(workers):
        command = [sys.executable, "-m", "trainwright.training.calibration_worker", str(place)]
        command += [machine.device_kind, str(workers), str(rank), str(threads)]
        command += [str(machine.cores), str(seconds)]
        with (place / f"rank{rank}.log").open("wb") as log:
            processes.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))
    return processes


def _with(known: Calibration, place: Path, workers: int, threads: int) -> Calibration:
    """With what the workers have written so far."""
    samples, probes, hidden = [], [], 0.0
    for line in _lines(place):
        if "hidden_share" in line:
            hidden = line["hidden_share"]
        elif "process_bytes" in line:
            known = replace(known, memory=MemoryConstants(**line))
        elif "plan" in line:
            probes.append(Probe(**line))
        else:
            samples.append(Sample(**{**line, "shape": tuple(line["shape"])}))
    crowd = Crowd(workers, threads, tuple(samples), hidden, tuple(probes))
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return replace(known.added(crowd), time=now)


def _lines(place: Path) -> list[dict]:
    """Whole lines of what the first worker has written."""
    try:
        text = (place / "found.jsonl").read_text()
    except FileNotFoundError:
        return []
    whole, _, _ = text.rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]


def _last_words(place: Path, workers: int) -> str:
    logs = [(place / f"rank{rank}.log").read_text(errors="replace") for rank in range(workers)]
    lines = [log.strip().splitlines() for log in logs if log.strip()]
    # Who lost its peers only echoes another's failure.
    lines.sort(key=lambda words: "onnection" in words[-1])
    return lines[0][-1] if lines else "a worker ended without a word"
