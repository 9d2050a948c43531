"""Types of the stream under tensor parallelism."""

from __future__ import annotations

import torch
import torch.distributed as dist

from tests.sameness.checks import config_of, plan_of, recipe_of
from tests.workers import run_on
from trainwright.parallel.world import World
from trainwright.training.sameness import Trial

BIASED = {"attention_bias": True, "mlp_bias": True, "num_hidden_layers": 2}


def types_of_stream() -> list[str]:
    """What each block of a model with biases returns in bf16, tp being 2."""
    world = World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    plan = plan_of(2, tp=2, precision="bf16")
    trial = Trial(recipe_of(), config_of("llama", **BIASED), plan, world)
    found: list[str] = []
    for block in trial.model.parts[0].blocks:
        block.register_forward_hook(lambda _, __, stream: found.append(str(stream.dtype)))
    trial.train(0)
    return found


def test_biases_that_are_added_after_the_sum_leave_the_stream_narrow():
    for found in run_on(2, types_of_stream):
        assert found and set(found) == {"torch.bfloat16"}
