"""Tensors that follow from a step's number, so that what is loaded can be checked exactly."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from trainwright.checkpoint.store import CheckpointStore


def content(step: int, tensors: int = 12, elements: int = 700) -> dict[str, Tensor]:
    """A few groups of tensors, different for every step."""
    generator = torch.Generator().manual_seed(step)
    groups = ("model", "optimizer", "rng_0")
    return {
        f"{groups[i % 3]}.tensor{i}": torch.randn(elements + i, generator=generator)
        for i in range(tensors)
    }


def save(root: Path, *steps: int, **options: int) -> CheckpointStore:
    """A store with these steps' contents saved in it."""
    store = CheckpointStore(root, keep_last=len(steps))
    for step in steps:
        store.save(step, content(step, **options), {"step": step})
    store.close()
    return CheckpointStore(root)


def assert_holds(root: Path, step: int, **options: int) -> None:
    """The checkpoint of `step` is whole, and holds exactly that step's content."""
    store = CheckpointStore(root)
    assert store.verify(step) == []
    expected = content(step, **options)
    into = {name: torch.full_like(tensor, torch.nan) for name, tensor in expected.items()}
    assert store.load(step, into) == {"step": step}
    for name, tensor in expected.items():
        assert torch.equal(into[name], tensor), f"step {step}: {name}"


def hidden(root: Path) -> list[str]:
    """What lies under `root` that is neither a committed step nor the lock."""
    names = (path.name for path in root.iterdir())
    return sorted(name for name in names if not name.startswith("step-") and name != ".writer")
