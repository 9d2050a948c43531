"""What the machine grants, from made-up control groups; measured speeds against plain timing."""

from __future__ import annotations

import math
import os
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch

from trainwright.training import calibrate, machine


def control_group(root: Path, membership: str, files: dict[str, str]) -> Path:
    """A file tree as the kernel shows it: this process's groups, and their limits."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(membership)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("membership", "files", "quota"),
    [
        ("0::/job", {"job/cpu.max": "250000 100000\n"}, 2.5),
        ("0::/job", {"job/cpu.max": "max 100000\n"}, None),
        ("0::/a/b", {"a/cpu.max": "100000 100000", "a/b/cpu.max": "max 100000"}, 1.0),
        ("0::/", {"cpu.max": "50000 100000"}, 0.5),
        ("0::/not/mounted/here", {"cpu.max": "300000 100000"}, 3.0),
        (
            "4:cpu,cpuacct:/job\n0::/",
            {"cpu/job/cpu.cfs_quota_us": "150000", "cpu/job/cpu.cfs_period_us": "100000"},
            1.5,
        ),
        (
            "4:cpu,cpuacct:/job",
            {"cpu/job/cpu.cfs_quota_us": "-1", "cpu/job/cpu.cfs_period_us": "100000"},
            None,
        ),
        ("1:cpuset:/job", {"cpuset/job/cpu.max": "100000 100000"}, None),
        ("", {}, None),
    ],
)
def test_cpu_quota_of_both_control_group_versions(membership, files, quota, tmp_path):
    assert machine.cpu_quota(control_group(tmp_path, membership, files)) == quota


def test_cores_are_what_affinity_and_quota_leave(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    assert machine.usable_cores(tmp_path) == 6
    for quota, cores in (("250000", 2), ("50000", 1), ("9900000", 6)):
        root = control_group(tmp_path / quota, "0::/job", {"job/cpu.max": f"{quota} 100000"})
        assert machine.usable_cores(root) == cores


def test_memory_is_the_least_limit_above_this_process(tmp_path):
    total = psutil.virtual_memory().total
    assert machine.usable_memory(tmp_path) == total
    files = {"a/memory.max": "3000000000", "a/b/memory.max": "max", "memory.max": "5000000000"}
    assert machine.usable_memory(control_group(tmp_path / "2", "0::/a/b", files)) == 3_000_000_000
    unlimited = {"memory/job/memory.limit_in_bytes": "9223372036854771712"}
    root = control_group(tmp_path / "1", "4:memory:/job", unlimited)
    assert machine.usable_memory(root) == total
    (root / "sys/fs/cgroup/memory/job/memory.limit_in_bytes").write_text("2000000000")
    assert machine.usable_memory(root) == 2_000_000_000


def test_what_stands_in_the_way_of_compiling(tmp_path, monkeypatch):
    compiler = tmp_path / "my-g++"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    headers = tmp_path / "include"
    headers.mkdir()
    monkeypatch.setattr(machine.sysconfig, "get_path", lambda _: str(headers))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert "no compiler on the PATH" in machine.compile_obstacle()
    monkeypatch.setenv("CXX", "my-g++")
    assert "Python.h" in machine.compile_obstacle()
    (headers / "Python.h").touch()
    assert machine.compile_obstacle() is None
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda _: None)
    assert machine.compile_obstacle("cuda") == "triton is not installed"
    assert machine.compile_obstacle("cpu") is None


def test_inductor_agrees_on_the_compiler(monkeypatch):
    """The name that is looked for is the one torch would run."""
    from torch._inductor import config

    if "CXX" not in os.environ:
        expected = config.cpp.cxx[-1] if isinstance(config.cpp.cxx, tuple) else config.cpp.cxx
        monkeypatch.setenv("PATH", "")
        assert expected in machine.compile_obstacle()


def test_this_machine_is_described_in_the_planners_words(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    found = machine.detect_machine()
    assert found.device_kind == ("cuda" if torch.cuda.is_available() else "cpu")
    assert found.devices == max(1, torch.cuda.device_count())
    assert 1 <= found.cores <= os.cpu_count()
    assert found.memory_bytes > 0 and found.launched == 0
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert machine.detect_machine().launched == 4


def test_environment_facts_are_plain_and_hold_no_stray_secrets(tmp_path, monkeypatch):
    import json

    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    facts = machine.environment_facts()
    text = json.dumps(facts)
    assert "hf_secret" not in text
    assert facts["variables"]["OMP_NUM_THREADS"] == "1"
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["cores"] >= 1 and facts["git"] is None


def test_git_state_of_a_repository(tmp_path):
    def git(*words: str) -> str:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-qm", "first")
    commit = git("rev-parse", "HEAD")
    (tmp_path / "untracked").write_text("not part of the commit's state")
    assert machine.git_state(tmp_path) == {"commit": commit, "changed": False}
    (tmp_path / "file").write_text("2")
    assert machine.git_state(tmp_path) == {"commit": commit, "changed": True}


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100-PCIE-40GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA B200", 2250e12),
        ("AMD Instinct MI300X", 1307e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA L40", None),
        ("NVIDIA GB200", 2500e12),
        ("Tesla T4", None),
    ],
)
def test_peaks_by_the_names_that_drivers_give(name, peak):
    assert calibrate.cuda_peak(name) == peak


def test_an_unknown_peak_is_none_never_zero():
    assert calibrate.peak_flops("meta", "bf16") is None


def test_a_measured_matmul_counts_the_flops_of_its_size():
    began = time.perf_counter()
    speed = calibrate.measure_matmul("cpu", "fp32", budget_seconds=0.2)
    took = time.perf_counter() - began
    assert math.log2(speed.size / 256) in range(4) and speed.repeats >= 3
    assert speed.flops_per_second <= speed.best_flops_per_second
    # All timed products together took less than the whole call did.
    assert speed.repeats * 2 * speed.size**3 / speed.best_flops_per_second <= took
    assert calibrate.peak_flops("cpu", "fp32") > 1e8


def test_slow_arithmetic_is_found_out_at_a_small_size(monkeypatch):
    """At 1 MFLOP/s a product of 512 would take over four minutes."""
    sizes: list[int] = []

    def slow_product(size, device, dtype):
        sizes.append(size)
        return lambda: size

    monkeypatch.setattr(calibrate, "_product", slow_product)
    monkeypatch.setattr(calibrate, "_timed", lambda product, device: 2 * product() ** 3 / 1e6)
    speed = calibrate.measure_matmul("cpu", "bf16", budget_seconds=100.0)
    assert max(sizes) == 256 and speed.flops_per_second == pytest.approx(1e6)


def test_bandwidth_counts_reading_and_writing(monkeypatch):
    monkeypatch.setattr(calibrate, "_timed", lambda action, device: 0.5)
    speed = calibrate.measure_bandwidth("cpu", buffer_bytes=1 << 20)
    assert speed.bytes_per_second == 2 * (1 << 20) / 0.5


@pytest.mark.slow
def test_all_reduce_between_two_real_workers():
    speeds = calibrate.measure_all_reduce(2, message_bytes=(1_000, 400_000))
    assert [speed.message_bytes for speed in speeds] == [1_000, 400_000]
    for speed in speeds:
        assert speed.backend == "gloo" and speed.workers == 2 and speed.seconds > 0
        # With two workers the bus rate is the plain rate.
        assert speed.bus_bytes_per_second == pytest.approx(speed.message_bytes / speed.seconds)


def test_workers_that_fail_or_hang_leave_their_last_words(tmp_path, monkeypatch):
    worker = tmp_path / "python"
    worker.write_text("#!/bin/sh\necho starting; echo 'no route to host' >&2; exit 3\n")
    worker.chmod(0o755)
    monkeypatch.setattr(calibrate.sys, "executable", str(worker))
    with pytest.raises(RuntimeError, match="no route to host"):
        calibrate.measure_all_reduce(2)
    worker.write_text("#!/bin/sh\nexec sleep 600\n")
    with pytest.raises(RuntimeError, match="no answer in 0"):
        calibrate.measure_all_reduce(2, timeout_seconds=0.0)
