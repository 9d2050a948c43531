"""What this machine has: devices, cores, memory, a compiler, versions.

A container or a batch system often grants less than the hardware holds, so cores and memory count
what this process may use.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

import trainwright
from trainwright.planner.plan import Machine

PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "huggingface_hub",
    "datasets",
    "numpy",
    "pyarrow",
    "torchao",
    "triton",
)
# Environment variables that change what a run computes, or how fast.
TELLING_VARIABLES = ("OMP_", "MKL_", "MALLOC_", "LD_PRELOAD", "CUDA_", "NCCL_", "GLOO_", "PYTORCH_")


def detect_machine() -> Machine:
    """The devices, cores and memory that a run may use here. Imports torch, to ask for CUDA."""
    import torch

    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if devices:
        kind = "cuda"
        memory = min(
            torch.cuda.get_device_properties(index).total_memory for index in range(devices)
        )
    else:
        kind, memory = "cpu", usable_memory()
    return Machine(
        devices=max(devices, 1),
        device_kind=kind,  # type: ignore[arg-type]
        cores=usable_cores(),
        memory_bytes=memory,
        can_compile=compile_obstacle(kind) is None,
        launched=int(os.environ.get("WORLD_SIZE", "0")) if "RANK" in os.environ else 0,
        free_bytes=0 if devices else free_memory(),
        device_name=torch.cuda.get_device_name(0) if devices else cpu_name(),
        has_float8=devices > 0
        and all(torch.cuda.get_device_capability(index) >= (8, 9) for index in range(devices)),
    )


def usable_cores(root: Path = Path("/")) -> int:
    """Cores that this process may keep busy: its affinity, within its control group's quota.

    A quota of 2.5 cores counts as 2: a third thread would be stopped half of the time.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return max(1, min(cores, int(cpu_quota(root) or cores)))


def cpu_quota(root: Path = Path("/")) -> float | None:
    """The least CPU quota of this process's control groups in cores, None without one."""
    quotas = []
    for folder in control_groups("cpu", root):
        words = _read(folder / "cpu.max").split()  # version 2: "200000 100000" or "max 100000"
        if len(words) != 2:
            words = [_read(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period")]
        if all(word.isdigit() for word in words) and int(words[1]) > 0:  # version 1: -1 is none
            quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


def usable_memory(root: Path = Path("/")) -> int:
    """Bytes of memory this process may fill: the machine's, within its control group's limit."""
    limits = [psutil.virtual_memory().total]
    for folder in control_groups("memory", root):
        for name in ("memory.max", "memory.limit_in_bytes"):
            word = _read(folder / name)
            if word.isdigit():
                limits.append(int(word))
    return min(limits)


def free_memory(root: Path = Path("/")) -> int:
    """Bytes of memory that are free for this process now, caches that can be dropped among them."""
    rooms = [psutil.virtual_memory().available]
    for folder in control_groups("memory", root):
        limit, used = _read(folder / "memory.max"), _read(folder / "memory.current")
        if not limit:  # version 1
            limit = _read(folder / "memory.limit_in_bytes")
            used = _read(folder / "memory.usage_in_bytes")
        if limit.isdigit() and used.isdigit():
            words = _read(folder / "memory.stat").split()
            caches = dict(zip(words[::2], words[1::2], strict=False))
            rooms.append(int(limit) - int(used) + int(caches.get("inactive_file", 0)))
    return max(0, min(rooms))


def oom_kills(root: Path = Path("/")) -> int | None:
    """How often the kernel has killed for lack of memory, in this process's control group.

    In the whole machine where the group does not say; None where nobody does.
    """
    files = [folder / "memory.events" for folder in control_groups("memory", root)]
    files += [folder / "memory.oom_control" for folder in control_groups("memory", root)]
    for file in (*files, root / "proc/vmstat"):
        for line in _read(file).splitlines():
            name, _, number = line.partition(" ")
            if name == "oom_kill" and number.isdigit():
                return int(number)
    return None


def control_groups(controller: str, root: Path = Path("/")) -> Iterator[Path]:
    """Folders of the Linux control groups, of both versions, that this process is in.

    A limit may stand on any of a group's parents, so they come too. In a container the path that
    the kernel names may lie outside what is mounted; then only the mount itself is there.
    """
    mount = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        top = mount / controller if controllers else mount
        group = top / path.lstrip("/")
        yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(top))


def compile_obstacle(device_kind: str = "cpu") -> str | None:
    """Why torch.compile would fail here, None if nothing is seen to be in its way.

    Inductor runs the C++ compiler that CXX names (else g++, on macOS clang++) and includes
    Python.h; for CUDA it needs Triton, which builds its launcher with a C compiler.
    """
    names = [os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")]
    if device_kind == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        names = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang", "cc"]
    if not any(shutil.which(name) for name in names):
        return f"no compiler on the PATH: {' or '.join(names)}"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "Python's headers are missing (Python.h)"
    return None


def cpu_name(root: Path = Path("/")) -> str:
    """The processor as its maker calls it, or its architecture where that is not to be had."""
    for line in _read(root / "proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name" and value.strip():
            return value.strip()
    if sys.platform == "darwin":
        return _run("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()
    return platform.processor() or platform.machine()


def physical_cores() -> int | None:
    """Cores of the machine without the second threads of each; None where it does not say."""
    return psutil.cpu_count(logical=False)


def installed_version(package: str) -> str | None:
    """The version of an installed package, None if it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment_facts() -> dict[str, Any]:
    """What `environment.json` keeps of the machine, so that a run can be understood later.

    Imports torch. Memory is in bytes; `git` is the state of the repository that the current folder
    is in, null outside of one.
    """
    import torch

    cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    versions = {package: installed_version(package) for package in PACKAGES}
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": platform.node(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "physical_cores": physical_cores(),
        "memory_bytes": usable_memory(),
        "cuda_devices": [torch.cuda.get_device_name(index) for index in range(cuda)],
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "trainwright": trainwright.__version__,
        "versions": {name: version for name, version in versions.items() if version},
        "git": git_state(Path.cwd()),
        "variables": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(TELLING_VARIABLES)
        },
    }


def git_state(directory: Path) -> dict[str, Any] | None:
    """Commit of the repository around `directory`, and whether tracked files differ from it."""
    commit = _run("git", "-C", str(directory), "rev-parse", "HEAD")
    if not commit:
        return None
    changes = _run("git", "-C", str(directory), "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "changed": None if changes is None else bool(changes)}


def _read(path: Path) -> str:
    """A small file's text, empty if it cannot be read."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _run(*command: str) -> str | None:
    """What a command prints, None if it fails or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
