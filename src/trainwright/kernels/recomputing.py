"""Whether the code that runs now runs again, to recompute activations for the backward pass.

What a forward pass counts, such as the tokens an expert was sent, must be counted once: ask here.
"""

from __future__ import annotations

import threading
from types import TracebackType

import torch


class _Depth(threading.local):
    # A thread's own: on GPUs the backward pass, and with it the recomputation, has its own thread.
    value = 0


_depth = _Depth()


def is_recomputing() -> bool:
    """Whether this forward pass is a recomputation.

    False inside a compiled block: what it counts is kept from its first pass.
    """
    if torch.compiler.is_compiling():
        return False
    # A block that the compiler had to break up is recomputed without our context; but whatever
    # runs forward within a backward pass is a recomputation.
    return _depth.value > 0 or torch._C._current_graph_task_id() != -1


class recomputing:  # noqa: N801 - a context manager, named like a function
    """Within it, on this thread, `is_recomputing()` is true. May be entered again and again."""

    def __enter__(self) -> None:
        _depth.value += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _depth.value -= 1
