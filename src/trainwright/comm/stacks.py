"""Where a thread is: the line of the product's or the user's code, past all libraries."""

from __future__ import annotations

import functools
import sys
import sysconfig
from pathlib import Path
from types import CodeType, FrameType

import trainwright

_PACKAGE = str(Path(trainwright.__file__).parent)
# A collective is asked for by the code that calls these rooms, not by them.
_CARRIERS = tuple(str(Path(_PACKAGE) / room) + "/" for room in ("comm", "resilience"))
_LIBRARIES = tuple(
    {
        path
        for name in ("stdlib", "platstdlib", "purelib", "platlib")
        if (path := sysconfig.get_path(name))
    }
)
# A thread whose innermost frame is here waits for another thread of its process.
_RESTING = (
    "/threading.py",
    "/queue.py",
    "/concurrent/futures/thread.py",
    "/torch/autograd/graph.py",  # on CUDA, backward runs on a thread of its own
)


def frames() -> dict[int, FrameType]:
    """The innermost frame of every thread."""
    return dict(sys._current_frames())


def here() -> str:
    """`place` of whoever called the library that calls this."""
    return place(sys._getframe(1))


def place(frame: FrameType | None) -> str:
    """`trainwright/training/step.py:97 in _accumulate`, for the innermost line that is ours."""
    while frame is not None:
        file = _shown_file(frame.f_code)
        if file is not None:
            return f"{file}:{frame.f_lineno} in {frame.f_code.co_name}"
        frame = frame.f_back
    return ""


def is_resting(frame: FrameType | None) -> bool:
    """Whether the thread only waits for another one of this process."""
    return frame is None or frame.f_code.co_filename.endswith(_RESTING)


@functools.lru_cache(maxsize=4096)  # every collective asks, for the same few frames
def _shown_file(code: CodeType) -> str | None:
    """The code's file as a user knows it; None in a library or a room that only carries."""
    file = code.co_filename
    if file.startswith(_PACKAGE):
        if file.startswith(_CARRIERS):
            return None
        return str(Path("trainwright") / Path(file).relative_to(_PACKAGE))
    return None if file.startswith((*_LIBRARIES, "<")) else file
