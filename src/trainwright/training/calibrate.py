"""Measures what the machine does: matrix products, memory, all-reduce. And the peak for MFU.

Each measurement is a small function that returns a dataclass with its units in the field names.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from trainwright.planner.cluster.catalogue import device_by_driver

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class MatmulSpeed:
    """A square matrix product of `size`: the median rate over `repeats`, and the best one."""

    precision: str
    size: int
    repeats: int
    flops_per_second: float
    best_flops_per_second: float


@dataclass(frozen=True)
class MemoryBandwidth:
    """Copying a large tensor: bytes read plus bytes written a second, the median."""

    buffer_bytes: int
    bytes_per_second: float


@dataclass(frozen=True)
class AllReduceSpeed:
    """Summing `message_bytes` over all workers: the median time, and the rate on the wire.

    The bus rate is what a ring moves through each link, 2 (n - 1) / n × bytes / seconds, as NCCL's
    tests define it, so that it can be compared over numbers of workers.
    """

    backend: str
    workers: int
    message_bytes: int
    seconds: float
    bus_bytes_per_second: float


def peak_flops(device: torch.device | str, precision: str) -> float | None:
    """FLOP/s that MFU of one worker is measured against; None where it is not known.

    On CUDA the maker's dense figure for bf16 and fp16. On a CPU, what a matrix product in this
    precision reaches now with this process's threads (at most half a second), so that MFU there
    reads "of the measured matmul rate".
    """
    device = torch.device(device)
    if device.type == "cuda":
        return None if precision == "fp32" else cuda_peak(torch.cuda.get_device_name(device))
    if device.type == "cpu":
        return measure_matmul(device, precision, budget_seconds=0.35).best_flops_per_second
    return None


def cuda_peak(name: str) -> float | None:
    """The dense bf16 FLOP/s of a device by the name that its driver gives, None if not listed."""
    known = device_by_driver(name)
    return None if known is None else known.peak_flops["bf16"]


def measure_matmul(
    device: torch.device | str, precision: str, *, budget_seconds: float = 0.5
) -> MatmulSpeed:
    """The rate of the largest product of two square matrices that fits the time budget.

    Sizes double from 256 to 2,048 (8,192 on CUDA) as long as a few products of the next one would
    still fit, so that slow arithmetic (bf16 on an old CPU) is found out without a wait.
    """
    device = torch.device(device)
    largest = 8192 if device.type == "cuda" else 2048
    ends = time.perf_counter() + budget_seconds
    # Waking the threads takes long on a busy machine, however small the product.
    start_up = min(_timed(_product(32, device, DTYPES[precision]), device) for _ in range(3))
    size = 256
    while True:
        product = _product(size, device, DTYPES[precision])
        seconds = [_timed(product, device) for _ in range(3)]
        next_seconds = start_up + 8 * max(min(seconds) - start_up, 0.0)
        if size == largest or 4 * next_seconds > ends - time.perf_counter():
            break
        size *= 2
    while time.perf_counter() < ends and len(seconds) < 50:
        seconds.append(_timed(product, device))
    flops = 2 * size**3
    return MatmulSpeed(
        precision, size, len(seconds), flops / statistics.median(seconds), flops / min(seconds)
    )


def measure_bandwidth(
    device: torch.device | str, *, buffer_bytes: int = 1 << 27, repeats: int = 5
) -> MemoryBandwidth:
    """How fast memory is read and written at once; the buffer should exceed all caches."""
    device = torch.device(device)
    source = torch.ones(buffer_bytes // 4, device=device)
    target = torch.empty_like(source)
    target.copy_(source)  # the first touch maps the pages
    seconds = [_timed(partial(target.copy_, source), device) for _ in range(repeats)]
    return MemoryBandwidth(buffer_bytes, 2 * buffer_bytes / statistics.median(seconds))


def measure_all_reduce(
    workers: int = 2,
    *,
    backend: str = "gloo",
    message_bytes: Sequence[int] = (1_000, 1_000_000, 16_000_000),
    timeout_seconds: float = 60.0,
) -> list[AllReduceSpeed]:
    """Start `workers` processes on this machine and time sums of each size between them.

    Raises RuntimeError with a worker's last words if they cannot talk, or not in time.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "trainwright.training.calibrate", folder, backend]
        command += [",".join(map(str, message_bytes)), str(workers)]
        cores = os.cpu_count() or 1
        environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, cores // workers))}
        logs = [Path(folder) / f"rank{rank}.log" for rank in range(workers)]
        processes = []
        ends = time.monotonic() + timeout_seconds
        try:
            for rank, log in enumerate(logs):
                with log.open("wb") as file:
                    processes.append(
                        subprocess.Popen(
                            [*command, str(rank)], stdout=file, stderr=file, env=environment
                        )
                    )
            codes = [process.wait(max(0.0, ends - time.monotonic())) for process in processes]
        except subprocess.TimeoutExpired:
            codes = [-1]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        if any(codes):
            words = [log.read_text(errors="replace").strip().splitlines() for log in logs]
            last = next(
                (lines[-1] for lines in words if lines), f"no answer in {timeout_seconds} s"
            )
            raise RuntimeError(last)
        found = json.loads((Path(folder) / "result.json").read_text())
    return [AllReduceSpeed(**entry) for entry in found]


def all_reduce_worker(
    folder: Path, backend: str, sizes: list[int], workers: int, rank: int
) -> None:
    """One process of `measure_all_reduce`; the first writes `result.json` into `folder`."""
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend, init_method=f"file://{folder}/meet", rank=rank, world_size=workers
    )
    found = []
    for size in sizes:
        message = torch.ones(max(1, size // 4), device=device)
        seconds = []
        for _ in range(7):
            dist.barrier()
            seconds.append(_timed(partial(dist.all_reduce, message), device))
            message.fill_(1.0)  # sums of sums would overflow, and infinities may be slower
        typical = statistics.median(seconds[2:])
        bus = 2 * (workers - 1) / workers * size / typical
        found.append(AllReduceSpeed(backend, workers, size, typical, bus))
    if rank == 0:
        (folder / "result.json").write_text(json.dumps([asdict(speed) for speed in found]))
    dist.barrier()
    dist.destroy_process_group()


def _product(size: int, device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    """A product of two random matrices, ready to be timed (and warmed up)."""
    left = torch.randn(size, size, device=device).to(dtype)
    right = torch.randn(size, size, device=device).to(dtype)
    result = torch.empty(size, size, device=device, dtype=dtype)

    def product() -> object:
        return torch.mm(left, right, out=result)

    product()
    return product


def _timed(action: Callable[[], object], device: torch.device) -> float:
    """Seconds that `action` takes, its work on the device included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


if __name__ == "__main__":
    folder, backend, sizes, workers, rank = sys.argv[1:]
    all_reduce_worker(
        Path(folder), backend, [int(size) for size in sizes.split(",")], int(workers), int(rank)
    )
