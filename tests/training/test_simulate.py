"""A simulated rank sends what a real one sends, and what the formulas say; and it can tell."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.workers import run_on, start
from trainwright.errors import UserError
from trainwright.models.families import decoder_config, new_hf_config
from trainwright.planner.layout import split_layers
from trainwright.planner.plan import Plan
from trainwright.recipe.schema import Recipe

SEQUENCE, VOCABULARY = 128, 256
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": SEQUENCE,
}
MANY: dict[str, dict[str, Any]] = {
    "sharded, cut": {"dp_shard": 32, "tp": 16, "zero": 3, "precision": "bf16"},
    "replicas of shards, columns": {
        "dp_replicate": 4, "dp_shard": 32, "cp": 4, "zero": 1, "cp_method": "ulysses",
        "accumulation": 2, "recompute": "selective",
    },
    "a pipeline": {
        "pp": 4, "dp_shard": 32, "tp": 4, "zero": 2, "accumulation": 4, "recompute": "full"},
    # Rank 300 is of the third replica, which has four micro-batches where the others have fewer.
    "replicas of unequal parts": {
        "dp_replicate": 4, "dp_shard": 32, "tp": 4, "zero": 3, "accumulation": 4,
        "rows_by_replica": (64, 32, 128, 32),
    },
}  # fmt: skip


def recipe_of(**sections: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "simulated",
            "model": {"family": "llama", "config": {**SHAPE, "vocab_size": VOCABULARY}},
            "tokenizer": {"path": "bytes"},
            "data": {"sources": ["python-stdlib"], "sequence_length": SEQUENCE},
            "training": {"steps": 1, "batch_sequences": 64, **sections.pop("training", {})},
            **sections,
        }
    )


def plan_of(world: int, **fields: Any) -> Plan:
    plan = replace(Plan.alone(), world_size=world, sequence_length=SEQUENCE, **fields)
    config = decoder_config(new_hf_config("llama", SHAPE, VOCABULARY))
    layers = split_layers(config, plan.stages) if plan.pp > 1 else ()
    return replace(plan, stage_layers=layers)


def simulate_to(file: Path, plans: list[Plan], ranks: list[int], fault: bool) -> None:
    """In a process of its own: every plan's lines and whether they are as the formulas say."""
    import torch.distributed as dist

    from trainwright.parallel import tensor
    from trainwright.training.simulate import simulate

    if fault:
        leave = tensor.CutStream.leave

        def leave_twice(self: tensor.CutStream, branch: Any) -> Any:
            leave(self, branch)
            return leave(self, branch)

        tensor.CutStream.leave = leave_twice  # type: ignore[method-assign]
    config = decoder_config(new_hf_config("llama", SHAPE, VOCABULARY))
    found = []
    for plan, rank in zip(plans, ranks, strict=True):
        done = simulate(recipe_of(), config, plan, rank)
        assert not dist.is_initialized()
        lines = {f"{line.group} {line.collective}": line.sent for line in done.lines}
        wrong = [f"{line.group} {line.collective}" for line in done.lines if not line.equal]
        found.append({"lines": lines, "wrong": wrong, "equal": done.equal})
    file.write_text(json.dumps(found))


def simulated(
    folder: Path, plans: list[Plan], ranks: list[int], *, fault: bool = False
) -> list[dict[str, Any]]:
    file = folder / "simulated.json"
    process = start(simulate_to, file, plans, ranks, fault)
    process.join()
    assert process.exitcode == 0
    return json.loads(file.read_text())


def test_a_rank_of_512_sends_what_the_formulas_say(tmp_path):
    plans = [plan_of(512, **fields) for fields in MANY.values()]
    found = simulated(tmp_path, plans, [0, 511, 300, 300])
    for name, done in zip(MANY, found, strict=True):
        assert done["equal"], (name, done["wrong"])
    assert [*found[0]["lines"]] == [
        "fsdp all_gather", "fsdp reduce_scatter",
        "tp all_gather", "tp all_reduce", "tp reduce_scatter", "world all_reduce",
    ]  # fmt: skip
    assert {"cp all_to_all", "dp_replicate all_reduce"} <= found[1]["lines"].keys()
    assert "pp send" in found[2]["lines"]


def test_a_collective_too_many_is_seen(tmp_path):
    (done,) = simulated(tmp_path, [plan_of(64, dp_shard=8, tp=8, zero=3)], [0], fault=True)
    assert done["wrong"] == ["tp reduce_scatter"]


def send(plan: Plan) -> dict[str, int]:
    """On a real worker: what a step sent."""
    import torch
    import torch.distributed as dist

    from trainwright.comm.meter import Meter
    from trainwright.parallel.world import World
    from trainwright.training.sameness import ROWS, Trial

    world = World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    assert plan.batch_sequences == ROWS
    trial = Trial(recipe_of(), new_hf_config("llama", SHAPE, VOCABULARY), plan, world)
    with Meter() as meter:
        trial.train(0)
        return {
            f"{group} {collective}": sent
            for group, each in meter.step().items()
            for collective, sent in each.bytes_by_collective.items()
            if sent
        }


def test_a_simulated_rank_sends_what_a_real_one_sends(tmp_path):
    plan = plan_of(4, dp_shard=2, tp=2, zero=3, accumulation=2, micro_batch=4)
    real = run_on(4, send, plan)
    found = simulated(tmp_path, [plan] * 4, [0, 1, 2, 3])
    for rank in range(4):
        assert found[rank]["lines"] == real[rank]


def test_what_hangs_on_values_is_refused():
    from trainwright.training.simulate import plan_for

    config = decoder_config(new_hf_config("llama", SHAPE, VOCABULARY))
    spread = {"dp_shard": 32, "tp": 4}
    plan = plan_for(recipe_of(parallel=spread), config, 128)
    assert (plan.world_size, plan.dp_shard, plan.tp, plan.compile) == (128, 32, 4, False)
    with pytest.raises(UserError, match=r"all_gather"):
        plan_for(recipe_of(parallel={**spread, "cp": 4}), config, 512)
    with pytest.raises(UserError, match=r"budget"):
        plan_for(recipe_of(parallel=spread, training={"recompute": 0.5}), config, 128)
    with pytest.raises(UserError, match=r"not known"):
        plan_for(recipe_of(), None, 128)
    sparse = new_hf_config("mixtral", {**SHAPE, "num_local_experts": 4}, VOCABULARY)
    with pytest.raises(UserError, match=r"expert"):
        plan_for(recipe_of(), decoder_config(sparse), 128)
