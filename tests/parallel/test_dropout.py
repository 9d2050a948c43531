"""Dropout on any layout is that of one process: losses and gradients are the same."""

from __future__ import annotations

import pytest

from tests.parallel import layouts
from tests.parallel.layouts import Case, plan
from tests.workers import run_on
from trainwright.kernels import dropout as kernel

pytestmark = pytest.mark.slow

CASE = Case(training={"dropout": 0.25})
PLANS = {
    "micro-batches": plan(micro_batch=1, dp_replicate=4),
    "zero 2": plan(dp_replicate=2, dp_shard=2, zero=2),
    "tensor": plan(tp=2, dp_shard=2),
    "context": plan(cp=4, micro_batch=4),
    "pipeline": plan(pp=2, tp=2, schedule="gpipe"),
    "recomputed": plan(cp=2, tp=2, recompute="full"),
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return layouts.reference(tmp_path_factory.mktemp("dropout"), CASE)


@pytest.mark.parametrize("name", PLANS)
def test_the_same_on_any_layout(name, reference):
    for outcome in run_on(4, layouts.outcome, reference, CASE, PLANS[name]):
        assert outcome.passed, outcome


def with_keys_by_rank(folder: str, spread) -> object:
    """As if every worker counted its own rows and columns from 0."""
    honest = kernel.token_keys
    from trainwright.training import micro_batches

    micro_batches.token_keys = lambda seed, step, rows, slots: honest(
        seed, step, rows - rows[0], slots
    )
    try:
        return layouts.outcome(folder, CASE, spread)
    finally:
        micro_batches.token_keys = honest


def test_masks_that_differ_are_caught(reference):
    outcome = run_on(4, with_keys_by_rank, reference, PLANS["zero 2"])[0]
    assert not outcome.passed
    assert outcome.loss > 1e-3


def test_without_dropout_it_would_be_another_run(reference):
    assert not run_on(4, layouts.outcome, reference, Case(), PLANS["tensor"])[0].passed
