"""Compiled blocks with experts over workers, recomputed: as GPUs run them."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tests.sameness.checks import config_of, plan_of, recipe_of
from tests.workers import run_on
from trainwright.parallel.world import World
from trainwright.training.sameness import Trial

MIXTURE = {"num_local_experts": 4, "num_hidden_layers": 2}


def train(recompute: str) -> list[float]:
    """Two steps' losses and gradient norms; compiled, if recomputed, but without kernels."""
    world = World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    compiled = recompute != "none"
    plan = plan_of(2, dp_shard=2, ep=2, zero=3, recompute=recompute, compile=compiled)
    recipe = recipe_of("mixtral", router_balance_loss=0.01)
    compile_block = torch.nn.Module.compile
    torch.compiler.reset()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.nn.Module, "compile", lambda self: compile_block(self, backend="aot_eager")
        )
        trial = Trial(recipe, config_of("mixtral", **MIXTURE), plan, world)
        stats = [trial.train(index) for index in range(2)]
    torch.compiler.reset()
    return [figure for each in stats for figure in (each.loss, each.gradient_norm)]


@pytest.mark.parametrize("policy", ["full", "selective"])
def test_recomputing_compiled_experts_changes_nothing(policy):
    found, expected = run_on(2, train, policy)[0], run_on(2, train, "none")[0]
    assert found == pytest.approx(expected, rel=1e-5)
