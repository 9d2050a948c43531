"""Is a checkpoint still what was written? Every answer names the file, and what to do instead."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from trainwright.checkpoint.commit import committed_steps, step_directory
from trainwright.checkpoint.manifest import MANIFEST, Manifest, StoredFile, read_manifest
from trainwright.checkpoint.storage import hash_file
from trainwright.errors import Mistake, UserError


def open_manifest(root: Path, step: int) -> Manifest:
    """The manifest of `step`. Raises UserError where there is no such checkpoint, and where its
    manifest is missing, damaged, or another step's."""
    directory = step_directory(root, step)
    if not directory.is_dir():
        raise UserError(f"no checkpoint of step {step} in {root}", fix=_offer(root, step))
    path = directory / MANIFEST
    try:
        manifest = read_manifest(path.read_bytes())
    except FileNotFoundError:
        raise UserError(damage(root, step, f"{path} is missing")) from None
    except OSError as error:
        raise UserError(damage(root, step, f"{path} cannot be read: {error.strerror}")) from error
    except ValueError as error:
        raise UserError(damage(root, step, f"{path} cannot be used: {error}")) from error
    if manifest.step != step:
        raise UserError(damage(root, step, f"{path} is that of step {manifest.step}"))
    return manifest


def verify(root: Path, step: int) -> list[Mistake]:
    """Read every byte of `step`: what is damaged, missing or does not belong, file by file."""
    try:
        manifest = open_manifest(root, step)
    except UserError as error:
        return list(error.mistakes)
    directory = step_directory(root, step)
    known = {file.name for file in manifest.files} | {MANIFEST}
    strangers = sorted(path for path in directory.iterdir() if path.name not in known)
    return verify_files(root, step, manifest.files) + [
        Mistake(f"{path} does not belong to the checkpoint", fix="move it elsewhere")
        for path in strangers
    ]


def verify_files(root: Path, step: int, files: Iterable[StoredFile]) -> list[Mistake]:
    """What is wrong with these files of `step`: size and hash are compared with the manifest's."""
    found = ((step_directory(root, step) / file.name, file) for file in files)
    return [
        damage(root, step, f"{path} {problem}")
        for path, file in found
        if (problem := _problem(path, file))
    ]


def damage(root: Path, step: int, what: str) -> Mistake:
    """The checkpoint of `step` cannot be used because of `what`; offers the step before it."""
    return Mistake(f"the checkpoint of step {step} is damaged: {what}", fix=_offer(root, step))


def _problem(path: Path, file: StoredFile) -> str:
    try:
        size = path.stat().st_size
        if size != file.bytes:
            return f"has {size} bytes, not {file.bytes}"
        if hash_file(path) != file.blake2b:
            return "is not what was written: its hash differs"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return ""


def _offer(root: Path, step: int) -> str:
    whole = [
        other for other in committed_steps(root) if other != step and _looks_whole(root, other)
    ]
    if not whole:
        return "no other complete checkpoint is left: start anew"
    best = max((other for other in whole if other < step), default=whole[-1])
    listed = ", ".join(str(other) for other in whole)
    return f"continue with `--from-step {best}` (steps still complete: {listed})"


def _looks_whole(root: Path, step: int) -> bool:
    """Whether the manifest is sound and every file has its full size: quick, no file is read."""
    directory = step_directory(root, step)
    try:
        manifest = read_manifest((directory / MANIFEST).read_bytes())
        return all((directory / file.name).stat().st_size == file.bytes for file in manifest.files)
    except (OSError, ValueError):
        return False
