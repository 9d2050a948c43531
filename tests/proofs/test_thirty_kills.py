"""A whole run killed thirty times while it saves: it always goes on, and ends on the same bits."""

from __future__ import annotations

import random

import pytest
import torch

from tests.training.runs import write_recipe
from tests.training.test_resume import kill_all, records, run, saved_tensors, start, wait_for
from trainwright.checkpoint.store import CheckpointStore

pytestmark = pytest.mark.prove

SECTIONS = {
    "training": {"steps": 400},
    "parallel": {"workers": 2, "micro_batch": 4},
    "checkpoint": {"every": 2, "keep_last": 3},
}


def test_thirty_kills_end_on_the_bits_of_an_unbroken_run(tmp_path):
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    for folder in (unbroken, killed):
        folder.mkdir()
    run("train", write_recipe(unbroken, **SECTIONS))
    recipe = write_recipe(killed, **SECTIONS)
    store = CheckpointStore(killed / "run" / "checkpoints")
    rng = random.Random(11)
    for _ in range(30):
        before = store.latest() or 0
        process = start("train", recipe)
        # Until a checkpoint further on is just being written, then a little of that write.
        goal = before + 2 * rng.randint(1, 3)
        wait_for(process, lambda goal=goal: (store.latest() or 0) >= goal)
        for _ in range(rng.randint(0, 2000)):
            if any(store.root.glob(".*tmp*")):
                break
        kill_all(process)
        newest = store.latest()
        assert newest is not None and newest >= goal
        assert store.verify(newest) == []
    run("train", recipe)
    for name, tensor in saved_tensors(unbroken, 400).items():
        assert torch.equal(tensor, saved_tensors(killed, 400)[name]), name
    assert [r["loss"] for r in records(killed)] == [r["loss"] for r in records(unbroken)]
