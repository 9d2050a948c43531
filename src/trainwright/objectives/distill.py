"""Distillation: a student's next-token distributions drawn towards a teacher's.

The loss is the generalised Jensen-Shannon divergence (`kernels.linear_divergence` has its formula),
summed over trained tokens, with their number as weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainwright.kernels.cross_entropy import IGNORED
from trainwright.kernels.linear_divergence import Head, linear_divergence


def distillation_loss(
    hidden: Tensor,
    head: Head,
    teacher_hidden: Tensor,
    teacher_head: Head,
    labels: Tensor,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """(sum of the divergence, number of trained tokens), scalars; gradients for the student only.

    hidden [rows, sequence, hidden] and teacher_hidden [rows, sequence, the teacher's hidden],
    labels [rows, sequence] (already shifted, -100 = not trained). beta 0 is KL(teacher‖student),
    1 KL(student‖teacher). The heads' vocabularies must be the same; ValueError where they are not.
    """
    loss = linear_divergence(
        hidden.flatten(0, 1),
        head,
        teacher_hidden.flatten(0, 1),
        teacher_head,
        labels.flatten(),
        beta=beta,
        temperature=temperature,
    )
    return loss, torch.count_nonzero(labels != IGNORED)
