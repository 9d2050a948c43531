"""A checkpoint saved on any number of workers, in any layout, loads bit for bit on any other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.checkpoint import jobs
from tests.workers import run_on
from trainwright.checkpoint.store import CheckpointStore

LAYOUTS = [(1, "plain"), (2, "ddp"), (2, "fsdp"), (4, "fsdp"), (4, "hsdp")]


def on(world_size: int, job, *arguments):
    """The job's answer, the same on every rank; a world of one needs no process group."""
    if world_size == 1:
        return job(*arguments)
    answers = run_on(world_size, job, *arguments)
    for answer in answers[1:]:
        same(answer, answers[0])
    return answers[0]


def same(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name, strict=True)


@pytest.mark.parametrize("world_size, layout", LAYOUTS)
def test_loads_on_every_other_layout(world_size: int, layout: str, tmp_path: Path) -> None:
    saved = on(world_size, jobs.trained_and_saved, layout, tmp_path, 2, world_size != 4)
    assert "optimizer.embed.weight.exp_avg_sq" in saved
    assert "optimizer.layers.1.up.weight.momentum" in saved
    assert saved["optimizer.layers.0.scale.step"] == 2
    assert CheckpointStore(tmp_path).verify(2) == []
    for other_size, other_layout in LAYOUTS:
        same(on(other_size, jobs.loaded, other_layout, tmp_path, 2), saved)


@pytest.mark.parametrize("world_size, layout", [(1, "plain"), (2, "fsdp"), (2, "ddp")])
def test_goes_on_bit_for_bit(world_size: int, layout: str, tmp_path: Path) -> None:
    through = on(world_size, jobs.trained_through, layout, 6)
    same(on(world_size, jobs.trained_with_a_break, layout, tmp_path, 6), through)


def test_shards_are_written_once_each(tmp_path: Path) -> None:
    """Replicas do not write what another one writes: files hold each element once."""
    for world_size, layout in ((1, "plain"), (2, "ddp"), (4, "hsdp")):
        on(world_size, jobs.trained_and_saved, layout, tmp_path / layout, 2, True)
    sizes = {
        layout: sum(
            np.prod(chunk.shape) * tensor.dtype.itemsize
            for name, tensor in CheckpointStore(tmp_path / layout).metadata(2).items()
            for chunk in tensor.chunks
            if not name.startswith("rng")
        )
        for layout in ("plain", "ddp", "hsdp")
    }
    assert len(set(sizes.values())) == 1, sizes
    files = {path.name for path in (tmp_path / "ddp" / "step-00000002").iterdir()}
    assert any(name.startswith("model-00001") for name in files), "rank 1 wrote nothing"
