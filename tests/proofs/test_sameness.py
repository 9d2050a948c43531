"""The proof of sameness in full, by the command that users have: eight workers, a hundred plans."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

pytestmark = pytest.mark.prove
SCHEDULES = {"gpipe", "1f1b", "interleaved", "zero_bubble", "zbv", "dualpipev"}
AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")


def verified(recipe: str, *options: str) -> list[dict]:
    """What `trainwright verify` prints of a recipe: a record a plan, all of them passed."""
    command = [sys.executable, "-m", "trainwright", "verify", str(REPOSITORY / recipe), "--json"]
    done = subprocess.run([*command, *options], capture_output=True, text=True)
    records = [json.loads(line) for line in done.stdout.splitlines()]
    failed = [record for record in records if not record["passed"]]
    assert done.returncode == 0 and not failed, (failed, done.stderr[-2000:])
    assert all(record["loss"] <= 1e-5 and record["gradient"] <= 1e-4 for record in records)
    return [record["plan"] for record in records]


def test_quickstart_on_eight_workers():
    """Quickstart's model ties its embeddings, so every pipeline here has a tied one."""
    plans = verified("examples/quickstart.yaml", "--world-size", "8")
    assert len({json.dumps(plan) for plan in plans}) >= 80
    assert {axis for plan in plans for axis in AXES if plan[axis] > 1} == set(AXES)
    assert {plan["schedule"] for plan in plans if plan["pp"] > 1} == SCHEDULES
    assert sum(sum(plan[axis] > 1 for axis in AXES) >= 3 for plan in plans) >= 25


def test_a_mixture_of_experts_on_eight_workers():
    plans = verified("examples/mixture-of-experts.yaml", "--world-size", "8")
    assert sum(plan["ep"] > 1 for plan in plans) >= 30


def test_sliding_windows_on_eight_workers():
    plans = verified(
        "examples/quickstart.yaml", "model.family=mistral", "--world-size", "8", "--plans", "30"
    )
    assert sum(plan["cp"] > 1 for plan in plans) >= 10


@pytest.mark.parametrize(
    "overrides",
    [[], ["objective=dpo"], ["adapter.rank=8"], ["objective=dpo", "adapter.rank=8"]],
    ids=["sft", "dpo", "lora", "dpo with lora"],
)
def test_fine_tuning_on_four_workers(overrides):
    plans = verified("examples/sft.yaml", *overrides, "--world-size", "4", "--plans", "20")
    assert len({json.dumps(plan) for plan in plans}) == 20
    assert {axis for plan in plans for axis in AXES if plan[axis] > 1} >= {"pp", "tp", "cp"}
