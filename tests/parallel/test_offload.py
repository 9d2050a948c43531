"""Whatever waits on the host, a plan trains as one process does."""

from __future__ import annotations

import pytest
import torch

from tests.parallel import layouts
from tests.parallel.layouts import Case, plan
from tests.workers import run_on
from trainwright.parallel.precision import offload_policy

PLANS = {
    "optimizer, sharded": plan(dp_shard=2, zero=1, offload="optimizer"),
    "optimizer, cut": plan(tp=2, offload="optimizer"),
    "parameters": plan(dp_shard=2, offload="parameters"),
    "activations": plan(tp=2, activation_offload=True),
    "activations, recomputed": plan(dp_shard=2, activation_offload=True, recompute="selective"),
    "everything": plan(dp_shard=2, offload="parameters", activation_offload=True, recompute="full"),
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return layouts.reference(tmp_path_factory.mktemp("offload"), Case())


@pytest.mark.parametrize("name", PLANS)
def test_the_same_as_one_process(name, reference):
    for outcome in run_on(2, layouts.outcome, reference, Case(), PLANS[name]):
        assert outcome.passed, outcome


def test_only_offloaded_parameters_have_a_policy():
    device = torch.device("cpu")
    assert not hasattr(offload_policy(plan(dp_shard=2), device), "pin_memory")
    assert not hasattr(offload_policy(plan(dp_shard=2, offload="optimizer"), device), "pin_memory")
    assert offload_policy(PLANS["parameters"], device).pin_memory is False
    assert offload_policy(PLANS["parameters"], torch.device("cuda")).pin_memory is True
