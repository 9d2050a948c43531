"""From recipe and machine to plan: what is derived, what is refused, what is said."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from trainwright.errors import Mistake, UserError
from trainwright.models.families import decoder_config, new_hf_config
from trainwright.planner.explain import explain_plan
from trainwright.planner.layout import split_layers
from trainwright.planner.make import make_plan
from trainwright.planner.memory import activation_bytes, head_bytes, state_bytes
from trainwright.planner.plan import Machine, Plan
from trainwright.recipe.presets import PRESETS
from trainwright.recipe.schema import ModelSection, Recipe

GIB = 1 << 30
LAPTOP = Machine(devices=1, device_kind="cpu", cores=8, memory_bytes=16 * GIB, can_compile=True)
GPUS = Machine(devices=8, device_kind="cuda", cores=64, memory_bytes=80 * GIB, can_compile=True)


def recipe_of(**sections: dict[str, Any]) -> Recipe:
    base: dict[str, dict[str, Any]] = {
        "model": {"family": "llama", "preset": "4m"},
        "tokenizer": {"train": {"vocab_size": 4096}},
        "data": {"sequence_length": 256},
        "training": {"steps": 10, "batch_sequences": 16},
    }
    return Recipe.model_validate({**base, **sections})


def refusal(machine: Machine, **sections: dict[str, Any]) -> Mistake:
    with pytest.raises(UserError) as caught:
        make_plan(recipe_of(**sections), machine)
    [mistake] = caught.value.mistakes
    return mistake


def test_defaults_on_a_cpu_and_on_gpus() -> None:
    cpu = make_plan(recipe_of(), LAPTOP)
    assert (cpu.world_size, cpu.dp_replicate, cpu.dp_shard, cpu.threads) == (1, 1, 1, 8)
    assert (cpu.micro_batch, cpu.accumulation) == (16, 1)
    gpu = make_plan(recipe_of(), GPUS)
    assert (gpu.world_size, gpu.dp_replicate, gpu.dp_shard, gpu.threads) == (8, 1, 8, 8)
    assert (gpu.micro_batch, gpu.accumulation) == (2, 1)
    assert (gpu.device, gpu.compile) == ("cuda", True)


@pytest.mark.parametrize(
    ("parallel", "machine", "expected"),
    [
        ({"workers": 4}, LAPTOP, (4, 4, 1)),
        ({"workers": 4, "dp_shard": 4}, LAPTOP, (4, 1, 4)),
        ({"workers": 4, "dp_shard": 2}, LAPTOP, (4, 2, 2)),
        ({"workers": 4, "dp_replicate": 2}, LAPTOP, (4, 2, 2)),
        ({"workers": 4, "dp_replicate": 1}, LAPTOP, (4, 1, 4)),
        ({}, GPUS, (8, 1, 8)),
        ({"dp_replicate": 8}, GPUS, (8, 8, 1)),
        ({"dp_replicate": 2, "dp_shard": 4}, GPUS, (8, 2, 4)),
        ({"workers": 2}, GPUS, (2, 1, 2)),
        ({}, replace(LAPTOP, launched=4), (4, 4, 1)),
        ({}, replace(GPUS, launched=16), (16, 1, 16)),
        ({"workers": 8}, replace(GPUS, launched=16), (16, 1, 16)),
    ],
)
def test_layout(parallel: dict[str, Any], machine: Machine, expected: tuple[int, ...]) -> None:
    plan = make_plan(recipe_of(parallel=parallel), machine)
    assert (plan.world_size, plan.dp_replicate, plan.dp_shard) == expected
    assert plan.batch_sequences == 16
    assert plan.batch_tokens == 16 * 256


@pytest.mark.parametrize(
    ("machine", "sections", "key", "says"),
    [
        (LAPTOP, {"parallel": {"workers": 4, "dp_shard": 3}}, "parallel.dp_shard",
         ["3 does not divide 4 workers", "`dp_shard: 4`"]),
        (LAPTOP, {"parallel": {"workers": 4, "dp_replicate": 2, "dp_shard": 4}},
         "parallel.dp_replicate",
         ["2 × dp_shard 4 make 8 workers, but there are 4", "`dp_replicate: 1`"]),
        (LAPTOP, {"parallel": {"workers": 3}}, "training.batch_sequences",
         ["16 rows do not share out evenly over 3 workers", "`batch_sequences: 15`",
          "another `parallel.workers`"]),
        (LAPTOP, {"parallel": {"workers": 32}}, "training.batch_sequences",
         ["16 rows", "write `batch_sequences: 32`,"]),
        (LAPTOP, {"training": {"steps": 1, "batch_tokens": 1024}, "parallel": {"workers": 3}},
         "training.batch_tokens",
         ["4 rows do not share out evenly over 3", "`batch_tokens: 768`"]),
        (LAPTOP, {"training": {"steps": 1, "batch_tokens": 1000}}, "training.batch_tokens",
         ["1,000 tokens are no whole number of rows of 256", "`batch_tokens: 768`",
          "`batch_tokens: 1024`"]),
        (LAPTOP, {"parallel": {"micro_batch": 5}}, "parallel.micro_batch",
         ["5 does not divide the 16 rows of a worker", "`micro_batch: 4`"]),
        (GPUS, {"parallel": {"workers": 9}}, "parallel.workers",
         ["9 workers need a GPU each, and this machine has 8 GPUs", "`workers: 8`"]),
        (replace(LAPTOP, launched=6), {"parallel": {"workers": 4}}, "parallel.workers",
         ["a launcher has started 6 workers", "`workers: auto`"]),
        (replace(LAPTOP, can_compile=False), {"training": {"steps": 1, "compile": True}},
         "training.compile", ["needs a C compiler", "`compile: auto`"]),
        (GPUS, {"model": {"family": "llama", "preset": "70b"}, "parallel": {"workers": 8}},
         "model", ["weights, gradients and optimizer state take", "a GPU, which has 80.0 GiB"]),
    ],
)  # fmt: skip
def test_what_cannot_run_is_refused_with_the_nearest_that_can(
    machine: Machine, sections: dict[str, Any], key: str, says: list[str]
) -> None:
    mistake = refusal(machine, **sections)
    assert mistake.key == key
    for words in says:
        assert words in str(mistake)


def test_several_refusals_come_together() -> None:
    with pytest.raises(UserError) as caught:
        make_plan(
            recipe_of(
                parallel={"workers": 3, "dp_shard": 2}, training={"steps": 1, "compile": True}
            ),
            replace(LAPTOP, can_compile=False),
        )
    keys = [mistake.key for mistake in caught.value.mistakes]
    assert keys == ["parallel.dp_shard", "training.compile"]
    # What follows from the right degree is told with it.
    assert caught.value.mistakes[0].fix == "write `dp_shard: 3` and `batch_sequences: 9`"


def test_micro_batch_fills_half_of_the_memory_and_divides_the_rows() -> None:
    shape = {"family": "llama", "preset": "1b"}
    config = decoder_config(new_hf_config("llama", PRESETS["llama"]["1b"], 4096))
    recipe = recipe_of(
        model=shape,
        data={"sequence_length": 2048},
        training={"steps": 1, "batch_sequences": 48 * 8},
    )
    plan = make_plan(recipe, GPUS)
    row = activation_bytes(config, plan)
    room = 40 * GIB - state_bytes(config, plan).total - head_bytes(config, plan)
    fits = [n for n in range(1, 49) if 48 % n == 0 and n * row <= room]
    assert plan.micro_batch == fits[-1]
    assert plan.micro_batch * plan.accumulation == 48
    assert 1 < plan.micro_batch < 48

    lean = recipe.model_copy(
        update={"training": recipe.training.model_copy(update={"recompute": "full"})}
    )
    assert make_plan(lean, GPUS).micro_batch > plan.micro_batch


@pytest.mark.parametrize(
    ("rows", "length", "micro"), [(64, 256, 16), (24, 256, 12), (7, 256, 7), (32, 2048, 8)]
)
def test_micro_batch_on_a_cpu_is_small(rows: int, length: int, micro: int) -> None:
    recipe = recipe_of(
        data={"sequence_length": length}, training={"steps": 1, "batch_sequences": rows}
    )
    assert make_plan(recipe, LAPTOP).micro_batch == micro


def test_memory_of_a_cpu_is_shared_by_its_workers() -> None:
    small = replace(LAPTOP, memory_bytes=2 * GIB)
    model = {"family": "llama", "preset": "42m"}
    assert make_plan(recipe_of(model=model), small).world_size == 1
    mistake = refusal(small, model=model, parallel={"workers": 4})
    assert mistake.key == "model"
    assert "a worker, which has 512.0 MiB" in mistake.what


def test_given_values_are_kept() -> None:
    plan = make_plan(
        recipe_of(
            parallel={"workers": 2, "micro_batch": 2, "threads": 3},
            training={"steps": 1, "batch_sequences": 16, "precision": "fp32", "compile": False},
        ),
        LAPTOP,
    )
    assert (plan.micro_batch, plan.accumulation, plan.threads) == (2, 4, 3)
    assert (plan.precision, plan.compile) == ("fp32", False)


@pytest.mark.parametrize(
    ("training", "machine", "expected"),
    [
        ({"tokens": 1_700_000}, replace(LAPTOP, cores=2), False),  # about two minutes
        ({"tokens": 50_000_000}, replace(LAPTOP, cores=2), True),
        ({"tokens": 50_000_000}, replace(LAPTOP, cores=2, can_compile=False), False),
        ({"tokens": 50_000_000, "precision": "fp32"}, replace(LAPTOP, cores=2), False),
        ({"steps": 20_000, "batch_sequences": 16}, replace(LAPTOP, cores=2), True),
        ({"epochs": 3}, replace(LAPTOP, cores=2), False),  # no telling how long that is
        ({"steps": 1, "compile": True}, LAPTOP, True),
        ({"steps": 1}, GPUS, True),
        ({"steps": 1}, replace(GPUS, can_compile=False), False),
    ],
)
def test_compile_auto(training: dict[str, Any], machine: Machine, expected: bool) -> None:
    assert make_plan(recipe_of(training=training), machine).compile is expected


def test_compile_auto_with_steps_that_only_the_data_tells() -> None:
    recipe = recipe_of(training={"epochs": 3, "batch_sequences": 16})
    machine = replace(LAPTOP, cores=2)
    assert make_plan(recipe, machine, steps=20_000).compile
    assert not make_plan(recipe, machine, steps=20).compile


def test_a_hub_id_is_planned_without_its_config() -> None:
    plan = make_plan(recipe_of(model={"path": "somebody/model"}), GPUS)
    assert plan.micro_batch == 2
    names = [name for name, _ in explain_plan(plan, None)]
    assert "parameters" not in names
    assert "workers" in names


def test_json_and_hash() -> None:
    plan = make_plan(recipe_of(), LAPTOP)
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert again.hash == plan.hash
    assert replace(plan, threads=3).hash != plan.hash
    for text in ("{}", "[]", "no json", '{"world_size": 1, "more": 2}'):
        with pytest.raises(UserError, match="not a plan"):
            Plan.from_json(text)


def test_explain() -> None:
    config = decoder_config(new_hf_config("llama", PRESETS["llama"]["4m"], 4096))
    rows = dict(explain_plan(make_plan(recipe_of(parallel={"workers": 2}), LAPTOP), config))
    assert rows["parameters"] == "4,212,992"
    assert rows["workers"].startswith("2 processes on the CPU, each with whole weights (DDP)")
    assert rows["batch"] == "16 rows = 4,096 tokens a step"
    assert rows["micro-batches"] == "1 × 8 rows a worker"
    # 3 × (2 × 4.2 M for the matrices + 4 layers × 2·256·256 for attention) × 4,096 tokens
    assert rows["model FLOPs"] == "109.9 GFLOP a step"
    assert rows["states"] == "72.3 MiB a worker"
    assert rows["activations"].endswith("MiB a worker")
    sharded = dict(explain_plan(make_plan(recipe_of(), GPUS), config))
    assert "8 GPUs, weights sharded over all (FSDP)" in sharded["workers"]
    hybrid = make_plan(recipe_of(parallel={"dp_replicate": 2}), GPUS)
    assert "2 replicas of 4 shards (HSDP)" in dict(explain_plan(hybrid, config))["workers"]


def test_plans_of_older_releases_are_read() -> None:
    """They knew data parallelism only, and sharded by FSDP."""
    old = (
        '{"world_size": 4, "dp_replicate": 2, "dp_shard": 2, "micro_batch": 1, "accumulation": 2, '
        '"threads": 1, "precision": "bf16", "recompute": "none", "compile": false, '
        '"device": "cpu", "sequence_length": 64, "optimizer": "adamw"}'
    )
    plan = Plan.from_json(old)
    assert (plan.zero, plan.pp, plan.cp, plan.tp, plan.ep, plan.stage_layers) == (3, 1, 1, 1, 1, ())
    assert plan.batch_sequences == 8


def test_unequal_parts_of_a_batch_from_recipe_to_plan_and_back() -> None:
    """The parts lie one after another and are all of the batch; micro-batches divide each."""
    parallel = {"workers": 6, "rows_by_replica": [24, 12, 4], "dp_shard": 2}
    training = {"steps": 1, "batch_sequences": 40}
    plan = make_plan(recipe_of(training=training, parallel=parallel), LAPTOP)
    assert (plan.dp_replicate, plan.dp_shard, plan.micro_batch) == (3, 2, 2)
    assert [plan.accumulation_of(each) for each in range(3)] == [6, 3, 1]
    assert plan.accumulation == 6
    parts = [range(40)[plan.rows_of(rank)] for rank in range(6)]
    assert [len(part) for part in parts] == [12, 12, 6, 6, 2, 2]
    assert [row for part in parts for row in part] == [*range(40)]
    moved = replace(plan, ranks=(4, 5, 0, 1, 2, 3))
    assert Plan.from_json(moved.to_json()) == moved
    assert len({moved.hash, plan.hash, replace(plan, rows_by_replica=()).hash}) == 3
    equal = recipe_of(parallel={"workers": 2, "rows_by_replica": [8, 8]})
    assert make_plan(equal, LAPTOP).rows_by_replica == ()


def test_every_dimension_from_recipe_to_plan_and_back() -> None:
    recipe = recipe_of(
        parallel={
            "workers": 8, "pp": 2, "tp": 2, "dp_shard": 2, "zero": 1, "schedule": "zero_bubble",
            "recompute_by_stage": ["full", "none", "selective", "none"],
            "stage_layers": [1, 1, 1, 1], "offload": "optimizer",
        },
        training={"steps": 1, "batch_sequences": 16, "activation_offload": True},
    )  # fmt: skip
    plan = make_plan(recipe, LAPTOP)
    assert (plan.pp, plan.tp, plan.dp_shard, plan.zero, plan.virtual_stages) == (2, 2, 2, 1, 2)
    assert plan.stage_layers == (1, 1, 1, 1)
    assert plan.recompute_by_stage == ("full", "none", "selective", "none")
    assert [plan.stage_recompute(stage) for stage in (0, 2)] == ["full", "selective"]
    assert plan.data_ranks == 2
    assert (plan.micro_batch, plan.accumulation) == (1, 8)
    assert Plan.from_json(plan.to_json()) == plan
    config = decoder_config(new_hf_config("llama", PRESETS["llama"]["4m"], 4096))
    rows = dict(explain_plan(plan, config))
    assert rows["workers"] == (
        "8 processes on the CPU, optimizer state sharded (ZeRO-1), 1 thread each"
    )
    assert rows["data"] == "rows over 2 shards"
    assert rows["tensor"] == "products and the stream cut over 2 workers"
    assert rows["pipeline"].startswith("4 stages on 2 workers of 1 1 1 1 layers, zero_bubble, idle")
    assert rows["offloaded"] == "optimizer state and activations to the host's memory"
    assert rows["recompute"] == "by stage: full none selective none"
    assert "context" not in rows
    assert "experts" not in rows


def test_recompute_auto_is_as_little_as_fits_together_with_the_micro_batch() -> None:
    """A model of 1.2 billion on a GPU of less and less memory."""
    model = {"family": "llama", "preset": "1b"}
    config = decoder_config(new_hf_config("llama", PRESETS["llama"]["1b"], 4096))

    def on(gib: int, micro_batch: int | str, **parallel: Any) -> Plan:
        machine = replace(GPUS, devices=1, memory_bytes=gib * GIB)
        recipe = recipe_of(
            model=model,
            data={"sequence_length": 4096},
            training={"steps": 1, "batch_sequences": 16, "recompute": "auto"},
            parallel={"micro_batch": micro_batch, **parallel},
        )
        plan = make_plan(recipe, machine, config)
        held = state_bytes(config, plan).total + plan.micro_batch * activation_bytes(config, plan)
        assert held < 0.9 * gib * GIB or plan.recompute == "full" or parallel
        return plan

    roomy, tight = on(80, 8), on(40, 8)
    assert (roomy.recompute, roomy.recompute_by_layer) == ("none", ())
    assert set(tight.recompute_by_layer) >= {"full", "selective"}
    assert (on(24, 8).recompute, on(24, 8).recompute_by_layer) == ("full", ())  # the most there is
    # Smaller micro-batches spare recomputing, and are searched where the user leaves them open.
    free = on(40, "auto")
    assert free.micro_batch < 8 and free.micro_batch * free.accumulation == 16
    assert "full" not in (free.recompute, *free.recompute_by_layer)
    own = on(40, 8, recompute_by_layer=["none"] * 16)
    assert own.recompute_by_layer == ("none",) * 16


def test_recompute_auto_needs_a_model_whose_layers_are_known() -> None:
    recipe = recipe_of(training={"steps": 1, "recompute": "auto"})
    with pytest.raises(UserError) as caught:
        make_plan(
            recipe.model_copy(update={"model": ModelSection(path="some/falcon")}),
            GPUS,
            native=False,
        )
    [mistake] = caught.value.mistakes
    assert mistake.key == "training.recompute" and "recompute: full" in mistake.fix


def test_recompute_by_layer_from_recipe_to_plan_and_back() -> None:
    policies = ["full", "full", "selective", "none"]
    plan = make_plan(recipe_of(parallel={"pp": 2, "recompute_by_layer": policies}), LAPTOP)
    assert plan.recompute_by_layer == tuple(policies)
    assert [plan.layer_recompute(layer, layer // 2) for layer in range(4)] == policies
    assert Plan.from_json(plan.to_json()) == plan
    config = decoder_config(new_hf_config("llama", PRESETS["llama"]["4m"], 4096))
    rows = dict(explain_plan(plan, config))
    assert rows["recompute"] == "by layer: 2 full, 1 selective, 1 none"


@pytest.mark.parametrize(
    ("training", "parallel", "machine", "compiled"),
    [
        ({"recompute": 0.5}, {}, LAPTOP, True),  # only the compiler meets a budget
        ({}, {}, GPUS, True),
        ({}, {"tp": 2}, GPUS, True),
        ({}, {"pp": 2, "schedule": "zbv"}, GPUS, False),
        ({}, {"pp": 2}, GPUS, True),
    ],
)
def test_compile_by_what_a_layout_allows(
    training: dict[str, Any], parallel: dict[str, Any], machine: Machine, compiled: bool
) -> None:
    recipe = recipe_of(training={"steps": 1, "batch_sequences": 16, **training}, parallel=parallel)
    assert make_plan(recipe, machine).compile is compiled


def test_micro_batches_keep_a_pipeline_busy_and_its_schedule_legal() -> None:
    def micro_batches(schedule: str, rows: int) -> int:
        recipe = recipe_of(
            parallel={"workers": 2, "pp": 2, "schedule": schedule},
            training={"steps": 1, "batch_sequences": rows},
        )
        return make_plan(recipe, LAPTOP).accumulation

    assert micro_batches("1f1b", 64) == 8
    assert micro_batches("1f1b", 4) == 4
    assert micro_batches("dualpipev", 4) == 4


def test_layers_over_stages() -> None:
    config = decoder_config(new_hf_config("llama", PRESETS["llama"]["8b"], 128_256))
    layers = split_layers(config, 4)
    assert sum(layers) == 32
    assert layers[-1] < layers[0] <= layers[1]  # the head and the embedding are work as well
    assert split_layers(config, 32) == (1,) * 32
    small = decoder_config(new_hf_config("llama", PRESETS["llama"]["4m"], 512))
    assert split_layers(small, 1) == (4,)


def test_a_model_of_no_family_is_spread_over_data_ranks_only() -> None:
    recipe = recipe_of(model={"path": "somebody/model"}, parallel={"workers": 4, "tp": 2})
    assert make_plan(recipe, LAPTOP).tp == 2  # nobody knows yet what it is
    with pytest.raises(UserError, match="transformers' own class") as caught:
        make_plan(recipe, LAPTOP, native=False)
    assert caught.value.mistakes[0].fix == "write `tp: 1`"
