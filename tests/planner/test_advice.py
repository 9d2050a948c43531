"""Where memory goes, and what is advised where it does not fit: each way, taken, must fit."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from trainwright.errors import UserError
from trainwright.models.families import DecoderConfig, decoder_config, new_hf_config
from trainwright.planner import memory
from trainwright.planner.advice import advise
from trainwright.planner.budget import Budget, memory_budget
from trainwright.planner.explain import advice_lines, explain_plan, memory_lines
from trainwright.planner.make import make_plan, memory_advice
from trainwright.planner.plan import Machine
from trainwright.recipe.load import dump_recipe, load_recipe
from trainwright.recipe.schema import Recipe

GIB = 1 << 30
BILLION = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
}  # fmt: skip


def gpus(gib: float, devices: int = 1) -> Machine:
    return Machine(devices=devices, device_kind="cuda", cores=8, memory_bytes=int(gib * GIB))


def recipe_of(**sections: Any) -> Recipe:
    values = {
        "model": {"family": "llama", "config": BILLION}, "tokenizer": "bytes",
        "objective": "sft", "data": {"sources": ["stdlib-docs"], "sequence_length": 2048},
        "training": {"steps": 1, "compile": False}, **sections,
    }  # fmt: skip
    return Recipe.model_validate(values)


def config() -> DecoderConfig:
    return decoder_config(new_hf_config("llama", BILLION, 128256))


def budget_of(recipe: Recipe, machine: Machine) -> Budget:
    return memory_budget(recipe, make_plan(recipe, machine), config(), machine)


def advised(recipe: Recipe, machine: Machine) -> list[str]:
    found = memory_advice(recipe, make_plan(recipe, machine), machine, config())
    return [str(each.change) for each in found]


@pytest.mark.parametrize("parallel", [{}, {"dp_shard": 4}, {"dp_shard": 4, "zero": 1}])
def test_lines_are_the_formulas_parts(parallel: dict[str, Any]) -> None:
    recipe = recipe_of(parallel=parallel)
    machine = gpus(80, 4 if parallel else 1)
    plan, budget = make_plan(recipe, machine), budget_of(recipe, machine)
    states = memory.state_bytes(config(), plan)
    assert budget.states == pytest.approx(states.total)
    row = memory.activation_bytes(config(), plan)
    assert budget.lines["activations"] == plan.micro_batch * row
    rest = budget.states + budget.lines["activations"] + memory.head_bytes(config(), plan)
    assert budget.total == pytest.approx(rest + budget.lines["libraries"])
    assert budget.limit == 80 * GIB


@pytest.mark.parametrize("quantise", ["none", "nf4"])
def test_an_adapters_lines(quantise: str) -> None:
    recipe = recipe_of(adapter={"rank": 8, "quantise": quantise}, objective="dpo")
    budget = budget_of(recipe, gpus(80))
    plan = make_plan(recipe, gpus(80))
    assert recipe.adapter is not None
    states = memory.adapted_state_bytes(config(), plan, recipe.adapter)
    assert budget.states == pytest.approx(states.total)
    # rank 8, all matrices of a block: 2048·(2048 + 2048 + 512 + 512) and 3 of 2048 × 8192
    pairs = 2 * (2048 + 2048) + 2 * (2048 + 512) + 3 * (2048 + 8192)
    assert budget.lines["adapters"] == 4 * 8 * 16 * pairs
    assert "reference" not in budget.lines  # the same model without its adapter
    assert budget.lines["logits"] < memory.head_bytes(config(), plan)  # a head that is not trained


def test_a_reference_has_a_line_unless_its_scores_are_kept() -> None:
    machine = gpus(80)
    budget = budget_of(recipe_of(objective="dpo"), machine)
    # It rests in bf16, but for its norms.
    assert budget.lines["reference"] == pytest.approx(budget.lines["weights"] / 2, rel=1e-3)
    cached = recipe_of(objective={"kind": "dpo", "cache_reference": True})
    assert "reference" not in budget_of(cached, machine).lines


@pytest.mark.parametrize(
    ("sections", "moved"),
    [
        ({"optimizer": "paged-adamw"}, ["optimizer"]),
        ({"optimizer": "paged-adamw-8bit"}, ["optimizer"]),
        ({"parallel": {"offload": "optimizer"}}, ["optimizer"]),
        (
            {"parallel": {"offload": "parameters", "dp_shard": 2}},
            ["weights", "gradients", "optimizer"],
        ),
    ],
)
def test_what_lies_on_the_host_is_not_the_devices(sections: dict, moved: list[str]) -> None:
    machine = gpus(80, 2 if "parallel" in sections and len(moved) > 1 else 1)
    parallel = {
        key: value for key, value in sections.get("parallel", {}).items() if key != "offload"
    }
    plain = budget_of(recipe_of(parallel=parallel), machine)
    budget = budget_of(recipe_of(**sections), machine)
    assert not set(moved) & set(budget.lines)
    eighth = 4 if "8bit" in str(sections) else 1
    assert budget.host == sum(plain.lines[name] for name in moved) / eighth
    assert "(on the host)" in "\n".join(memory_lines(budget))


def test_free_memory_of_a_cpu_is_shared_by_its_workers() -> None:
    machine = Machine(devices=1, device_kind="cpu", cores=8, memory_bytes=64 * GIB)
    recipe = recipe_of(parallel={"workers": 2})
    assert budget_of(recipe, machine).limit == 32 * GIB
    assert budget_of(recipe, replace(machine, free_bytes=40 * GIB)).limit == 20 * GIB


CASES: dict[str, tuple[dict[str, Any], Machine]] = {
    "micro-batch": ({"parallel": {"micro_batch": 8}}, gpus(40)),
    "states": ({"parallel": {"micro_batch": 1}}, gpus(29)),
    "both": ({"parallel": {"micro_batch": 8}}, gpus(26)),
    "adapter": ({"adapter": {"rank": 16}, "training": {"steps": 1, "recompute": "full"}}, gpus(4)),
    "reference": ({"objective": "dpo"}, gpus(33)),
    "replicas": ({"parallel": {"dp_replicate": 4}}, gpus(26, 4)),
    "zero": ({"parallel": {"zero": 1, "dp_shard": 4}, "training": {"steps": 1}}, gpus(17, 4)),
    "long rows": (
        {"data": {"sequence_length": 131072}, "training": {"steps": 1, "recompute": "full"}},
        gpus(50),
    ),
    "workers": (
        {"parallel": {"workers": 4}},
        Machine(devices=1, device_kind="cpu", cores=8, memory_bytes=150 * GIB, free_bytes=99 * GIB),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_each_way_fits_when_it_is_written_into_the_recipe(name: str, tmp_path: Path) -> None:
    sections, machine = CASES[name]
    recipe = recipe_of(**sections)
    plan = make_plan(recipe, machine)
    before = memory_budget(recipe, plan, config(), machine)
    assert not before.fits()
    found = memory_advice(recipe, plan, machine, config())
    assert found
    for advice in found:
        overrides = [
            f"{key}={value}"
            for key, value in re.findall(r"`([\w.]+): ([^`]+)`", str(advice.change))
        ]
        assert len(overrides) == len(advice.change.values)
        again = load_recipe(tmp_path / "r.yaml", overrides, text=dump_recipe(recipe))
        after = memory_budget(again, make_plan(again, machine), config(), machine)
        assert after.total == advice.total
        assert after.total / after.limit < before.total / before.limit
        assert after.fits()
        assert again.batch_sequences == recipe.batch_sequences
    costs = [advice.change.cost for advice in found]
    assert costs == sorted(costs)


def test_the_least_slow_comes_first_and_one_change_before_two() -> None:
    assert advised(*_case("micro-batch"))[0] == "`parallel.micro_batch: 2`"
    assert advised(*_case("micro-batch"))[1] == "`training.recompute: auto`"
    assert advised(*_case("states"))[0] == "`optimizer.name: adamw-8bit`"
    assert advised(*_case("adapter")) == ["`adapter.quantise: nf4`"]
    assert advised(*_case("reference"))[0] == "`objective.cache_reference: true`"
    assert "`parallel.dp_replicate: 1` and `parallel.dp_shard: 4`" in advised(*_case("replicas"))
    assert "`parallel.zero: 2`" in advised(*_case("zero"))
    assert "`parallel.workers: 2`" in advised(*_case("workers"))
    assert all(" and " in way for way in advised(*_case("both")))
    rows = advised(*_case("long rows"))
    assert "`data.sequence_length: 65536`" not in rows  # it would learn something else
    assert "`optimizer.name: adamw-8bit`" in rows


def _case(name: str) -> tuple[Recipe, Machine]:
    sections, machine = CASES[name]
    return recipe_of(**sections), machine


def test_every_single_change_was_weighed() -> None:
    """Against all values of one key tried one by one: no smaller change of it would do."""
    recipe, machine = _case("micro-batch")
    fitting = [
        rows
        for rows in (1, 2, 4)
        if budget_of(recipe_of(parallel={"micro_batch": rows}), machine).fits()
    ]
    assert advised(recipe, machine)[0] == f"`parallel.micro_batch: {max(fitting)}`"


def test_a_limit_that_was_measured_is_each_workers_own() -> None:
    """Half of the workers have twice the memory each, but a limit of a process stays as it is."""
    recipe, machine = _case("workers")
    plan = make_plan(recipe, machine)
    found = memory_advice(recipe, plan, machine, config(), limit=24 * GIB)
    assert found and all(each.total < 24 * GIB for each in found)


def test_a_recipe_that_cannot_be_planned_is_no_advice() -> None:
    recipe = recipe_of()
    plan = make_plan(recipe, gpus(80))

    def estimate(changed: Recipe) -> Budget:
        if changed.optimizer.name != "adamw":
            raise UserError("not here")
        return Budget({"weights": 1.0 if changed.training.recompute == "full" else 9.0}, 2.0)

    found = advise(recipe, plan, estimate)
    assert [str(each.change) for each in found] == ["`training.recompute: full`"]
    assert advise(recipe, plan, estimate, limit=0.5) == []
    assert advice_lines([])[0].startswith("No change of the recipe alone helps")


def test_a_model_that_cannot_fit_is_refused_with_what_can(tmp_path: Path) -> None:
    whole = {"model": {"path": str(tmp_path)}, "tokenizer": None}
    shape = new_hf_config("llama", BILLION, 128256)
    (tmp_path / "config.json").write_text(json.dumps(shape))
    with pytest.raises(UserError, match=r"take 25\.1 GiB a GPU, which has 24\.0 GiB") as error:
        make_plan(recipe_of(**whole), gpus(24))
    assert "`optimizer.name: adamw-8bit`" in str(error.value)
    # Where nothing else would do: an adapter in place of the whole model.
    with pytest.raises(UserError) as error:
        make_plan(recipe_of(**whole), gpus(14))
    assert "write `adapter: {rank: 16}`" in str(error.value)
    with pytest.raises(UserError) as error:
        make_plan(recipe_of(**whole), gpus(1))
    assert "choose a smaller model" in str(error.value)


def test_tables_for_the_screen() -> None:
    recipe, machine = recipe_of(), gpus(80)
    budget = budget_of(recipe, machine)
    lines = memory_lines(budget, {"weights": 6 * GIB, "sum": 50 * GIB})
    rows = {line.split()[0]: line.split()[1:] for line in lines[1:]}
    assert rows["weights"] == ["5.58", "6.00"]
    assert rows["sum"] == [f"{budget.total / GIB:.2f}", "50.00"]
    assert rows["limit"] == ["80.00"]
    told = dict(explain_plan(make_plan(recipe, machine), config(), budget))["memory"]
    assert "of 80.0 GiB a worker: weights 5.6 GiB" in told
