"""Damaged checkpoints: every kind of damage is seen, the file named, the previous step offered."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.checkpoint.contents import assert_holds, content, save
from tests.workers import run_on
from trainwright.checkpoint.manifest import MANIFEST, read_manifest
from trainwright.checkpoint.store import CheckpointStore
from trainwright.errors import UserError

OFFER = "continue with `--from-step 80` (steps still complete: 60, 80)"
FILES = [
    "model-00000-000.safetensors",
    "optimizer-00000-001.safetensors",
    "rng_0-00000-002.safetensors",
    MANIFEST,
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("saved")
    save(root, 60, 80, 100)
    return root


@pytest.fixture
def root(saved: Path, tmp_path: Path) -> Path:
    """A store with steps 60, 80 and 100, to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def refusal(root: Path, step: int = 100) -> str:
    """What a load of `step` says; it must not touch what it was to fill."""
    into = {name: torch.full_like(t, 7.0) for name, t in content(step).items()}
    with pytest.raises(UserError) as error:
        CheckpointStore(root).load(step, into)
    assert all(bool((tensor == 7.0).all()) for tensor in into.values())
    return str(error.value)


def flip(path: Path, bit: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[bit // 8] ^= 1 << bit % 8
    path.write_bytes(raw)


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit(name: str, root: Path) -> None:
    path = root / "step-00000100" / name
    assert len(list(path.parent.iterdir())) == len(FILES)
    choose = random.Random(name)
    bits = [0, path.stat().st_size * 8 - 1]  # the first bit, the last, and some between
    bits += [choose.randrange(path.stat().st_size * 8) for _ in range(8)]
    for bit in bits:
        flip(path, bit)
        said = refusal(root)
        assert str(path) in said and OFFER in said
        assert [str(path) in mistake.what for mistake in CheckpointStore(root).verify(100)] == [
            True
        ]
        flip(path, bit)
    assert_holds(root, 100)


def test_every_bit_of_the_manifest_counts(saved: Path) -> None:
    """Also those that would change nothing, such as the case of a hexadecimal digit."""
    raw = (saved / "step-00000100" / MANIFEST).read_bytes()
    read_manifest(raw)
    for bit in range(len(raw) * 8):
        damaged = bytearray(raw)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError, match="hash"):
            read_manifest(bytes(damaged))


@pytest.mark.parametrize("name", FILES)
def test_truncated_and_deleted(name: str, root: Path) -> None:
    path = root / "step-00000100" / name
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[: len(whole) // 2], b"", whole + b"\0"):
        path.write_bytes(damaged)
        said = refusal(root)
        assert str(path) in said and OFFER in said
        assert len(CheckpointStore(root).verify(100)) == 1
    path.unlink()
    said = refusal(root)
    assert f"{path} is missing" in said and OFFER in said


def test_files_swapped_between_steps(root: Path) -> None:
    """Each file is sound by itself, and still not the one that belongs there."""
    old, new = root / "step-00000080", root / "step-00000100"
    shutil.copy(old / FILES[0], new / FILES[0])
    assert "hash differs" in refusal(root)
    shutil.rmtree(new)
    old.rename(new)
    assert f"{new / MANIFEST} is that of step 80" in refusal(root)


def test_a_stranger_is_reported_and_does_no_harm(root: Path) -> None:
    stranger = root / "step-00000100" / "notes.txt"
    stranger.write_text("mine")
    (mistake,) = CheckpointStore(root).verify(100)
    assert str(stranger) in mistake.what
    stranger.unlink()
    assert_holds(root, 100)


def test_offers_only_what_is_whole(root: Path) -> None:
    flip(root / "step-00000100" / FILES[0], 8000)
    (root / "step-00000080" / FILES[1]).unlink()
    assert "continue with `--from-step 60` (steps still complete: 60)" in refusal(root)
    shutil.rmtree(root / "step-00000060")
    assert "no other complete checkpoint is left" in refusal(root)


def test_a_missing_step_lists_the_others(root: Path) -> None:
    said = refusal(root, step=90)
    assert "no checkpoint of step 90" in said
    assert "continue with `--from-step 80` (steps still complete: 60, 80, 100)" in said


def test_damage_outside_what_is_loaded_is_no_obstacle(root: Path) -> None:
    """Weights alone can be had though the optimizer's file is damaged; `verify` still tells."""
    flip(root / "step-00000100" / FILES[1], 9000)
    into = {
        name: torch.zeros_like(tensor)
        for name, tensor in content(100).items()
        if name.startswith("model.")
    }
    CheckpointStore(root).load(100, into)
    assert all(torch.equal(into[name], content(100)[name]) for name in into)
    assert len(CheckpointStore(root).verify(100)) == 1


def load_on_every_rank(root: Path) -> str:
    into = {name: torch.full_like(tensor, 7.0) for name, tensor in content(100).items()}
    if dist.get_rank() == 0:  # wants less than rank 1, and must hear of damage in the rest
        into = {name: tensor for name, tensor in into.items() if not name.startswith("rng_0")}
    try:
        CheckpointStore(root).load(100, into)
    except UserError as error:
        assert all(bool((tensor == 7.0).all()) for tensor in into.values())
        return str(error)
    return ""


@pytest.mark.parametrize("name", FILES)
def test_all_ranks_refuse_alike(name: str, root: Path) -> None:
    flip(root / "step-00000100" / name, 5000)
    said, said_too = run_on(2, load_on_every_rank, root)
    assert said == said_too
    assert str(root / "step-00000100" / name) in said and OFFER in said
