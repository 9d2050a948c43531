"""Cache folders that are whole or not there, each built once however many processes ask for it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from trainwright.data.digests import digest, file_digest
from trainwright.errors import Mistake, UserError
from trainwright.files import sync_directory, write_json

_MANIFEST, _VERIFIED = "manifest.json", "verified.json"

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_NO_RIGHT = (errno.EACCES, errno.EPERM, errno.EROFS)


def cache_folder(chosen: Path | None) -> Path:
    """The folder of all caches: the recipe's `data.cache`, or `$TRAINWRIGHT_CACHE`, or
    `trainwright` in `$XDG_CACHE_HOME`, by default `~/.cache`.
    """
    if chosen is not None:
        return chosen.expanduser().absolute()
    if own := os.environ.get("TRAINWRIGHT_CACHE"):
        return Path(own).expanduser().absolute()
    everyones = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(everyones).expanduser().absolute() / "trainwright"


def build_once(
    folder: Path,
    build: Callable[[Path], Mapping[str, Any]],
    on_wait: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Make sure that `folder` is there and whole; returns the facts that `build` gave.

    `build` fills an empty folder beside it and returns facts (JSON values) for its manifest. The
    new folder is flushed to disk and renamed into place, so that a crash at any moment leaves
    nothing that could be taken for whole. Processes that want the same folder wait for one
    another, calling `on_wait` first; a damaged folder is built anew.

    Raises UserError where the disk is full or may not be written to.
    """
    if not is_whole(folder):
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with locked(folder.with_name(f"{folder.name}.lock"), on_wait):
                if not is_whole(folder):
                    _build(folder, build)
        except OSError as error:
            raise _explained(error, folder) from error
    return read_facts(folder)


def read_facts(folder: Path) -> dict[str, Any]:
    """The facts in a folder's manifest. Raises OSError or ValueError where it has no sound one."""
    return _manifest(folder)["facts"]


def file_hashes(folder: Path) -> dict[str, str]:
    """The hash of every file by name, as the manifest has it."""
    return {name: file["hash"] for name, file in _manifest(folder)["files"].items()}


def has_its_sizes(folder: Path) -> bool:
    """Whether every file of a folder is there with the size that its manifest says."""
    return _sized_files(folder) is not None


def is_whole(folder: Path) -> bool:
    """Whether every file has its size and hash. Files unchanged since the last look are trusted."""
    files = _sized_files(folder)
    if files is None:
        return False
    stamps = {}
    for name in files:
        stat = (folder / name).stat()
        stamps[name] = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
    with suppress(OSError, ValueError):
        if json.loads((folder / _VERIFIED).read_text()) == stamps:
            return True
    if any(file_digest(folder / name) != file["hash"] for name, file in files.items()):
        return False
    with suppress(OSError):  # a folder that may only be read is checked each time
        write_json(folder / _VERIFIED, stamps)
    return True


def _manifest(folder: Path) -> dict[str, Any]:
    manifest = json.loads((folder / _MANIFEST).read_text())
    try:
        if digest([manifest["facts"], manifest["files"]]) == manifest["seal"]:
            return manifest
    except (KeyError, TypeError):
        pass
    raise ValueError(f"{folder / _MANIFEST} is damaged")


def _sized_files(folder: Path) -> dict[str, Any] | None:
    try:
        files = _manifest(folder)["files"]
        sizes_agree = all((folder / name).stat().st_size == files[name]["size"] for name in files)
    except (OSError, ValueError):
        return None
    return files if sizes_agree else None


def _build(folder: Path, build: Callable[[Path], Mapping[str, Any]]) -> None:
    for left_by_a_crash in folder.parent.glob(f".{folder.name}.*.tmp"):
        shutil.rmtree(left_by_a_crash)
    beside = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    beside.mkdir()
    try:
        facts = build(beside)
        files = {
            file.name: {"size": file.stat().st_size, "hash": file_digest(file)}
            for file in sorted(beside.iterdir())
        }
        for name in files:
            sync_directory(beside / name)  # which flushes a file just as well
        seal = digest([facts, files])
        write_json(beside / _MANIFEST, {"facts": facts, "files": files, "seal": seal})
        if folder.exists():
            # Processes that have the damaged one open keep reading what they mapped.
            shutil.rmtree(folder)
        beside.rename(folder)
        sync_directory(folder.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


@contextmanager
def locked(path: Path, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold an exclusive lock. The kernel drops it when its process dies, however it dies."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _explained(error: OSError, folder: Path) -> Exception:
    elsewhere = "or set `data.cache` to a folder on another disk"
    if error.errno in _NO_ROOM:
        what = f"the disk is full: no room for the data cache in {folder.parent}"
        return UserError(Mistake(what, f"free some space, {elsewhere}", key="data.cache"))
    if error.errno in _NO_RIGHT:
        what = f"the data cache may not be written to {error.filename or folder.parent}"
        return UserError(Mistake(what, f"change the rights, {elsewhere}", key="data.cache"))
    in_the_way = [each for each in folder.parents if each.exists() and not each.is_dir()]
    if in_the_way:
        what = f"the data cache cannot be in {in_the_way[0]}, which is a file"
        return UserError(Mistake(what, "set `data.cache` to a folder", key="data.cache"))
    return error
