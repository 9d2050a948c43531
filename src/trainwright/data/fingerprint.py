"""What a source holds, as one hash: the key under which its tokens are cached.

Contents decide, never dates; sizes and dates only spare hashing the same files twice.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from trainwright.data.digests import digest, file_digest
from trainwright.data.locate import Located
from trainwright.data.readers import open_dataset
from trainwright.errors import Mistake, UserError
from trainwright.files import write_json
from trainwright.recipe.schema import Source

# A file changed within a tick of the clock keeps its date: as in git, young files are not trusted.
_YOUNG_NANOSECONDS = 2_000_000_000


def source_fingerprint(source: Source, located: Located, cache: Path) -> str:
    """Hash of all that decides which documents `source` gives: contents, names and settings.

    `cache` is the folder that remembers the hash of files unchanged in size and date.
    """
    files, extra = list(located.files), ""
    root: Path | None = located.root
    if located.hub is not None:
        dataset = open_dataset(located, source)
        files = [Path(part["filename"]) for part in dataset.cache_files]
        # Where the hub's cache lies says nothing about what is in it. A dataset without files of
        # its own lives in memory, under the fingerprint that `datasets` gives it.
        root, extra = None, "" if files else dataset._fingerprint
    contents = remembered_digest(root, files, cache)
    settings = [located.kind, source.field, source.subset, source.split, source.limit]
    return digest(["source", settings, contents, extra])


def remembered_digest(root: Path | None, files: Iterable[Path], cache: Path) -> str:
    """Hash of the files' contents and names, which are relative to `root`, or the last part only.

    `cache` is the folder that remembers it for files unchanged in size and date. Raises UserError
    for a file that cannot be read.
    """
    stats = []
    newest = 0
    for file in files:
        try:
            stat = file.stat()
        except OSError as error:
            raise _unreadable(file, error) from error
        name = file.name if root is None else file.relative_to(root).as_posix()
        newest = max(newest, stat.st_mtime_ns, stat.st_ctime_ns)
        stats.append((name, file, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino))
    seen = [(os.fsencode(file.absolute()).hex(), *rest) for _, file, *rest in stats]
    memory = cache / "fingerprints" / f"{digest(seen)}.json"
    if memory.is_file():
        try:
            return json.loads(memory.read_text())["contents"]
        except (ValueError, KeyError, TypeError):
            memory.unlink(missing_ok=True)
    with ThreadPoolExecutor() as pool:  # hashing leaves the interpreter's lock alone
        hashes = list(pool.map(_digest_or_refuse, (file for _, file, *_ in stats)))
    names = [os.fsencode(name).hex() for name, *_ in stats]
    contents = digest(list(zip(names, hashes, strict=True)))
    if time.time_ns() - newest > _YOUNG_NANOSECONDS:
        with contextlib.suppress(OSError):  # only a convenience: the next process hashes again
            write_json(memory, {"contents": contents, "files": len(hashes)})
    return contents


def _digest_or_refuse(file: Path) -> str:
    try:
        return file_digest(file)
    except OSError as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: OSError) -> UserError:
    reason = error.strerror or str(error)
    return UserError(Mistake(f"cannot be read: {reason}", "check its permissions", where=str(file)))
