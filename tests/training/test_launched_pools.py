"""Workers of unequal speed that a launcher has started, planned for and trained."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.planner.pools import described
from tests.training.runs import Recorder, small_recipe, train_here
from tests.workers import run_on
from trainwright.planner.plan import Plan


def train_launched(folder: str, sections: dict) -> Recorder:
    """Train as a process whose launcher has said that it is one of several."""
    launcher = {"RANK": str(dist.get_rank()), "WORLD_SIZE": str(dist.get_world_size())}
    os.environ.update(launcher)
    try:
        return train_here(small_recipe(Path(folder), **sections))
    finally:
        for name in launcher:
            del os.environ[name]


def test_the_quicker_worker_gets_more_rows_and_the_run_is_the_same(tmp_path):
    small_recipe(tmp_path)  # the texts, before several processes want them
    plain = run_on(1, train_launched, str(tmp_path), {})[0]
    pools = described(tmp_path, quick=(3, 1), slow=(1, 1))
    sections = {
        "run_directory": str(tmp_path / "unequal"),
        "parallel": "auto",
        "cluster": str(pools),
    }
    found = run_on(2, train_launched, str(tmp_path), sections)
    plan = Plan.from_json((tmp_path / "unequal" / "plan.json").read_text())
    assert plan.rows_by_replica == (6, 2)
    assert found[0].hashes == found[1].hashes == plain.hashes
    assert found[0].losses == pytest.approx(plain.losses, rel=1e-5)
