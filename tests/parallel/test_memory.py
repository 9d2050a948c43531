"""The closed formulas of memory against what a worker really holds while it trains.

States are weighed as storages of all tensors that are alive: weights, gradients and optimizer
states, what FSDP2 has gathered, adds up whole or is reducing, and whatever else somebody forgot.
Activations are what the allocator handed out at most, from a micro-batch's start to its end.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from tests.workers import run_on
from trainwright.models.families import DecoderConfig, decoder_config, new_hf_config
from trainwright.planner.layout import split_layers
from trainwright.planner.memory import Memory, activation_bytes, state_bytes
from trainwright.planner.plan import Plan
from trainwright.planner.schedules import schedule_mistakes

# Millions of parameters and few tokens, so that states are nearly all there is.
DENSE = new_hf_config(
    "llama",
    {
        "hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 16,
    },
    1024,
)  # fmt: skip
TIED = {**DENSE, "tie_word_embeddings": True}
SPARSE = new_hf_config(
    "qwen3_moe",
    {
        "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "head_dim": 16,
        "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 16,
        "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256,
    },
    512,
)  # fmt: skip
# The other way round: activations are nearly all there is.
DEEP = new_hf_config(
    "llama",
    {
        "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    },
    64,
)  # fmt: skip

STATES: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "alone": (1, DENSE, {}),
    "replicas": (2, DENSE, {"dp_replicate": 2}),
    "zero 1": (2, DENSE, {"dp_shard": 2, "zero": 1}),
    "zero 2": (2, DENSE, {"dp_shard": 2, "zero": 2}),
    "zero 3": (2, DENSE, {"dp_shard": 2, "zero": 3, "accumulation": 8}),
    "zero 1 in bf16": (2, DENSE, {"dp_shard": 2, "zero": 1, "precision": "bf16"}),
    "zero 3 in bf16": (
        2, DENSE, {"dp_shard": 2, "zero": 3, "precision": "bf16", "accumulation": 8}),
    "zero 3 at once": (2, DENSE, {"dp_shard": 2, "zero": 3, "accumulation": 1}),
    "tp": (2, DENSE, {"tp": 2}),
    "tp, attention whole": (2, DENSE, {"tp": 2, "whole": ("attention",)}),
    "pp": (2, DENSE, {"pp": 2}),
    "ep": (2, SPARSE, {"dp_shard": 2, "ep": 2, "zero": 2}),
    "zero 3 of 4": (4, TIED, {"dp_shard": 4, "zero": 3}),
    "replicas of shards": (4, DENSE, {"dp_replicate": 2, "dp_shard": 2, "zero": 2}),
    "tp and zero 3": (4, DENSE, {"tp": 2, "dp_shard": 2, "zero": 3, "accumulation": 8}),
    "cp and zero 2": (4, DENSE, {"cp": 2, "dp_shard": 2, "zero": 2}),
    "tied pp and zero 1": (4, TIED, {"pp": 2, "dp_shard": 2, "zero": 1, "schedule": "zbv"}),
    "pp of 4": (4, DENSE, {"pp": 4, "schedule": "gpipe"}),
    "ep and zero 3": (4, SPARSE, {"dp_shard": 4, "ep": 2, "zero": 3}),
    "ep and tp": (4, SPARSE, {"dp_shard": 2, "ep": 2, "tp": 2, "zero": 2}),
}  # fmt: skip
ROWS = 16  # of `Trial`


def plan_of(config: DecoderConfig, world: int, sequence: int, **fields: Any) -> Plan:
    """Four micro-batches a step, unless told otherwise."""
    fields = {"accumulation": 4, **fields}
    plan = replace(Plan.alone(), world_size=world, sequence_length=sequence, **fields)
    plan = replace(plan, micro_batch=ROWS // plan.data_ranks // plan.accumulation)
    if plan.pp == 1:
        return plan
    plan = replace(plan, virtual_stages=2 if plan.schedule == "zbv" else 1)
    assert not schedule_mistakes(plan.schedule, plan.pp, plan.virtual_stages, plan.accumulation)
    return replace(plan, stage_layers=split_layers(config, plan.stages))


def trial_of(hf_config: dict[str, Any], plan: Plan) -> Any:
    """On a worker: a model that has trained a step, so that its optimizer has states."""
    import torch
    import torch.distributed as dist

    from trainwright.parallel.world import World
    from trainwright.recipe.schema import Recipe
    from trainwright.training.sameness import Trial

    recipe = Recipe.model_validate(
        {
            "model": {"family": "llama", "preset": "4m"},
            "training": {"steps": 2, "precision": plan.precision},
            "data": {"sequence_length": plan.sequence_length},
        }
    )
    world = World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    trial = Trial(recipe, hf_config, plan, world)
    trial.train(0)
    return trial


@contextmanager
def forgetting_the_past() -> Iterator[None]:
    """What is alive now is none of `alive`'s business."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def alive() -> int:
    """Bytes of the storages of all tensors, each counted once."""
    import torch
    from torch.distributed.tensor import DTensor

    storages: dict[int, int] = {}
    for found in gc.get_objects():
        if not issubclass(type(found), torch.Tensor):
            continue
        # Gradients may have no object of their own until somebody asks for them.
        for tensor in (found, found.grad if found.is_leaf else None):
            tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            if tensor is not None and not tensor.is_meta:
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def weigh(hf_config: dict[str, Any], plan: Plan) -> tuple[int, dict[str, int]]:
    """On a worker: its pipeline rank, and bytes alive at moments of a step.

    Before the second micro-batch (`between`), while the last block runs for it (`inside`), and
    when the gradients are complete (`ready`).
    """
    with forgetting_the_past():
        trial, held = trial_of(hf_config, plan), {}
        model = trial.model
        before_backward, numbers = model.before_backward, iter(range(1_000))
        number = -1

        def before(stage: int, *, last: bool) -> None:
            nonlocal number
            number = next(numbers)
            if number == 1 and plan.pp == 1:
                held["between"] = alive()
            before_backward(stage, last=last)

        def inside(*_: Any) -> None:
            if number == 1 and plan.zero == 3:
                held["inside"] = alive()

        def ready() -> None:
            held["ready"] = alive()

        model.before_backward, trial.step.gradients_ready = before, ready
        network = list(model.parts[0].blocks)[-1].mlp
        hook = getattr(network, "experts", network).register_forward_pre_hook(inside)
        trial.train(1)
        hook.remove()
        return model.mesh.index("pp"), held


def formulas(memory: Memory, plan: Plan) -> dict[str, float]:
    """What the planner says of each moment of `weigh`."""
    ready = memory.parameters + memory.gradients + memory.optimizer
    # ZeRO-3 gathers for every pass; 1 and 2 once a step, and keep it.
    if plan.zero == 3:
        return {"ready": ready, "between": memory.total - memory.gathered, "inside": memory.total}
    return {"ready": ready, "between": memory.total}


def test_stages_of_zero_differ_by_more_than_the_test_allows() -> None:
    config = decoder_config(DENSE)
    sizes = {
        zero: formulas(state_bytes(config, plan), plan)["between"]
        for zero in (1, 2, 3)
        for plan in [plan_of(config, 4, 16, dp_shard=4, zero=zero)]
    }
    assert sizes[1] > 1.1 * sizes[2] > 1.1 * 1.1 * sizes[3]


@pytest.mark.slow
@pytest.mark.parametrize("name", STATES)
def test_states_are_what_the_formulas_say(name: str) -> None:
    world, hf_config, fields = STATES[name]
    config = decoder_config(hf_config)
    plan = plan_of(config, world, 16, **fields)
    for pp_rank, held in run_on(world, weigh, hf_config, plan):
        expected = formulas(state_bytes(config, plan, pp_rank), plan)
        if plan.pp > 1 or plan.accumulation == 1:  # no moment without activations
            expected = {"ready": expected["ready"]}
        for moment, size in expected.items():
            assert held[moment] == pytest.approx(size, rel=0.05), moment


def peak(hf_config: dict[str, Any], plan: Plan) -> tuple[int, int]:
    """On a worker: its pipeline rank, and the most that the allocator gave out at once.

    From the first micro-batch to the last, all states and gradients being there already.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile

    trial = trial_of(hf_config, plan)
    model = trial.model
    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    begin_step, finish_gradients = model.begin_step, model.finish_gradients

    def begin() -> None:
        begin_step()
        for parameter in model.trained_parameters():
            parameter.grad = torch.zeros_like(parameter)
        profiler.start()

    def finish() -> None:
        profiler.stop()
        finish_gradients()

    model.begin_step, model.finish_gradients = begin, finish
    trial.train(1)
    results = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in results if e.name() == "[memory]")
    held = most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return model.mesh.index("pp"), most


def partitioned(hf_config: dict[str, Any], plan: Plan) -> tuple[int, int]:
    """`peak` with the compiler's choice of what to keep, but without kernels, which take long."""
    import torch

    compiled = torch.nn.Module.compile
    torch.compiler.reset()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Module, "compile", lambda self: compiled(self, backend="aot_eager"))
        return peak(hf_config, plan)


@pytest.mark.slow
def test_each_recompute_policy_holds_what_the_formula_says() -> None:
    config, most = decoder_config(DEEP), {}
    for policy in ("none", "selective", 0.5, "full"):
        plan = plan_of(config, 1, 128, recompute=policy, compile=policy == 0.5)
        ((_, most[policy]),) = run_on(1, partitioned if plan.compile else peak, DEEP, plan)
        expected = plan.micro_batch * activation_bytes(config, plan)
        # Besides, there are gradients of a few activations at a time.
        assert most[policy] == pytest.approx(expected, rel=0.2), policy
    assert most["full"] < 0.5 * most["selective"] < 0.5 * 0.9 * most["none"]
    assert most["full"] < 0.8 * most[0.5] < 0.8 * 0.8 * most["none"]


@pytest.mark.slow
@pytest.mark.parametrize("whole", [(), ("attention",), ("attention", "network")])
@pytest.mark.parametrize("accumulation", [4, 16])
def test_tensor_parallelism_holds_what_it_gathers(whole: Any, accumulation: int) -> None:
    config = decoder_config(DEEP)
    plan = plan_of(config, 2, 128, tp=2, whole=whole, accumulation=accumulation)
    expected = plan.micro_batch * activation_bytes(config, plan)
    for _, found in run_on(2, peak, DEEP, plan):
        assert found == pytest.approx(expected, rel=0.2)


@pytest.mark.slow
def test_layers_that_recompute_hold_less_where_others_go_backward_first() -> None:
    config, most = decoder_config(DEEP), {}
    for name, policies in {
        "first": ("full",) * 6 + ("none",) * 2,
        "last": ("none",) * 2 + ("full",) * 6,
        "mixed": ("full", "selective", "none", "selective") * 2,
    }.items():
        plan = plan_of(config, 1, 128, recompute_by_layer=policies)
        ((_, most[name]),) = run_on(1, peak, DEEP, plan)
        expected = plan.micro_batch * activation_bytes(config, plan)
        assert most[name] == pytest.approx(expected, rel=0.2), name
    assert most["first"] < 0.8 * most["last"]


@pytest.mark.slow
def test_a_pipeline_holds_the_micro_batches_under_way() -> None:
    config, most = decoder_config(DEEP), {}
    for schedule in ("gpipe", "1f1b"):
        plan = plan_of(config, 2, 128, pp=2, accumulation=8, schedule=schedule)
        for pp_rank, found in run_on(2, peak, DEEP, plan):
            expected = plan.micro_batch * activation_bytes(config, plan, pp_rank)
            assert found == pytest.approx(expected, rel=0.3), (schedule, pp_rank)
            most[schedule, pp_rank] = found
    # Eight micro-batches on each worker against two and one.
    for pp_rank, share in enumerate((2 / 8, 1 / 8)):
        assert most["1f1b", pp_rank] < 1.5 * share * most["gpipe", pp_rank]
