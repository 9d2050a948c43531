"""Processes killed while they save: the newest or the previous checkpoint is there, and whole."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.checkpoint.contents import assert_holds, content, hidden, save
from tests.workers import WorkerLostError, run_on, start
from trainwright.checkpoint import storage
from trainwright.checkpoint.store import CheckpointStore

KILLS = 30
PATIENCE = 60.0
SYSTEM_CALLS = ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir")


def save_forever(root: Path, first: int, diary: Path) -> None:
    """Save step after step; after each, write its number into the diary."""
    storage.FILE_BYTES = 1  # a file a tensor: more moments to die at
    store = CheckpointStore(root, keep_last=2)
    with diary.open("a", buffering=1) as written:
        for step in range(first, first + 10_000):
            store.save(step, content(step), {"step": step}, asynchronous=step % 2 == 0)
            store.wait()
            print(step, file=written)


def test_thirty_random_kills(tmp_path: Path) -> None:
    root, diary = tmp_path / "checkpoints", tmp_path / "diary"
    diary.touch()
    choose = random.Random(30)
    torn = 0
    for _ in range(KILLS):
        newest = CheckpointStore(root).latest() or 0
        saver = start(save_forever, root, newest + 1, diary)
        _watch(root, newest + choose.randrange(1, 4), choose.randrange(0, 15), saver)
        saver.kill()
        saver.join()
        assert saver.exitcode == -signal.SIGKILL, "it ended by itself"

        done = [int(line) for line in diary.read_text().split()]
        steps = CheckpointStore(root).steps()
        torn += any(name.endswith(".tmp") for name in hidden(root))
        if done:
            assert steps[-1] in (done[-1], done[-1] + 1)
            assert len(steps) >= min(2, len(done)), "the previous checkpoint is gone"
        for step in steps:
            assert_holds(root, step)
        assert len(hidden(root)) <= 2, "what an earlier process left was not cleaned up"
    assert torn >= KILLS // 3, "most kills missed the moment of writing"


def _watch(root: Path, step: int, files: int, saver: Any) -> None:
    """Return once `files` files of `step` are written, or the step, or a later one, is there."""
    deadline = time.monotonic() + PATIENCE
    committed = root / f"step-{step:08d}"
    while time.monotonic() < deadline and saver.is_alive():
        unfinished = next(root.glob(f".step-{step:08d}-*.tmp"), None)
        try:
            if committed.exists() or (unfinished and len(list(unfinished.iterdir())) >= files):
                return
        except FileNotFoundError:  # renamed between the two looks
            return
    raise AssertionError("the saver got nowhere")


def save_and_die(root: Path, fatal: int) -> None:
    """Save step 3, but die instead of the `fatal`-th system call that changes the disk."""
    calls = 0

    def deadly(call: Any) -> Any:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == fatal:
                os._exit(9)
            return call(*arguments, **named)

        return wrapped

    for name in SYSTEM_CALLS:
        setattr(os, name, deadly(getattr(os, name)))
    with CheckpointStore(root, keep_last=2) as store:
        store.save(3, content(3), {"step": 3})


def test_death_at_every_system_call(tmp_path: Path) -> None:
    """Each call of the commit in turn is the last: before it, the old state; after it, the new."""
    template = tmp_path / "template"
    save(template, 1, 2)
    newest_after = []
    for fatal in range(1, 200):
        root = tmp_path / f"died-{fatal}"
        shutil.copytree(template, root)
        saver = start(save_and_die, root, fatal)
        saver.join()
        steps = CheckpointStore(root).steps()
        for step in steps:
            assert_holds(root, step)
        newest_after.append(steps[-1])
        assert {2, steps[-1]} <= set(steps)
        with CheckpointStore(root) as store:
            store.claim()
            assert hidden(root) == [], "leftovers survive the next start"
            store.save(4, content(4), {"step": 4})
        assert_holds(root, 4)
        if saver.exitcode == 0:
            break
        assert saver.exitcode == 9
    else:
        raise AssertionError("it never came to its end")
    # 3 files, manifest, directory, rename, parent; then the oldest checkpoint's deletion.
    assert len(newest_after) > 12
    assert newest_after == sorted(newest_after), "a commit was undone"
    assert set(newest_after) == {2, 3}


def test_order_of_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data is on disk before the manifest, the manifest before the name, the name at the end."""
    events: list[tuple[str, str]] = []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(handle: int) -> None:
        events.append(("fsync", str(Path(f"/proc/self/fd/{handle}").readlink())))
        real_fsync(handle)

    def rename(source: Any, target: Any, **named: Any) -> None:
        events.append(("rename", str(target)))
        real_rename(source, target, **named)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    with CheckpointStore(tmp_path) as store:
        store.save(3, content(3), {})
    names = [Path(path).name for _, path in events]
    assert all(name.endswith(".safetensors") for name in names[:-4])
    assert len(set(names[:-4])) == 3
    assert names[-4] == "manifest.json"
    assert names[-3].endswith(".tmp"), "the new files' names are not flushed"
    assert events[-2] == ("rename", str(tmp_path / "step-00000003"))
    assert events[-1] == ("fsync", str(tmp_path)), "the rename is not flushed"


def save_and_lose_a_rank(root: Path) -> None:
    """Rank 1 is killed when it has written half of its files."""
    store = CheckpointStore(root)
    real, written = storage.write_file, []

    def write_file(*arguments: Any) -> Any:
        written.append(real(*arguments))
        if dist.get_rank() == 1 and len(written) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return written[-1]

    storage.FILE_BYTES, storage.write_file = 1, write_file
    store.save(3, content(3), {"step": 3})
    store.wait()


def test_one_rank_is_killed(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    with pytest.raises(WorkerLostError, match="exit code -9"):
        run_on(2, save_and_lose_a_rank, tmp_path)
    assert CheckpointStore(tmp_path).steps() == [1, 2]
    assert_holds(tmp_path, 2)
    with CheckpointStore(tmp_path) as store:
        store.claim()
    assert hidden(tmp_path) == []
