"""Memory that runs out: real allocations that fail, what is said of them, and the advice taken."""

from __future__ import annotations

import mmap
import re
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.training.runs import SHAPE, assemble_here, small_recipe, write_recipe
from trainwright.models.families import decoder_config
from trainwright.optim.optimizers import build_optimizers
from trainwright.parallel.world import World
from trainwright.planner import memory
from trainwright.recipe.schema import Optimizer
from trainwright.resilience.out_of_memory import (
    childrens_peak,
    is_out_of_memory,
    peak_bytes,
    wanted_bytes,
)
from trainwright.resilience.reports import OutOfMemory, WorkerFailed, first_cause, report_failure
from trainwright.training import machine
from trainwright.training.memory_report import explained, held_memory
from trainwright.training.prepare import prepare_run
from trainwright.training.run_directory import RunDirectory, open_run

HUGE = 1 << 47  # more bytes than any address space has


def refused(allocate) -> BaseException:
    try:
        allocate()
    except Exception as error:
        return error
    raise AssertionError("it was granted")


@pytest.mark.parametrize(
    ("allocate", "wanted"),
    [
        (lambda: torch.empty(HUGE, dtype=torch.uint8), HUGE),
        (lambda: torch.ones(1 << 45) + 1, HUGE),
        (lambda: np.zeros(HUGE, np.uint8), HUGE),
        (lambda: bytearray(1 << 60), 0),
        (lambda: mmap.mmap(-1, HUGE), 0),
    ],
)
def test_allocations_that_fail_are_known(allocate, wanted: int) -> None:
    error = refused(allocate)
    assert is_out_of_memory(error)
    assert wanted_bytes(error) == wanted


def test_gpus_words_are_understood() -> None:
    error = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.10 GiB"
    )
    assert is_out_of_memory(error)
    assert wanted_bytes(error) == int(2.5 * 2**30)


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes do not match"), OSError(28, "No space"), ValueError("memory")]
)
def test_other_errors_are_not_taken_for_it(error: Exception) -> None:
    assert not is_out_of_memory(error)


def test_peaks_are_of_this_process_and_of_the_largest_that_it_started() -> None:
    held = np.ones(60 << 20, np.uint8)
    assert peak_bytes("cpu") > held.nbytes
    subprocess.run([sys.executable, "-c", "b = b'x' * (200 << 20)"], check=True)
    assert childrens_peak() > 200 << 20


def test_what_a_rank_leaves_comes_back(tmp_path: Path) -> None:
    error = OutOfMemory("ran out of memory: a lot", 5, 3, 1, {"weights": 2})
    report_failure(tmp_path, 1, error, "Traceback: …")
    found = first_cause(tmp_path, {})
    assert isinstance(found, OutOfMemory)
    assert str(found) == "rank 1 ran out of memory: a lot"
    assert found.facts() == {**error.facts(), "text": str(found)}


def test_who_is_killed_for_lack_of_memory_is_told_so_where_the_kernel_says_it(tmp_path) -> None:
    found = first_cause(tmp_path, {0: -signal.SIGKILL}, starved=7 << 30)
    assert isinstance(found, OutOfMemory) and found.peak == 7 << 30
    assert "rank 0 was killed (SIGKILL) by the kernel, for lack of memory" in str(found)
    unknown = first_cause(tmp_path, {0: -signal.SIGKILL})
    assert not isinstance(unknown, OutOfMemory) and "most likely" in str(unknown)
    other = first_cause(tmp_path, {0: -signal.SIGSEGV}, starved=7 << 30)
    assert not isinstance(other, OutOfMemory) and "memory" not in str(other)


def group(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


def test_kills_are_counted_in_the_control_group_or_the_machine(tmp_path: Path) -> None:
    assert machine.oom_kills(tmp_path) is None
    whole = {"proc/vmstat": "nr_free_pages 5\noom_kill 4\noom_kill_x 9\n"}
    assert machine.oom_kills(group(tmp_path / "a", whole)) == 4
    second = {
        "proc/self/cgroup": "0::/job",
        "sys/fs/cgroup/job/memory.events": "low 0\noom 3\noom_kill 2\n",
    }
    assert machine.oom_kills(group(tmp_path / "b", whole | second)) == 2
    first = {
        "proc/self/cgroup": "4:memory:/job",
        "sys/fs/cgroup/memory/job/memory.oom_control": "under_oom 0\noom_kill 1\n",
    }
    assert machine.oom_kills(group(tmp_path / "c", whole | first)) == 1


def test_free_memory_is_what_the_control_group_leaves(tmp_path: Path) -> None:
    available = machine.psutil.virtual_memory().available
    assert machine.free_memory(tmp_path) == pytest.approx(available, rel=0.2)
    files = {
        "proc/self/cgroup": "0::/job",
        "sys/fs/cgroup/job/memory.max": "300000000",
        "sys/fs/cgroup/job/memory.current": "200000000",
        "sys/fs/cgroup/job/memory.stat": "anon 5\ninactive_file 50000000\nactive_file 7",
    }
    assert machine.free_memory(group(tmp_path / "2", files)) == 150_000_000
    files = {
        "proc/self/cgroup": "4:memory:/job",
        "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "300000000",
        "sys/fs/cgroup/memory/job/memory.usage_in_bytes": "290000000",
    }
    assert machine.free_memory(group(tmp_path / "1", files)) == 10_000_000


@pytest.mark.parametrize("adapter", [None, {"rank": 4}])
def test_states_are_measured_as_the_formulas_have_them(tmp_path: Path, adapter) -> None:
    recipe = small_recipe(tmp_path, adapter=adapter)
    assembled = assemble_here(recipe)
    trainer = assembled.trainer
    trainer.step(trainer.data.batch(0), 1e-3, 0)
    for parameter in trainer.step.parameters:
        parameter.grad = torch.zeros_like(parameter)
    held = held_memory(trainer.step)
    assembled.store.close()
    config = trainer.step.spread.model.config
    if recipe.adapter is None:
        states = memory.state_bytes(config, trainer.step.plan)
        expected = {"weights": states.parameters}
    else:
        states = memory.adapted_state_bytes(config, trainer.step.plan, recipe.adapter)
        expected = {"weights": states.frozen, "adapters": states.parameters}
    expected |= {"gradients": states.gradients, "optimizer": states.optimizer}
    assert held == pytest.approx(expected, rel=0.05)


@dataclass
class Step:
    """As much of a step as its states are counted of."""

    spread: Any
    optimizers: list
    world: World = field(default_factory=lambda: World(0, 1, torch.device("cpu")))


def test_8_bit_states_are_measured_by_what_they_are_made_of() -> None:
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("torchao")
    model = torch.nn.Linear(64, 128, bias=False)
    section = Optimizer(name="paged-adamw-8bit")
    optimizers = build_optimizers(model.parameters(), section, muon_dtype=torch.float32)
    model.weight.grad = torch.ones_like(model.weight)
    optimizers[0].step()
    held = held_memory(Step(SimpleNamespace(parts=[model]), optimizers))  # type: ignore[arg-type]
    moment = 8192 + 4 * 8192 // 256 + 4 * 256  # codes, scales, and the table of values
    assert held == {"weights": 32768, "gradients": 32768, "optimizer": 2 * moment + 4}


def test_another_failure_stays_as_it_is(tmp_path: Path) -> None:
    failure = WorkerFailed("rank 1 failed")
    assert explained(RunDirectory(tmp_path), failure) is failure
    unprepared = OutOfMemory("ran out of memory", 5)
    assert explained(RunDirectory(tmp_path), unprepared) is unprepared


def test_changes_that_begin_another_run_are_told_so(tmp_path: Path) -> None:
    """States alone are too much, and on a CPU only the optimizer's can be fewer."""
    shape = {**SHAPE, "hidden_size": 1024, "num_hidden_layers": 64}
    recipe = small_recipe(tmp_path, model={"config": shape})
    prepare_run(open_run(recipe), recipe, None, lambda message: None)
    run = RunDirectory(tmp_path / "run")
    states = memory.state_bytes(decoder_config(run.read_model_config()), run.read_plan())
    held = {"weights": int(states.parameters), "optimizer": int(states.optimizer)}
    libraries, logits = 410 << 20, 200 << 20
    most = int(states.total - states.optimizer / 2) + libraries + logits
    told = str(explained(run, OutOfMemory("ran out of memory: …", most, 1, 0, held)))
    assert "`optimizer.name: adamw-8bit`" in told
    assert "With another `optimizer.name` it is another run" in told
    rows = {line.split()[0]: line.split()[1:] for line in told.splitlines() if line[:2] == "  "}
    assert float(rows["optimizer"][1]) == pytest.approx(states.optimizer / 2**30, abs=0.01)
    assert "activations" in rows and len(rows["activations"]) == 1
    assert float(rows["limit"][1]) == pytest.approx(most / 2**30, abs=0.01)


# A command that may have so much more than its libraries take, and so may the workers it starts.
LIMITED = """
import resource, sys
import trainwright.training.api, torch.distributed.fsdp
from trainwright.cli.main import main
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
most = taken + (700 << 20)
resource.setrlimit(resource.RLIMIT_AS, (most, most))
main()
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's address limits")
def test_a_run_that_fails_says_what_would_help_and_that_helps(tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path,
        training={"steps": 1, "batch_sequences": 4096},
        parallel={"micro_batch": 4096, "threads": 1},
        evaluation={"rows": 8},
    )

    def train(*overrides: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", LIMITED, "train", str(recipe), *overrides]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)

    failed = train()
    assert failed.returncode == 1, failed.stderr
    assert failed.stderr.startswith("rank 0 ran out of memory: it held ")
    assert "Traceback" not in failed.stderr
    rows = {
        words[0]: [float(word) for word in words[1:]]
        for line in failed.stderr.splitlines()
        if (words := line.split()) and re.fullmatch(r"[a-z]+( +[\d.]+)+", line.strip())
    }
    planned, peak = rows["sum"]
    assert peak <= rows["limit"][1] < planned
    # Beside its libraries it had 700 MiB of addresses, nearly all of which it used.
    assert rows["limit"][1] == pytest.approx(rows["libraries"][0] + 700 / 1024, rel=0.25)
    way = re.search(r"`([\w.]+): (\w+)`", failed.stderr)
    assert way is not None
    helped = train(f"{way[1]}={way[2]}")
    assert helped.returncode == 0, helped.stderr
