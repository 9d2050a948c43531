"""Disks that are full, or fail: nothing is committed, nothing lost, and the message helps."""

from __future__ import annotations

import ctypes
import ctypes.util
import errno
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.checkpoint.contents import assert_holds, content, hidden, save
from tests.workers import run_on, start
from trainwright.checkpoint import commit, storage
from trainwright.checkpoint.store import CheckpointStore
from trainwright.errors import UserError

BIG = {"model.big": torch.zeros(1_000_000)}  # 4 MB


def save_beyond_the_limit(root: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    with CheckpointStore(root) as store:
        store.save(3, BIG, {}, asynchronous=False)


def expect_refusal(root: Path, asynchronous: bool) -> None:
    """In a process whose files may have 100 kB: the save fails, and the next one works."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    store = CheckpointStore(root)
    with pytest.raises(UserError) as error:
        store.save(3, BIG, {}, asynchronous=asynchronous)
        store.wait()
    said = str(error.value)
    assert f"no room for the checkpoint in {root}" in said
    assert "it needs 4.00 MB" in said and "are free" in said and "File too large" in said
    assert "the checkpoints saved before are untouched" in said
    assert hidden(root) == []
    store.wait()  # told once
    store.save(3, content(3), {"step": 3}, asynchronous=asynchronous)
    store.close()


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_write_fails_midway(asynchronous: bool, tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    process = start(expect_refusal, tmp_path, asynchronous)
    process.join()
    assert process.exitcode == 0
    assert CheckpointStore(tmp_path).steps() == [2, 3]
    assert_holds(tmp_path, 3)
    assert_holds(tmp_path, 2)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 3 MB, where the system lets us have one."""
    libc = ctypes.CDLL(ctypes.util.find_library("c"), use_errno=True)
    place = tmp_path / "disk"
    place.mkdir()
    if libc.mount(b"tmpfs", bytes(place), b"tmpfs", 0, b"size=3m") != 0:
        pytest.skip(f"cannot mount a small disk: {os.strerror(ctypes.get_errno())}")
    yield place
    libc.umount2(bytes(place), 2)


def test_a_full_disk_is_refused_before_writing(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(small_disk, 1)
    monkeypatch.setattr(storage, "write_file", lambda *_: pytest.fail("it began to write"))
    with pytest.raises(UserError) as error, CheckpointStore(small_disk) as store:
        store.save(3, BIG, {})
    assert f"no room for the checkpoint in {small_disk}: it needs 5.09 MB" in str(error.value)
    monkeypatch.undo()
    assert hidden(small_disk) == []
    assert_holds(small_disk, 1)


def test_a_disk_that_fills_while_writing(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others write too: the room that was there before may be gone."""
    save(small_disk, 1)
    monkeypatch.setattr(commit, "begin", _begin_in_good_faith)
    with (
        pytest.raises(UserError, match="No space left on device"),
        CheckpointStore(small_disk) as s,
    ):
        s.save(3, BIG, {})
    assert hidden(small_disk) == []
    assert_holds(small_disk, 1)


def _begin_in_good_faith(root: Path, step: int, total_bytes: int) -> Path:
    return _begin(root, step, 0)


_begin = commit.begin


def test_the_manifest_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    monkeypatch.setattr(commit, "publish", _raise_full)
    with pytest.raises(UserError, match="no room"), CheckpointStore(tmp_path) as store:
        store.save(3, content(3), {})
    assert hidden(tmp_path) == []
    assert CheckpointStore(tmp_path).steps() == [1]


def _raise_full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fail_on_one_rank(root: Path, failing: int, number: int) -> list[str]:
    """Both ranks save three times; the second fails on one rank. What each was told, by save."""
    real = storage.write_file
    told = []
    store = CheckpointStore(root)
    for step in (2, 3, 4):
        broken = step == 3 and dist.get_rank() == failing
        storage.write_file = _fails(number) if broken else real
        try:
            store.save(step, content(step), {"step": step}, asynchronous=failing == 0)
            store.wait()
            told.append("")
        except UserError as error:
            told.append(str(error))
    storage.write_file = real
    store.close()
    return told


def _fails(number: int) -> Any:
    def write_file(path: Path, tensors: Any) -> None:
        raise OSError(number, os.strerror(number), str(path))

    return write_file


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize(
    "number, words", [(errno.ENOSPC, "no room"), (errno.EIO, "Input/output error")]
)
def test_one_rank_cannot_write(failing: int, number: int, words: str, tmp_path: Path) -> None:
    save(tmp_path, 1)
    for told in run_on(2, fail_on_one_rank, tmp_path, failing, number):
        assert [bool(text) for text in told] == [False, True, False]
        assert words in told[1] and str(tmp_path) in told[1]
    assert CheckpointStore(tmp_path).steps() == [2, 4]
    assert hidden(tmp_path) == []
    assert_holds(tmp_path, 4)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    store = CheckpointStore(tmp_path / "file")
    with pytest.raises(UserError, match="could not be written"):
        store.save(1, content(1), {}, asynchronous=False)
    with pytest.raises(UserError, match="could not be written"):
        store.claim()
