"""Distillation in the loop: a small student learns a larger teacher's distributions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.training.tuning import THIN, WIDE, recipe_of, records, saved, train, written
from tests.workers import run_on
from trainwright.errors import UserError
from trainwright.models.families import decoder_config, new_hf_config
from trainwright.models.weights import new_model
from trainwright.planner import memory
from trainwright.planner.beside import plan_beside
from trainwright.planner.check import recipe_checks
from trainwright.planner.make import make_plan
from trainwright.planner.plan import Machine
from trainwright.recipe.load import dump_recipe, load_recipe
from trainwright.recipe.schema import Objective, Recipe
from trainwright.training.score import open_subject, score


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    rows = [
        {"messages": [
            {"role": "user", "content": f"What is {n} + {n}?"},
            {"role": "assistant", "content": f"It is {2 * n}."},
        ]}
        for n in range(40)
    ]  # fmt: skip
    return written(tmp_path / "chats.jsonl", rows)


def distilling(tmp_path: Path, source: Path, **sections: Any) -> Recipe:
    teacher = sections.pop("teacher", None) or saved(tmp_path / "teacher", WIDE, 2)
    base = saved(tmp_path / "base", THIN, 1)
    objective = {"kind": "distill", "teacher": str(teacher), **sections.pop("objective", {})}
    return recipe_of(tmp_path, base, source, objective=objective, **sections)


@pytest.mark.parametrize("adapter", [None, {"rank": 4}])
def test_the_divergence_falls(adapter, chats, tmp_path) -> None:
    recipe = distilling(
        tmp_path, chats, adapter=adapter, objective={"mix": 0.01}, training={"steps": 30}
    )
    run = train(recipe)
    steps, held_out = records(run, "step"), records(run, "evaluation")
    assert steps[-1]["divergence"] < 0.8 * steps[0]["divergence"]
    for record in (*steps, *held_out):
        parts = 0.99 * record["divergence"] + 0.01 * record["cross_entropy"]
        assert record["loss"] == pytest.approx(parts, rel=1e-5)
    assert held_out[-1]["divergence"] < steps[0]["divergence"]
    figures = score(open_subject(run.path))["validation"].figures  # `trainwright evaluate`
    assert figures == pytest.approx({name: held_out[-1][name] for name in figures}, rel=1e-4)
    assert set(figures) == {"divergence", "cross_entropy"}


def train_there(recipe: dict[str, Any]) -> list[float]:
    run = train(Recipe.model_validate(recipe))
    return [each["loss"] for kind in ("step", "evaluation") for each in records(run, kind)]


@pytest.mark.slow
def test_a_teacher_of_another_shape_under_every_parallelism(chats, tmp_path) -> None:
    recipe = distilling(tmp_path, chats, objective={"temperature": 0.9}).model_dump(
        exclude_unset=True
    )
    wanted = train_there(recipe)
    for number, plan in enumerate([{"pp": 2}, {"tp": 2}, {"cp": 2}, {"zero": 3}]):
        recipe["run_directory"] = str(tmp_path / f"run {number}")
        recipe["parallel"] = {"workers": 2, "threads": 1, **plan}
        assert run_on(2, train_there, recipe)[0] == pytest.approx(wanted, rel=1e-5), plan


def test_vocabularies_that_differ_are_refused_before_training(chats, tmp_path) -> None:
    other = saved(tmp_path / "other", WIDE, 2, vocabulary=300)
    recipe = distilling(tmp_path, chats, teacher=other)
    for attempt in (
        lambda: load_recipe(tmp_path / "r.yaml", (), recipe_checks, text=dump_recipe(recipe)),
        lambda: train(recipe),
    ):
        with pytest.raises(UserError) as refused:
            attempt()
        [mistake] = refused.value.mistakes
        assert mistake.key == "objective.teacher"
        assert "has 300 tokens, and the model's 260" in mistake.what


def test_a_teacher_with_another_tokenizer_is_refused(chats, tmp_path) -> None:
    recipe = distilling(tmp_path, chats)
    file = tmp_path / "teacher" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    ids = tokenizer["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="'a' is token 98 there, and 97 here"):
        train(recipe)


def test_a_teacher_that_the_degrees_do_not_divide_is_refused(chats, tmp_path) -> None:
    odd = saved(tmp_path / "odd", {**WIDE, "num_attention_heads": 3, "num_key_value_heads": 3}, 2)
    recipe = distilling(tmp_path, chats, teacher=odd, parallel={"workers": 2, "tp": 2})
    with pytest.raises(UserError) as refused:
        load_recipe(tmp_path / "r.yaml", (), recipe_checks, text=dump_recipe(recipe))
    assert {each.key for each in refused.value.mistakes} == {"objective.teacher"}
    assert "the teacher is spread as the model is: 2 does not divide" in str(refused.value)


def test_a_teacher_takes_memory_and_has_stages_of_its_own(chats, tmp_path) -> None:
    machine = Machine(devices=2, device_kind="cuda", cores=8, memory_bytes=10**9)
    recipe = distilling(tmp_path, chats, parallel={"workers": 2, "pp": 2})
    plan = make_plan(recipe, machine)
    teacher = decoder_config(new_hf_config("llama", WIDE, 260))
    own = plan_beside(plan, teacher)
    assert (plan.stage_layers, own.stage_layers) == ((1, 1), (2, 1))
    whole = sum(p.numel() for p in new_model(teacher, device="meta").parameters())
    parts = [memory.state_bytes(teacher, own, rank).parameters for rank in range(2)]
    assert sum(parts) == 4 * whole
    assert memory.reference_bytes(teacher, own) == max(parts)
    tokens = plan.accumulation * plan.micro_batch * plan.sequence_length
    assert memory.teacher_bytes(teacher, own, plan.batch_sequences) == 4 * 48 * tokens
    students = decoder_config(new_hf_config("llama", THIN, 260))
    room = int(memory.state_bytes(students, plan).total + min(parts))
    small = replace(machine, memory_bytes=room)
    alone = recipe.model_copy(update={"objective": Objective(kind="sft")})
    assert make_plan(alone, small).micro_batch == 1
    with pytest.raises(UserError, match="weights, gradients and optimizer state take"):
        make_plan(recipe, small)
