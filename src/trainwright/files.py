"""Files that are either whole or not there: write beside, flush to disk, rename into place."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def sync_directory(directory: Path) -> None:
    """Flush a directory's entries, so that a rename in it survives a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path: Path, content: bytes | str) -> None:
    """Replace `path` with `content`; a crash at any moment leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    sync_directory(path.parent)


def write_json(path: Path, value: Any) -> None:
    """`write_atomically` for a JSON document, indented, keys in the order given."""
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")
