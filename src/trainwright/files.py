"""Files that are either whole or not there: write beside, flush to disk, rename into place."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


def sync_directory(directory: Path) -> None:
    """Flush a directory's entries, so that a rename in it survives a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def opened_atomically(path: Path) -> Iterator[BinaryIO]:
    """A file to write; what stood at `path` is replaced at the end, if nothing was raised."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    sync_directory(path.parent)


def write_atomically(path: Path, content: bytes | str) -> None:
    """Replace `path` with `content`; a crash at any moment leaves the old file or the new one."""
    with opened_atomically(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, value: Any) -> None:
    """`write_atomically` for a JSON document, indented, keys in the order given."""
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")
