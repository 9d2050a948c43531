"""A worker that ran out of memory: how it is known, and what it had by then."""

from __future__ import annotations

import errno
import re
import resource
import sys
from pathlib import Path

import torch

_UNITS = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
# torch's allocator for the CPU raises RuntimeErrors, in words that differ between systems.
_WORDS = ("can't allocate memory", "not enough memory", "Cannot allocate memory")
_ASKED = re.compile(r"[Aa]llocate ([\d.]+) ?(bytes|KiB|MiB|GiB|TiB)")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory, the device's or the host's, could not be had."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)


def wanted_bytes(error: BaseException) -> int:
    """What was asked for in vain, in bytes; 0 where the error does not say."""
    found = _ASKED.search(str(error))
    return int(float(found[1]) * _UNITS[found[2]]) if found else 0


def peak_bytes(device: str) -> int:
    """The most that this process has held: of device memory, or of resident host memory."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return _resident(resource.RUSAGE_SELF)


def spare_bytes(device: str, free: int) -> int:
    """What this process could still get: of the host's `free` memory, within its own limits."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    most, _ = resource.getrlimit(resource.RLIMIT_AS)
    pages = Path("/proc/self/statm")
    if most == resource.RLIM_INFINITY or not pages.exists():
        return free
    taken = int(pages.read_text().split()[0]) * resource.getpagesize()
    return max(0, min(free, most - taken))


def childrens_peak() -> int:
    """The most resident memory that any one of the processes started here, and ended, has held."""
    return _resident(resource.RUSAGE_CHILDREN)


def _resident(who: int) -> int:
    peak = resource.getrusage(who).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
