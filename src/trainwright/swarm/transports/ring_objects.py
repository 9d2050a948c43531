"""A peer's part of the ring on its own disk: objects by their SHA-256, whole or still coming in.

objects/<sha256>         of this peer's shelf, and of others' as they were fetched
partial/<sha256>         the first bytes of one that is being fetched, or was when a crash came
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from trainwright.files import write_atomically


class Objects:
    """Files by digest. Only digests of 64 hex digits may be given: `is_digest`."""

    def __init__(self, directory: Path) -> None:
        self._whole, self._partial = directory / "objects", directory / "partial"
        for folder in (self._whole, self._partial):
            folder.mkdir(parents=True, exist_ok=True)

    def add(self, data: bytes) -> str:
        """Keep an object, durably; its digest."""
        digest = digest_of(data)
        write_atomically(self._whole / digest, data)
        return digest

    def keep(self, digest: str, data: bytes) -> None:
        """Keep one that can be fetched again: without a flush to disk."""
        partial = self._partial / digest
        partial.write_bytes(data)
        partial.replace(self._whole / digest)

    def has(self, digest: str) -> bool:
        """Whether all of it is here."""
        return (self._whole / digest).exists()

    def read(self, digest: str) -> bytes | None:
        """All of it; None where it is not here, or no longer what it was (a power cut)."""
        try:
            data = (self._whole / digest).read_bytes()
        except FileNotFoundError:
            return None
        if digest_of(data) == digest:
            return data
        self.remove(digest)
        return None

    def opened(self, digest: str) -> BinaryIO | None:
        """What is here of it, to be read: all, or what came in; stays open when that moves on."""
        for folder in (self._whole, self._partial, self._whole):  # it may be finished meanwhile
            with suppress(FileNotFoundError):
                return (folder / digest).open("rb")
        return None

    def appended(self, digest: str) -> BinaryIO:
        """What came in of it, to be written on."""
        return (self._partial / digest).open("ab")

    def finish(self, digest: str) -> bool:
        """Count what came in as the whole object, if it is; else it is thrown away."""
        partial = self._partial / digest
        with partial.open("rb") as file:
            right = hashlib.file_digest(file, "sha256").hexdigest() == digest
        if right:
            partial.replace(self._whole / digest)
        else:
            partial.unlink()
        return right

    def remove(self, digest: str) -> None:
        """Forget an object; whoever reads it just now reads on."""
        for folder in (self._whole, self._partial):
            (folder / digest).unlink(missing_ok=True)

    def keep_only(self, digests: Collection[str]) -> None:
        """Forget all others, and what crashes left behind."""
        for folder in (self._whole, self._partial):
            for path in folder.iterdir():
                if path.name not in digests:
                    path.unlink(missing_ok=True)


def digest_of(data: bytes) -> str:
    """The SHA-256, 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def is_digest(text: object) -> bool:
    """Whether that is 64 lowercase hex digits: only then may it name a file."""
    return isinstance(text, str) and len(text) == 64 and set(text) <= set("0123456789abcdef")
