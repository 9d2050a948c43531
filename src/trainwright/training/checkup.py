"""Looks this machine over for training: what is there, what is missing, how fast it is.

Each check returns lines for `trainwright doctor`; only what makes training impossible is `broken`.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import random
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trainwright.report.tables import bytes_text, rate_text, significant
from trainwright.training import machine

State = Literal["good", "note", "missing", "broken"]

# Distribution and module names of what pyproject.toml requires, and of its extras.
CORE = {
    "torch": "torch",
    "transformers": "transformers",
    "tokenizers": "tokenizers",
    "safetensors": "safetensors",
    "huggingface_hub": "huggingface_hub",
    "datasets": "datasets",
    "numpy": "numpy",
    "pyarrow": "pyarrow",
    "pydantic": "pydantic",
    "ruamel.yaml": "ruamel.yaml",
    "typer": "typer",
    "rich": "rich",
    "jinja2": "jinja2",
    "psutil": "psutil",
    "scipy": "scipy",
}
EXTRAS = {
    "track": ("tensorboard", "wandb", "trackio"),
    "quant": ("torchao", "bitsandbytes"),
    "gguf": ("gguf",),
    "serve": ("starlette", "uvicorn"),
    "harness": ("lm-eval",),
}
LEAST_PYTHON = (3, 11)
LEAST_TORCH = (2, 11)

LITTLE_DISK, LITTLE_MEMORY, LITTLE_SHARED_MEMORY = 20e9, 4e9, 1e9  # bytes


@dataclass(frozen=True)
class Finding:
    """One line of the check-up. `fact` is the value for programs, None where the words are it."""

    group: str
    name: str
    value: str
    state: State = "good"
    advice: str = ""
    fact: Any = None


def examine(quick: bool = False, say: Callable[[str], None] = lambda text: None) -> list[Finding]:
    """All findings, in the order to show them; `quick` leaves out what takes seconds.

    `say` is told before each part that makes the user wait.
    """
    findings = [*check_python(), *check_packages()]
    if any(finding.state == "broken" for finding in findings):
        return findings
    say("looking at torch and the devices")
    findings += [*check_torch()]
    if any(finding.state == "broken" for finding in findings):
        return findings
    findings += [
        *check_hardware(),
        *check_backends(),
        *check_compiler(quick, say),
        *check_extras(),
        *check_settings(),
    ]
    if not quick:
        findings += measure(say)
    return findings


def can_train(findings: Sequence[Finding]) -> bool:
    """Whether nothing stands in the way of training."""
    return all(finding.state != "broken" for finding in findings)


def check_python() -> Iterator[Finding]:
    """The interpreter."""
    old = sys.version_info[:2] < LEAST_PYTHON
    advice = f"use Python {'.'.join(map(str, LEAST_PYTHON))} or newer" if old else ""
    yield Finding(
        "software", "Python", platform.python_version(), "broken" if old else "good", advice
    )


def check_packages() -> Iterator[Finding]:
    """What Trainwright cannot do without; installed packages are not listed one by one."""
    missing = [name for name, module in CORE.items() if not _is_there(module)]
    if missing:
        yield Finding(
            "software",
            "packages",
            f"missing: {', '.join(missing)}",
            "broken",
            f"pip install {' '.join(missing)}",
            missing,
        )
        return
    for name in ("transformers", "datasets"):
        yield Finding("software", name, machine.installed_version(name) or "unknown version")


def check_torch() -> Iterator[Finding]:
    """Torch, and whether its build fits the machine."""
    try:
        import torch
    except Exception as error:  # a broken install raises what it likes
        yield Finding(
            "software",
            "torch",
            f"does not import: {error}",
            "broken",
            "reinstall it: pip install --force-reinstall torch",
        )
        return
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    if torch.version.hip:
        build = f"ROCm {torch.version.hip}"
    if version < LEAST_TORCH:
        yield Finding(
            "software",
            "torch",
            f"{torch.__version__}, {build}",
            "broken",
            f"pip install 'torch>={'.'.join(map(str, LEAST_TORCH))}'",
        )
        return
    yield Finding("software", "torch", f"{torch.__version__}, {build}")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            words = f"{device.name}, {bytes_text(device.total_memory)}"
            yield Finding("hardware", f"GPU {index}", words, fact=device.total_memory)
    elif Path("/dev/nvidia0").exists():
        advice = (
            "install a torch build with CUDA: https://pytorch.org/get-started/locally"
            if torch.version.cuda is None
            else "the driver may be older than this torch wants: compare `nvidia-smi`"
        )
        yield Finding("hardware", "GPU", "there, but torch cannot use it", "note", advice)
    else:
        yield Finding("hardware", "GPU", "none: training runs on the CPU")


def check_hardware() -> Iterator[Finding]:
    """Cores, memory and disk, as far as this process may use them."""
    cores, physical = machine.usable_cores(), machine.physical_cores()
    words = f"{machine.cpu_name()}, {cores} usable"
    words += f" of {physical} cores" if physical and physical > cores else " cores"
    few = "a single core trains slowly; if there are more, widen the container's limit"
    yield Finding(
        "hardware", "CPU", words, "note" if cores < 2 else "good", few if cores < 2 else "", cores
    )
    memory = machine.usable_memory()
    little = memory < LITTLE_MEMORY
    yield Finding(
        "hardware",
        "memory",
        bytes_text(memory),
        "note" if little else "good",
        "keep to small models, or raise the container's limit" if little else "",
        memory,
    )
    free = shutil.disk_usage(Path.cwd()).free
    little = free < LITTLE_DISK
    yield Finding(
        "hardware",
        "disk",
        f"{bytes_text(free)} free in this folder",
        "note" if little else "good",
        "a checkpoint takes 12 bytes a parameter, and two or more are kept: point `run_directory` "
        "at a larger disk"
        if little
        else "",
        free,
    )


def check_backends() -> Iterator[Finding]:
    """What workers can talk through."""
    import torch
    import torch.distributed as dist

    found = []
    if dist.is_available():
        found = [
            name
            for name, there in (
                ("gloo", dist.is_gloo_available()),
                ("nccl", dist.is_nccl_available()),
            )
            if there
        ]
    several = torch.cuda.device_count() > 1
    lacks = "nccl" if several and "nccl" not in found else "gloo" if "gloo" not in found else None
    yield Finding(
        "software",
        "backends",
        ", ".join(found) or "none",
        "missing" if lacks else "good",
        f"this torch build has no {lacks}: only one worker can train" if lacks else "",
        found,
    )
    shared = Path("/dev/shm")
    if several and shared.is_dir() and shutil.disk_usage(shared).total < LITTLE_SHARED_MEMORY:
        size = bytes_text(shutil.disk_usage(shared).total)
        yield Finding(
            "hardware",
            "/dev/shm",
            size,
            "note",
            "NCCL wants more: start the container with --shm-size=2g",
        )


def check_compiler(quick: bool, say: Callable[[str], None]) -> Iterator[Finding]:
    """Whether torch.compile works: tried out on a tiny function, unless `quick`."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    obstacle = machine.compile_obstacle(device)
    if obstacle is not None:
        advice = "training runs without it, on a CPU about a tenth slower; on Debian or Ubuntu: "
        advice += "apt install g++ python3-dev"
        yield Finding("software", "torch.compile", obstacle, "missing", advice)
        return
    if quick:
        yield Finding("software", "torch.compile", "a compiler is there (not tried)")
        return
    say("compiling a tiny function with torch.compile")
    failure = compile_failure(device)
    if failure is None:
        yield Finding("software", "torch.compile", "works")
    else:
        yield Finding(
            "software",
            "torch.compile",
            f"fails: {failure}",
            "missing",
            "set `training.compile: false` until that is repaired",
        )


def compile_failure(device: str) -> str | None:
    """What goes wrong when a function is compiled and run, None if its result is right."""
    import torch

    # A constant of its own makes this a new kernel, which no cache can stand in for.
    factor = random.random()

    def shift(values: torch.Tensor) -> torch.Tensor:
        return torch.sin(values) * factor + 1

    values = torch.linspace(0, 1, 64, device=device)
    try:
        compiled = torch.compile(shift)(values)
    except Exception as error:  # the compiler's own errors are of many types
        return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return None if torch.allclose(compiled, shift(values)) else "the compiled result is wrong"


def check_extras() -> Iterator[Finding]:
    """Optional packages: the version, or the command that installs it."""
    for packages in EXTRAS.values():
        for package in packages:
            version = machine.installed_version(package)
            if version:
                yield Finding("extras", package, version)
            else:
                yield Finding("extras", package, f"not installed: pip install {package}", "missing")


def check_settings() -> Iterator[Finding]:
    """Environment variables that surprise."""
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
    words = "offline: only what is cached" if offline else "may be asked for models and data"
    yield Finding("settings", "Hugging Face hub", words, fact=offline)
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads.isdigit() and int(threads) < machine.usable_cores():
        yield Finding(
            "settings",
            "OMP_NUM_THREADS",
            threads,
            "note",
            "workers keep to it: unset it to let them share out all cores",
        )
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        yield Finding(
            "settings",
            "CUDA_VISIBLE_DEVICES",
            "empty",
            "note",
            "this hides all GPUs: unset it to use them",
        )


def measure(say: Callable[[str], None]) -> Iterator[Finding]:
    """Measured speeds: matrix products, memory, and sums between workers."""
    import torch

    from trainwright.training import calibrate

    device = "cuda" if torch.cuda.is_available() else "cpu"
    say("measuring matrix products and memory")
    rates: dict[str, float] = {}
    for precision in ("fp32", "bf16", "fp16"):
        speed = calibrate.measure_matmul(device, precision)
        rates[precision] = speed.flops_per_second
        slow = precision != "fp32" and speed.flops_per_second < 0.9 * rates["fp32"]
        times = rates["fp32"] / speed.flops_per_second
        yield Finding(
            "speed",
            f"matmul {precision}",
            rate_text(speed.flops_per_second, "FLOP/s"),
            "note" if slow else "good",
            f"{significant(times, 2)} × slower than fp32 here: do not train with "
            f"`precision: {precision}`"
            if slow
            else "",
            vars(speed),
        )
    bandwidth = calibrate.measure_bandwidth(device)
    rate = rate_text(bandwidth.bytes_per_second, "B/s")
    yield Finding("speed", "memory copy", rate, fact=vars(bandwidth))

    workers, backend = 2, "gloo"
    if device == "cuda":
        workers, backend = torch.cuda.device_count(), "nccl"
        if workers < 2:
            return
    say(f"measuring all-reduce between {workers} workers")
    try:
        speeds = calibrate.measure_all_reduce(workers, backend=backend)
    except RuntimeError as error:
        advice = "training with one worker is not affected"
        if backend == "gloo":
            advice += "; if the host name does not resolve, try GLOO_SOCKET_IFNAME=lo"
        yield Finding("speed", "all-reduce", f"fails: {error}", "missing", advice)
        return
    for reduced in speeds:
        words = f"{significant(reduced.seconds * 1e3)} ms"
        if reduced.message_bytes >= 100_000:  # below, the time is all latency
            words += f", {rate_text(reduced.bus_bytes_per_second, 'B/s')}"
        yield Finding(
            "speed",
            f"all-reduce {bytes_text(reduced.message_bytes)}",
            f"{words} ({backend}, {workers} workers)",
            fact=vars(reduced),
        )


def _is_there(module: str) -> bool:
    """Whether a module can be found, without importing it (its parent packages are)."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False
