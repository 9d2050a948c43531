"""Checkpoint directories on disk: written beside, flushed, renamed into place, and cleared away.

A name `step-00000100` exists only once everything in it is on disk. What is unfinished or being
deleted has a hidden name, so a process killed at any moment leaves nothing that looks complete.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import math
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO

from trainwright.checkpoint.manifest import MANIFEST, Manifest
from trainwright.errors import Mistake, UserError
from trainwright.files import sync_directory

LOCK = ".writer"
ABANDONED = "abandoned-"
_UNFINISHED, _TRASH = ".tmp", ".trash"

logger = logging.getLogger(__name__)


def step_directory(root: Path, step: int) -> Path:
    """Where the committed checkpoint of `step` is, or would be."""
    return root / f"step-{step:08d}"


def committed_steps(root: Path) -> list[int]:
    """Steps that were committed under `root`, ascending."""
    names = (path.name for path in root.iterdir()) if root.is_dir() else ()
    return sorted(int(found[1]) for name in names if (found := re.fullmatch(r"step-(\d+)", name)))


def lock_for_writing(root: Path) -> IO[str]:
    """Make this process the only writer under `root`, until the file returned is closed.

    The lock ends with the process, however that ends; so whatever is unfinished when the lock is
    taken was left by a dead one and is removed. Raises UserError when another process holds it.
    """
    root.mkdir(parents=True, exist_ok=True)
    file = (root / LOCK).open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise UserError(
            f"another process is saving checkpoints in {root}",
            fix="wait for it to end, or choose another `run_directory`",
        ) from error
    except OSError as error:
        # Some network file systems have no locks; then nobody can tell whose leftovers these are.
        logger.warning("%s cannot be locked (%s): leftovers there are not removed", root, error)
        return file
    for leftover in root.glob(".step-*"):
        if leftover.suffix in (_UNFINISHED, _TRASH):
            shutil.rmtree(leftover, ignore_errors=True)
    return file


def begin(root: Path, step: int, total_bytes: int) -> Path:
    """A new hidden directory to write `step` into. Raises UserError when the disk lacks room."""
    # Beyond the tensors come file headers and the manifest.
    needed = total_bytes + total_bytes // 100 + 2**20
    free = shutil.disk_usage(root).free
    if free < needed:
        raise _no_room(root, needed, free)
    directory = root / f".{step_directory(root, step).name}-{uuid.uuid4().hex[:8]}{_UNFINISHED}"
    directory.mkdir()
    return directory


def publish(directory: Path, root: Path, manifest: Manifest) -> None:
    """Commit what every rank has written into `directory` as the checkpoint of its step.

    Raises UserError when a rank's files are not there: then the ranks do not share the folder.
    """
    for file in manifest.files:
        path = directory / file.name
        if not path.is_file() or path.stat().st_size != file.bytes:
            raise UserError(
                f"{file.name}, written by another worker, is not visible in {directory}",
                fix="put `run_directory` on a file system that all machines of the run share",
            )
    with (directory / MANIFEST).open("xb") as output:
        output.write(manifest.to_bytes())
        output.flush()
        os.fsync(output.fileno())
    sync_directory(directory)
    directory.rename(step_directory(root, manifest.step))
    sync_directory(root)


def discard(path: Path) -> None:
    """Delete a directory so that a crash midway leaves nothing under its name."""
    if not path.name.endswith((_UNFINISHED, _TRASH)):
        path = path.rename(path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}{_TRASH}"))
        sync_directory(path.parent)
    shutil.rmtree(path, ignore_errors=True)


def abandon(root: Path, step: int) -> Path:
    """Set a committed checkpoint aside under a name that is no step's; its new path."""
    path = step_directory(root, step)
    names = (f"{ABANDONED}{path.name}{suffix}" for suffix in _suffixes())
    aside = next(root / name for name in names if not (root / name).exists())
    path.rename(aside)
    sync_directory(root)
    return aside


def _suffixes() -> Iterable[str]:
    yield ""
    number = 2
    while True:
        yield f"-{number}"
        number += 1


def steps_to_keep(
    steps: Iterable[int],
    metrics: Mapping[int, float | None],
    *,
    keep_last: int,
    keep_every: int | None,
    keep_best: bool,
) -> set[int]:
    """Which of the committed `steps` stay: the newest, multiples, and the best metric (lowest).

    Among equal metrics the newer stays. A step without a finite metric is never the best.
    """
    ordered = sorted(steps)
    keep = set(ordered[-max(1, keep_last) :])
    if keep_every is not None:
        keep |= {step for step in ordered if step % keep_every == 0}
    scored = {
        step: metric
        for step in ordered
        if (metric := metrics.get(step)) is not None and math.isfinite(metric)
    }
    if keep_best and scored:
        keep.add(min(reversed(ordered), key=lambda step: scored.get(step, math.inf)))
    return keep


def failed_write(error: OSError, root: Path, needed: int) -> UserError:
    """What to tell the user when a checkpoint of `needed` bytes could not be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return _no_room(root, needed, shutil.disk_usage(root).free, str(error.strerror))
    return UserError(
        f"the checkpoint could not be written in {root}: {error}",
        fix="check that the folder can be written and its disk is well; the checkpoints saved "
        "before are untouched",
    )


def _no_room(place: Path, needed: int, free: int, reason: str = "") -> UserError:
    """The disk is full, or would be: says where, how much is needed and how much there is."""
    because = f" ({reason})" if reason else ""
    return UserError(
        Mistake(
            f"no room for the checkpoint in {place}: it needs {size_text(needed)}, "
            f"{size_text(free)} are free{because}",
            fix="free space there, keep fewer checkpoints (`checkpoint.keep_last`), or put "
            "`run_directory` on another disk; the checkpoints saved before are untouched",
        )
    )


def size_text(count: int) -> str:
    """Bytes for people, in decimal units."""
    size, units = float(count), iter(("bytes", "kB", "MB", "GB", "TB", "PB"))
    unit = next(units)
    while size >= 1000 and unit != "PB":
        size, unit = size / 1000, next(units)
    return f"{count} bytes" if unit == "bytes" else f"{size:.2f} {unit}"
