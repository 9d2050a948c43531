"""Distillation of whole models; `tests/kernels/test_linear_divergence.py` has its operation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.objectives import distilling
from trainwright.errors import UserError
from trainwright.kernels.linear_divergence import divergence_reference
from trainwright.recipe.load import load_recipe

LIKELY, UNLIKELY = math.log(0.9), math.log(0.1)


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_two_outcomes_have_the_divergence_of_the_textbook(beta):
    student = torch.tensor([[[UNLIKELY, LIKELY]]])
    teacher = torch.tensor([[[LIKELY, UNLIKELY]]])
    # of (0.9, 0.1) and (0.1, 0.9) it is 0.8 · log 9 both ways
    got = divergence_reference(student, teacher, beta=beta)
    assert got.item() == pytest.approx(0.8 * math.log(9), rel=1e-6)


@pytest.mark.parametrize("keys", [{}, {"beta": 0, "mix": 0.3}, {"beta": 0.2, "temperature": 2.0}])
def test_a_packed_batch_is_what_plain_logits_give(keys: dict[str, Any]) -> None:
    student, teacher = distilling.student(), distilling.teacher()
    batch = distilling.batch(student)
    loss, figures = distilling.loss(student, teacher, batch, **keys)
    parameters = list(student.parameters())
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)

    logits = student(batch["input_ids"], **distilling.layout(batch))
    with torch.no_grad():
        wanted = teacher(batch["input_ids"], **distilling.layout(batch))
    trained = batch["labels"] != -100
    mix = keys.get("mix", 0.0)
    options = {"beta": keys.get("beta", 0.5), "temperature": keys.get("temperature", 1.0)}
    divergence = divergence_reference(logits, wanted, **options)[trained].sum()
    entropy = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")
    plain = (1 - mix) * divergence + mix * entropy
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(figures["divergence"], divergence.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(figures["cross_entropy"], entropy.detach(), rtol=1e-5, atol=1e-5)
    expected = torch.autograd.grad(plain, parameters, allow_unused=True)
    for mine, theirs in zip(gradients, expected, strict=True):
        if theirs is not None:
            assert (mine - theirs).norm() < 1e-4 * theirs.norm().clamp(min=1e-6)
    assert all(parameter.grad is None for parameter in teacher.parameters())


RECIPE = """
name: small
model: {family: llama, config: {hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2,
  num_attention_heads: 4, num_key_value_heads: 2}}
tokenizer: bytes
data: {sources: [stdlib-docs], sequence_length: 64}
training: {steps: 1}
"""


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        ("distill", "distill learns from a teacher"),
        ("{kind: distill, teacher: a/b, beta: 1.5}", "beta is 1.5"),
        ("{kind: dpo, beta: 0}", "beta is 0"),
        ("{kind: sft, teacher: a/b}", "`teacher` belongs to distill"),
        ("{kind: distill, teacher: a/b, cache_reference: true}", "belongs to dpo and kto"),
        ("{kind: distill, teacher: a/b, mix: 1}", "from 0 to below 1"),
        ("{kind: distill, teacher: ./nowhere}", "there is no directory"),
    ],
)
def test_what_makes_no_sense_is_refused(objective: str, said: str, tmp_path) -> None:
    from trainwright.planner.check import recipe_checks

    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE + f"objective: {objective}\n")
    with pytest.raises(UserError) as refused:
        load_recipe(file, (), recipe_checks)
    assert said in " ".join(f"{each.what} {each.fix}" for each in refused.value.mistakes)


def test_a_teacher_s_path_counts_from_the_recipe(tmp_path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE + "objective: {kind: distill, teacher: ./large}\n")
    assert load_recipe(file).objective.teacher == str(tmp_path / "large")
