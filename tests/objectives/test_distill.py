"""Distillation of whole batches; `tests/kernels/test_linear_divergence.py` has its operation."""

from __future__ import annotations

import math

import pytest
import torch

from trainwright.kernels.linear_divergence import divergence_reference
from trainwright.models.decoder import OutputHead
from trainwright.objectives.distill import distillation_loss

LIKELY, UNLIKELY = math.log(0.9), math.log(0.1)


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_two_outcomes_have_the_divergence_of_the_textbook(beta):
    student = torch.tensor([[[UNLIKELY, LIKELY]]])
    teacher = torch.tensor([[[LIKELY, UNLIKELY]]])
    # of (0.9, 0.1) and (0.1, 0.9) it is 0.8 · log 9 both ways
    got = divergence_reference(student, teacher, beta=beta)
    assert got.item() == pytest.approx(0.8 * math.log(9), rel=1e-6)


def test_a_batch_gives_the_sum_over_its_trained_tokens_and_their_number():
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(2, 5, 8, generator=generator)
    teacher_hidden = torch.randn(2, 5, 6, generator=generator)
    head = OutputHead(torch.randn(17, 8, generator=generator))
    teacher_head = OutputHead(torch.randn(17, 6, generator=generator), scale=0.5)
    labels = torch.tensor([[-100, 1, 2, 3, -100], [4, -100, 5, 6, 7]])
    loss, number = distillation_loss(
        hidden, head, teacher_hidden, teacher_head, labels, beta=0.3, temperature=2.0
    )
    each = divergence_reference(
        head.logits(hidden), teacher_head.logits(teacher_hidden), beta=0.3, temperature=2.0
    )
    wanted = sum(
        each[row, place].item()
        for row in range(2)
        for place in range(5)
        if labels[row, place] != -100
    )
    assert number.item() == 7
    assert loss.item() == pytest.approx(wanted, rel=1e-5)
