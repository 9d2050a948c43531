"""Twenty runs with a rank at fault at a random step: no survivor outlives 30 s, and the first
message names the rank.
"""

from __future__ import annotations

import random

import pytest

from tests.resilience.faults import LIMIT, run_with_fault

pytestmark = pytest.mark.prove

KINDS = ["killed", "stopped", "raising"]


@pytest.mark.parametrize("number", range(20))
def test_all_end_within_the_limit_and_the_rank_is_named(number, tmp_path):
    rng = random.Random(number)
    kind, workers = KINDS[number % 3], rng.choice([2, 4])
    rank, step = rng.randrange(workers), rng.randint(1, 40)
    outcome = run_with_fault(tmp_path, kind, rank, step, workers)
    assert outcome.code == 1, outcome.said
    assert outcome.seconds < LIMIT
    first = outcome.first_line()
    assert first.startswith(f"rank {rank} "), outcome.said
    word = {"killed": "was killed", "stopped": "was stopped", "raising": "failed"}[kind]
    assert word in first
    if kind == "raising":
        assert f"ValueError: the disk of rank {rank} says no" in outcome.said
    for other in range(workers):
        assert (outcome.run / "logs" / f"rank{other}.log").exists()
