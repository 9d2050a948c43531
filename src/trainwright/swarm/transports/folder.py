"""A folder as the store: of one machine, or of a network disk that several have mounted.

A file is written aside, flushed, and then renamed (objects) or linked (registers) to its path:
link(2) fails where a file is already, so that the first writer of a register is the only one, and
nobody ever sees half of one. A folder that a program copies from machine to machine will not do:
on each of them somebody else would be first.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from trainwright.errors import Mistake, UserError
from trainwright.files import sync_directory
from trainwright.swarm.transports.transport import TransportError

_ASIDE = ".aside"  # the folder where files are written
_LEFT_BEHIND = 3600  # seconds after which a file there is a crashed peer's
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENXIO)
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
_TRIES = 5


class Folder:
    """A `Backing` below `root`, which must be there: one that is away is no empty one."""

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().absolute()
        self._swept = False

    def write(self, path: str, data: bytes) -> None:
        """See `Backing`."""
        self._place(data, path, os.replace)

    def create(self, path: str, data: bytes) -> bool:
        """See `Backing`. Raises UserError where the disk has no links."""
        try:
            self._place(data, path, os.link)
        except FileExistsError:
            return False
        return True

    def read(self, path: str, limit: int) -> bytes | None:
        """See `Backing`. Links and pipes, which a peer may have put there, are not followed."""
        self._look()
        with _reported():
            try:
                handle = os.open(self.root / path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            except OSError as error:
                if error.errno in _NOT_THERE:
                    return None
                raise
            try:
                found = os.fstat(handle)
                if not stat.S_ISREG(found.st_mode):
                    return None
                if found.st_size > limit:
                    raise ValueError(f"{path} has {found.st_size:,} bytes, over {limit:,}")
                with open(handle, "rb", closefd=False) as file:
                    return file.read(found.st_size)
            finally:
                os.close(handle)

    def folders(self, path: str) -> Iterator[str]:
        """See `Backing`."""
        self._look()
        for entry in _entries(self.root / path):
            if entry.is_dir(follow_symlinks=False):
                yield entry.name

    def files(self, path: str) -> Iterator[tuple[str, int]]:
        """See `Backing`."""
        self._look()
        return _files(self.root / path, "")

    def remove(self, path: str) -> None:
        """See `Backing`; folders that are empty then go as well."""
        self._look()
        with _reported():
            target = self.root / path
            with suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
                target.unlink()
            with suppress(OSError):  # the first that is not empty
                for folder in _below(self.root, target):
                    folder.rmdir()

    def _look(self) -> None:
        if not self.root.is_dir():
            raise TransportError(f"no folder {self.root}")

    def _place(self, data: bytes, path: str, place: Callable[[Path, Path], None]) -> None:
        """Write a file aside and give it its path by `place`. Raises FileExistsError."""
        target = self.root / path
        aside = self.root / _ASIDE / secrets.token_hex(10)
        with _reported():
            self._make_folders(aside)
            try:
                with aside.open("xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                self._sweep(aside)
                for tries_left in reversed(range(_TRIES)):
                    try:
                        self._make_folders(target)
                        place(aside, target)
                        break
                    except FileNotFoundError:  # a `remove` has just taken the folder away
                        if not tries_left:
                            raise
                sync_directory(target.parent)
            finally:
                with suppress(OSError):
                    aside.unlink()

    def _make_folders(self, path: Path) -> None:
        # One by one, so that a root that is away is not made anew on the disk below it.
        for folder in reversed(_below(self.root, path)):
            with suppress(FileExistsError):
                folder.mkdir()

    def _sweep(self, newest: Path) -> None:
        """Once: take away what crashed peers left aside. Times are the disk's own."""
        if not self._swept:
            self._swept = True
            now = newest.stat().st_mtime
            for entry in _entries(newest.parent):
                with suppress(OSError):
                    if entry.stat(follow_symlinks=False).st_mtime < now - _LEFT_BEHIND:
                        Path(entry.path).unlink()


def _below(root: Path, path: Path) -> list[Path]:
    """The folders between a path and the root, innermost first."""
    return [folder for folder in path.parents if root in folder.parents]


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What is in a folder; nothing where there is none."""
    with _reported():
        try:
            with os.scandir(folder) as entries:
                return list(entries)
        except (FileNotFoundError, NotADirectoryError):
            return []


def _files(folder: Path, above: str) -> Iterator[tuple[str, int]]:
    for entry in _entries(folder):
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _files(folder / entry.name, f"{above}{entry.name}/")
        elif entry.is_file(follow_symlinks=False):
            with suppress(FileNotFoundError):  # taken away meanwhile
                yield above + entry.name, entry.stat(follow_symlinks=False).st_size


@contextmanager
def _reported() -> Iterator[None]:
    try:
        yield
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno in _NO_LINKS and error.filename2:
            what = f"the disk of {error.filename} has no hard links, by which peers agree"
            fix = "take a folder on a disk that has them (not FAT), or a bucket"
            raise UserError(Mistake(what, fix)) from error
        raise TransportError(str(error)) from error
