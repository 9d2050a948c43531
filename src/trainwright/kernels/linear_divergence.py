"""How far a student's next-token distributions are from a teacher's, without full logits.

Both heads are multiplied out for a chunk of tokens at a time. The student's gradient is taken in
the forward pass, while both distributions are at hand; the teacher gets none. The cross entropy of
the data's own tokens comes from the same logits, so that it may have a part in the loss.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from trainwright.kernels.cross_entropy import CHUNK_ELEMENTS, IGNORED
from trainwright.kernels.fused_head import (
    chunks,
    head_logits,
    own_targets,
    product_dtype,
    push,
    wide,
)

# Logits of both models, their probabilities and the mixture's stand at the same time.
BUFFERS = 6


class Head(Protocol):
    """How hidden states become logits: scale · (hidden · weightᵀ + bias), bent by `softcap`.

    weight [vocabulary, hidden], bias [vocabulary] or None; softcap c makes z into c · tanh(z / c).
    With a `group` the vocabulary is cut over its workers in rank order, and `weight` is a part.
    """

    @property
    def weight(self) -> Tensor: ...
    @property
    def bias(self) -> Tensor | None: ...
    @property
    def scale(self) -> float: ...
    @property
    def softcap(self) -> float | None: ...
    @property
    def group(self) -> dist.ProcessGroup | None: ...


class Distillation(NamedTuple):
    """Sums over trained tokens in nats, scalars in fp32 or wider; only `loss` has a gradient."""

    loss: Tensor  # (1 − mix) · divergence + mix · cross_entropy
    divergence: Tensor
    cross_entropy: Tensor  # of the labels under the student, at temperature 1


def divergence_reference(
    student_logits: Tensor, teacher_logits: Tensor, *, beta: float = 0.5, temperature: float = 1.0
) -> Tensor:
    """The generalised Jensen-Shannon divergence of each token, plainly; in nats.

    Logits [..., vocabulary], which `temperature` divides. With s the student's and t the teacher's
    probabilities and m = (1 − β)·s + β·t, it is β·KL(t‖m) + (1 − β)·KL(s‖m); β = 0 stands for
    KL(t‖s) and β = 1 for KL(s‖t), as those are its limits when divided by β and by 1 − β
    (Agarwal et al. 2024, arXiv:2306.13649, eq. 1). Returns [...].
    """
    kind = wide(student_logits.dtype)
    student = torch.log_softmax(student_logits.to(kind) / temperature, -1)
    teacher = torch.log_softmax(teacher_logits.to(kind) / temperature, -1)
    if beta == 0.0:
        return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    if beta == 1.0:
        return F.kl_div(teacher, student, reduction="none", log_target=True).sum(-1)
    mixture = ((1.0 - beta) * student.exp() + beta * teacher.exp()).log()
    of_teacher = F.kl_div(mixture, teacher, reduction="none", log_target=True).sum(-1)
    of_student = F.kl_div(mixture, student, reduction="none", log_target=True).sum(-1)
    return beta * of_teacher + (1.0 - beta) * of_student


def linear_divergence(
    hidden: Tensor,
    head: Head,
    teacher_hidden: Tensor,
    teacher_head: Head,
    labels: Tensor,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    mix: float = 0.0,
    chunk_rows: int | None = None,
) -> Distillation:
    """Sums of `divergence_reference` and of −log p(label) over the tokens whose label is not -100.

    hidden [tokens, hidden] and teacher_hidden [tokens, the teacher's hidden], labels [tokens]; the
    loss is (1 − mix) of the first sum and `mix` of the second, at temperature 1. The
    two vocabularies are the same, and are cut over the same `group` if over any; what then holds
    for the gradient of `hidden` is said at `linear_cross_entropy`. Products run in autocast's type
    where autocast is on, the rest in fp32 or wider. Raises ValueError where the vocabularies or
    their cuts differ, or beta lies outside 0 … 1.
    """
    rows, teacher_rows = len(head.weight), len(teacher_head.weight)
    if rows != teacher_rows:
        raise ValueError(f"the student's head has {rows} rows, the teacher's {teacher_rows}")
    if head.group is not teacher_head.group:
        raise ValueError("the two heads are cut over different groups")
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta is {beta}, and must lie between 0 and 1")
    if chunk_rows is None:
        chunk_rows = max(64, max(CHUNK_ELEMENTS // BUFFERS, hidden.numel()) // rows)
    places = (labels != IGNORED).nonzero().squeeze(-1)
    sums = _LinearDivergence.apply(
        hidden.index_select(0, places),
        head.weight,
        head.bias,
        head,
        teacher_hidden.detach().index_select(0, places),
        teacher_head,
        labels.index_select(0, places),
        (beta, temperature, mix, chunk_rows, product_dtype(hidden), torch.is_grad_enabled()),
    )
    return Distillation(*sums)


class _LinearDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        teacher_hidden: Tensor,
        teacher_head: Head,
        labels: Tensor,
        settings: tuple[float, float, float, int, torch.dtype, bool],
    ) -> tuple[Tensor, Tensor, Tensor]:
        beta, temperature, mix, chunk_rows, dtype, wants = settings
        wants_hidden, wants_weight, wants_bias = (
            wants and want for want in ctx.needs_input_grad[:3]
        )
        kind = wide(dtype)
        for_hidden = torch.empty_like(hidden) if wants_hidden else None
        for_weight = torch.zeros_like(weight, dtype=kind) if wants_weight else None
        for_bias = weight.new_zeros(len(weight), dtype=kind) if wants_bias else None
        matrix, offset = weight.to(dtype), None if bias is None else bias.to(dtype)
        teacher_matrix, teacher_bias = teacher_head.weight.to(dtype), teacher_head.bias
        teacher_offset = None if teacher_bias is None else teacher_bias.to(dtype)
        targets, here = own_targets(labels, len(weight), head.group)
        divergence = torch.zeros((), dtype=kind, device=hidden.device)
        entropy = torch.zeros_like(divergence)
        with torch.autocast(hidden.device.type, enabled=False):
            for part in chunks(len(hidden), chunk_rows):
                logits, slope = head_logits(hidden, part, matrix, offset, head.scale, head.softcap)
                teacher_logits, _ = head_logits(
                    teacher_hidden,
                    part,
                    teacher_matrix,
                    teacher_offset,
                    teacher_head.scale,
                    teacher_head.softcap,
                )
                student, teacher = (
                    _log_softmax(each.to(kind) / temperature, head.group)
                    for each in (logits, teacher_logits)
                )
                loss, gradient = _divergence(student, teacher, beta, head.group)
                divergence += loss
                plain = student
                if temperature != 1.0:
                    plain = _log_softmax(logits.to(kind), head.group)
                entropy -= plain.gather(-1, targets[part]).where(here[part], 0.0).sum()
                if not (wants_hidden or wants_weight or wants_bias):
                    continue
                gradient *= (1.0 - mix) / temperature
                if mix:
                    gradient.add_(plain.exp(), alpha=mix)
                    gradient.scatter_add_(-1, targets[part], -mix * here[part].to(kind))
                if slope is not None:
                    gradient *= slope
                push(gradient, hidden, part, matrix, for_hidden, for_weight, for_bias)
        if head.group is not None:
            dist.all_reduce(entropy, group=head.group)
        ctx.save_for_backward(for_hidden, for_weight, for_bias)
        ctx.dtypes = (weight.dtype, None if bias is None else bias.dtype)
        ctx.mark_non_differentiable(divergence, entropy)
        return (1.0 - mix) * divergence + mix * entropy, divergence, entropy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient = gradients[0]
        hidden, weight, bias = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        # New tensors, not in place: a second backward through a kept graph must see the originals.
        return (
            None if hidden is None else (hidden * gradient).to(hidden.dtype),
            None if weight is None else (weight * gradient).to(weight_dtype),
            None if bias is None else (bias * gradient).to(bias_dtype),
            *[None] * 5,
        )


def _log_softmax(logits: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Log-probabilities of the own rows, of logits [tokens, own rows]."""
    if group is None:
        return torch.log_softmax(logits, -1)
    log_sum = torch.logsumexp(logits, -1, keepdim=True)
    largest = log_sum.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    whole = (log_sum - largest).exp()
    dist.all_reduce(whole, group=group)
    return logits - (largest + whole.log())


def _divergence(
    student: Tensor, teacher: Tensor, beta: float, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """The sum over tokens, and its gradient by the student's logits; from log-probabilities.

    With a = log(s/m) and K = Σ s·a, the derivative of KL(s‖m)'s share by a logit is s·(a − K): the
    terms by way of m cancel, since m's own share of probability is always 1.
    """
    s, t = student.exp(), teacher.exp()
    if beta == 0.0:
        loss = (t * (teacher - student)).sum()
        if group is not None:
            dist.all_reduce(loss, group=group)
        return loss, s - t
    if beta == 1.0:
        mixture, of_student = teacher, 1.0
    else:
        mixture = torch.logaddexp(student + math.log1p(-beta), teacher + math.log(beta))
        of_student = 1.0 - beta
    ratio = student - mixture
    sums = torch.cat(
        [(s * ratio).sum(-1, keepdim=True), (t * (teacher - mixture)).sum(-1, keepdim=True)], -1
    )
    if group is not None:
        dist.all_reduce(sums, group=group)
    of_teacher = 0.0 if beta == 1.0 else beta
    loss = of_student * sums[:, 0].sum() + of_teacher * sums[:, 1].sum()
    return loss, of_student * s * (ratio - sums[:, :1])
