"""Hashes of files and of plain values: what caches are keyed and checked by."""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

_new_hash = partial(hashlib.blake2b, digest_size=16)


def digest(value: Any) -> str:
    """Hash of a JSON value, 32 hexadecimal digits; keys may come in any order."""
    return _new_hash(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Hash of a file's contents, 32 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, _new_hash).hexdigest()


def text_hash(text: str) -> int:
    """64-bit hash of a document's text: it decides on which side of a split the document falls."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
