"""The store alone: what can be saved, what is refused, which steps stay."""

from __future__ import annotations

import json
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from tests.checkpoint.contents import assert_holds, content, hidden, save
from tests.workers import start
from trainwright.checkpoint import storage
from trainwright.checkpoint.commit import steps_to_keep
from trainwright.checkpoint.manifest import DTYPES
from trainwright.checkpoint.store import CheckpointStore
from trainwright.errors import UserError


def every_kind() -> dict[str, torch.Tensor]:
    """Every dtype in every awkward form: 0-d, empty, one element, transposed, strided."""
    tensors: dict[str, torch.Tensor] = {}
    for name, dtype in DTYPES.items():
        bits = torch.arange(1, 21 * dtype.itemsize + 1, dtype=torch.uint8)
        grid = (bits % 2).bool() if dtype == torch.bool else bits.view(dtype)
        grid = grid.view(3, 7)
        tensors |= {
            f"all.{name}.grid": grid,
            f"all.{name}.transposed": grid.t(),
            f"all.{name}.strided": grid[:, ::3],
            f"all.{name}.scalar": grid[1, 2],
            f"all.{name}.empty": grid[:0],
            f"all.{name}.one": grid[:1, :1],
        }
    return tensors


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("file_bytes", [1, 50, 2**30])
def test_every_dtype_and_form(
    file_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "FILE_BYTES", file_bytes)
    tensors = every_kind()
    with CheckpointStore(tmp_path) as store:
        store.save(1, tensors, {})
        store.wait()
        assert store.metadata(1).keys() == tensors.keys()
        into = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
        store.load(1, into)
    for name, tensor in tensors.items():
        assert into[name].dtype == tensor.dtype and into[name].shape == tensor.shape
        assert raw(into[name]) == raw(tensor), name


def test_files_are_safetensors_and_nothing_else(tmp_path: Path) -> None:
    """Another implementation of the format reads the same values."""
    tensors = every_kind()
    with CheckpointStore(tmp_path) as store:
        store.save(1, tensors, {})
    (path,) = store.directory(1).glob("*.safetensors")
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == set(tensors)
        for name in file.keys():  # noqa: SIM118 (it is no dictionary)
            if "F8_E8M0" not in name:  # safetensors 0.8 has no torch dtype for it
                assert raw(file.get_tensor(name)) == raw(tensors[name]), name
    for name, tensor in store.metadata(1).items():
        assert tensor.chunks[0].byte % tensor.dtype.itemsize == 0, f"{name} is not aligned"
    json.loads((store.directory(1) / "manifest.json").read_text())
    assert len(list(store.directory(1).iterdir())) == 2


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("something was unpickled")

    save(tmp_path, 1, 2)
    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, never)
    monkeypatch.setattr(torch, "load", never)
    assert_holds(tmp_path, 2)
    for path in tmp_path.rglob("*.*"):
        if path.is_file():
            assert not path.read_bytes().startswith((b"PK", b"\x80")), path


def test_what_changes_after_save_returns_is_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The write begins only once the tensors and the meta have been changed."""
    tensors, meta = content(1), {"step": 1, "list": [1]}
    changed = threading.Event()
    real = storage.write_file

    def write_file(*arguments: Any) -> Any:
        assert changed.wait(timeout=60)
        return real(*arguments)

    monkeypatch.setattr(storage, "write_file", write_file)
    with CheckpointStore(tmp_path) as store:
        store.save(1, tensors, meta)
        for tensor in tensors.values():
            tensor.fill_(torch.nan)
        meta["list"].append(2)
        changed.set()
        # The second save reuses the memory of the first, which it must wait for.
        store.save(2, content(2), {"step": 2})
        assert store.steps() == [1]
    into = {name: torch.zeros_like(tensor) for name, tensor in content(1).items()}
    assert store.load(1, into) == {"step": 1, "list": [1]}
    assert all(torch.equal(into[name], content(1)[name]) for name in into)
    assert_holds(tmp_path, 2)


def save_and_leave(root: Path) -> None:
    store = CheckpointStore(root)
    store.save(1, content(1, elements=500_000), {"step": 1})


def test_the_interpreter_waits_for_the_write(tmp_path: Path) -> None:
    process = start(save_and_leave, tmp_path)
    process.join()
    assert process.exitcode == 0
    assert_holds(tmp_path, 1, elements=500_000)


def test_a_failed_save_is_raised_by_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_file", lambda *_: (_ for _ in ()).throw(RuntimeError("bad")))
        store.save(1, content(1), {})
        with pytest.raises(RuntimeError, match="bad"):
            store.save(2, content(2), {})
    assert store.steps() == []  # the second save was not begun
    store.save(2, content(2), {"step": 2})
    store.close()
    assert_holds(tmp_path, 2)


# ---- what is loaded must fit -----------------------------------------------------------------


def test_differences_are_all_named(tmp_path: Path) -> None:
    store = save(tmp_path, 1)
    into = {name: torch.full_like(tensor, 7.0) for name, tensor in content(1).items()}
    into["model.tensor0"] = torch.full((2, 350), 7.0)
    into["model.tensor3"] = into["model.tensor3"].double()
    into["model.new"] = torch.full((1,), 7.0)
    with pytest.raises(UserError) as error:
        store.load(1, into)
    assert [mistake.what for mistake in error.value.mistakes] == [
        "model.tensor0 was saved with shape (700,), not (2, 350)",
        "model.tensor3 was saved as torch.float32, not torch.float64",
        "model.new is not in the checkpoint of step 1",
    ]
    assert all(bool((tensor == 7.0).all()) for tensor in into.values())


def test_what_nobody_loads_is_named_within_a_group_only(tmp_path: Path) -> None:
    store = save(tmp_path, 1)
    into = {name: torch.zeros_like(t) for name, t in content(1).items() if name[:5] == "model"}
    store.load(1, into)  # the optimizer's group is not mentioned, so it stays where it is
    del into["model.tensor6"]
    with pytest.raises(UserError, match=r"model\.tensor6 is in the checkpoint of step 1, but"):
        store.load(1, into)


def test_many_differences_are_counted(tmp_path: Path) -> None:
    store = save(tmp_path, 1)
    into = {f"other.tensor{i}": torch.zeros(1) for i in range(50)}
    with pytest.raises(UserError) as error:
        store.load(1, into)
    assert len(error.value.mistakes) == 9
    assert "42 more" in error.value.mistakes[-1].what


def test_what_cannot_be_stored_is_refused(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    with pytest.raises(TypeError, match=r"x: safetensors files cannot hold torch\.complex128"):
        store.save(1, {"x": torch.zeros(2, dtype=torch.complex128)}, {})
    with pytest.raises(TypeError, match="JSON"):
        store.save(1, {}, {"path": tmp_path})
    assert store.steps() == []


# ---- which steps there are -------------------------------------------------------------------


def test_the_same_content_again_changes_nothing(tmp_path: Path) -> None:
    store = save(tmp_path, 1)
    before = {path: path.stat().st_mtime_ns for path in store.directory(1).iterdir()}
    store.save(1, content(1), {"step": "anything"}, asynchronous=False)
    assert {path: path.stat().st_mtime_ns for path in store.directory(1).iterdir()} == before
    assert hidden(tmp_path) == []


def test_other_content_is_never_written_over(tmp_path: Path) -> None:
    store = save(tmp_path, 1)
    with pytest.raises(UserError, match=r"step-00000001 exists already, with other content"):
        store.save(1, content(2), {}, asynchronous=False)
    assert hidden(tmp_path) == []
    assert_holds(tmp_path, 1)


def test_a_damaged_step_is_replaced(tmp_path: Path) -> None:
    store = save(tmp_path, 1, 2)
    next(store.directory(2).glob("model*")).write_bytes(b"damaged")
    store.save(2, content(2), {"step": 2}, asynchronous=False)
    assert hidden(tmp_path) == []
    assert_holds(tmp_path, 2)


def test_rewind_sets_newer_steps_aside(tmp_path: Path) -> None:
    store = save(tmp_path, 60, 80, 100)
    with store:
        store.rewind(60)
        assert store.steps() == [60]
        store.save(80, content(1), {})
        store.rewind(60)
    assert hidden(tmp_path) == [
        "abandoned-step-00000080",
        "abandoned-step-00000080-2",
        "abandoned-step-00000100",
    ]
    assert_holds(tmp_path, 60)


def try_to_save(root: Path) -> None:
    store = CheckpointStore(root)
    assert_holds(root, 1)  # reading needs no lock
    with pytest.raises(UserError, match=f"another process is saving checkpoints in {root}"):
        store.save(2, content(2), {}, asynchronous=False)
    with pytest.raises(UserError, match="another process"):
        store.claim()


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    """A second process must neither write here nor take our unfinished work for a leftover."""
    save(tmp_path, 1)
    with CheckpointStore(tmp_path) as store:
        store.claim()
        working = tmp_path / ".step-00000002-abcdef01.tmp"
        working.mkdir()
        process = start(try_to_save, tmp_path)
        process.join()
        assert process.exitcode == 0
        assert working.exists()
    with CheckpointStore(tmp_path) as store:
        store.claim()
        assert not working.exists()


@pytest.mark.parametrize(
    "rule, kept",
    [
        ({"keep_last": 1}, {90}),
        ({"keep_last": 2}, {80, 90}),
        ({"keep_last": 20}, set(range(10, 91, 10))),
        ({"keep_last": 1, "keep_every": 30}, {30, 60, 90}),
        ({"keep_last": 1, "keep_best": True}, {40, 90}),
        ({"keep_last": 2, "keep_every": 50, "keep_best": True}, {40, 50, 80, 90}),
    ],
)
def test_retention_rules(rule: dict[str, Any], kept: set[int]) -> None:
    metrics = {10: 3.0, 20: 1.0, 30: float("nan"), 40: 1.0, 50: None, 80: 2.0}
    every = {"keep_every": None, "keep_best": False, **rule}
    assert steps_to_keep(range(10, 91, 10), metrics, **every) == kept


def test_retention_after_each_commit(tmp_path: Path) -> None:
    losses = {1: 5.0, 2: 1.0, 3: 4.0, 4: 2.0, 5: 3.0, 6: 3.0}
    with CheckpointStore(tmp_path, keep_last=1, keep_every=3, keep_best=True) as store:
        for step, loss in losses.items():
            store.save(step, content(step), {"step": step}, metric=loss)
        store.wait()
        assert store.steps() == [2, 3, 6]
    with CheckpointStore(tmp_path, keep_last=1, keep_every=3, keep_best=True) as store:
        store.save(7, content(7), {"step": 7}, metric=0.5)  # the best of an earlier process counts
        store.wait()
        assert store.steps() == [3, 6, 7]
    assert hidden(tmp_path) == []
    for step in (3, 6, 7):
        assert_holds(tmp_path, step)


def test_a_store_that_holds_nothing(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "none")
    assert store.steps() == [] and store.latest() is None
    assert len(store.verify(1)) == 1
    with pytest.raises(UserError, match="no checkpoint of step 1"):
        store.read_meta(1)
    assert not (tmp_path / "none").exists(), "looking made a folder"
