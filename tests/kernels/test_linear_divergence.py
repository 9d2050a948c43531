"""The fused divergence of two heads, against plain logits and the definition written out."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from tests.workers import run_on
from trainwright.kernels.linear_divergence import (
    Distillation,
    divergence_reference,
    linear_divergence,
)
from trainwright.models.output_head import OutputHead

BETAS = [0.0, 0.1, 0.5, 1.0]


def inputs(tokens=23, hidden=10, teacher=14, vocabulary=24, bias=False, dtype=torch.float64):
    generator = torch.Generator().manual_seed(7)
    options = {"generator": generator, "dtype": dtype}

    def head(width, **more):
        offset = torch.randn(vocabulary, **options).requires_grad_() if bias else None
        weight = torch.randn(vocabulary, width, **options).requires_grad_()
        return OutputHead(weight, offset, **more)

    student_hidden = torch.randn(tokens, hidden, **options).requires_grad_()
    teacher_hidden = torch.randn(tokens, teacher, **options).requires_grad_()
    labels = torch.randint(0, vocabulary, (tokens,), generator=generator)
    labels[::4] = -100
    more = {"scale": 0.4, "softcap": 6.0} if bias else {}
    return student_hidden, head(hidden, **more), teacher_hidden, head(teacher), labels


def plainly(hidden, head, teacher_hidden, teacher_head, labels, mix=0.0, **options):
    trained = labels != -100
    student, teacher = logits(hidden, head), logits(teacher_hidden, teacher_head).detach()
    divergence = divergence_reference(student, teacher, **options)[trained].sum()
    entropy = F.cross_entropy(student, labels, reduction="sum")
    return Distillation((1 - mix) * divergence + mix * entropy, divergence, entropy)


def logits(hidden, head):
    values = (hidden @ head.weight.T + (0 if head.bias is None else head.bias)) * head.scale
    return values if head.softcap is None else head.softcap * torch.tanh(values / head.softcap)


def loss_and_gradients(function, given, **options):
    hidden, head = given[:2]
    found = function(*given, **options)
    wanted = [t for t in (hidden, head.weight, head.bias) if t is not None]
    gradients = torch.autograd.grad(found.loss / 7, wanted)
    return [torch.stack([each.detach() for each in found]), *gradients]


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("temperature", [1.0, 0.9])
def test_the_reference_is_the_definition(beta, temperature):
    hidden, head, teacher_hidden, teacher_head, _ = inputs()
    given = logits(hidden, head), logits(teacher_hidden, teacher_head)
    s, t = ((each / temperature).exp() for each in given)
    s, t = s / s.sum(-1, keepdim=True), t / t.sum(-1, keepdim=True)
    if beta == 0.0:
        wanted = (t * torch.log(t / s)).sum(-1)
    elif beta == 1.0:
        wanted = (s * torch.log(s / t)).sum(-1)
    else:
        m = beta * t + (1 - beta) * s
        wanted = (beta * t * torch.log(t / m) + (1 - beta) * s * torch.log(s / m)).sum(-1)
    got = divergence_reference(*given, beta=beta, temperature=temperature)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("temperature", [1.0, 0.9])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("chunk_rows", "mix"), [(None, 0.0), (5, 0.0), (5, 0.3)])
def test_loss_and_gradients_equal_the_reference(beta, temperature, bias, chunk_rows, mix):
    given = inputs(bias=bias)
    options = {"beta": beta, "temperature": temperature, "mix": mix}
    wanted = loss_and_gradients(plainly, given, **options)
    got = loss_and_gradients(linear_divergence, given, chunk_rows=chunk_rows, **options)
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("beta", BETAS)
def test_the_gradients_are_those_of_finite_differences(beta):
    hidden, head, teacher_hidden, teacher_head, labels = inputs(6, 3, 4, 5, bias=True)

    def call(hidden, weight, bias):
        own = OutputHead(weight, bias, head.scale, head.softcap)
        return linear_divergence(
            hidden, own, teacher_hidden, teacher_head, labels, beta=beta, mix=0.2, chunk_rows=2
        ).loss

    assert torch.autograd.gradcheck(call, (hidden, head.weight, head.bias))


def test_the_teacher_gets_no_gradient():
    given = inputs()
    found = linear_divergence(*given)
    assert not found.divergence.requires_grad and not found.cross_entropy.requires_grad
    found.loss.backward()
    assert given[2].grad is None
    assert given[3].weight.grad is None
    assert given[0].grad.abs().max() > 0


def test_equal_models_are_at_no_distance_and_at_rest():
    hidden, head, *_, labels = inputs()
    for beta in BETAS:
        (loss, *_), *gradients = loss_and_gradients(
            linear_divergence, (hidden, head, hidden, head, labels), beta=beta
        )
        assert abs(loss.item()) < 1e-12
        assert all(gradient.abs().max() < 1e-12 for gradient in gradients)


def test_without_any_target_all_is_zero_and_still_on_the_graph():
    given = inputs(bias=True)
    given[-1][:] = -100
    values = loss_and_gradients(linear_divergence, given)
    assert len(values) == 4
    assert all(value.abs().max() == 0 for value in values)


@pytest.mark.parametrize("beta", BETAS)
def test_autocast_narrows_the_products_and_keeps_results_close(beta):
    given = inputs(tokens=64, hidden=32, dtype=torch.float32)
    exact = loss_and_gradients(plainly, given, beta=beta)
    with torch.autocast("cpu", torch.bfloat16):
        got = loss_and_gradients(linear_divergence, given, beta=beta, chunk_rows=24)
    assert got[0].dtype == torch.float32
    for mine, theirs in zip(got, exact, strict=True):
        assert 0 < (mine - theirs).norm() < 0.03 * theirs.norm()


def test_a_second_backward_through_a_kept_graph_gives_the_same_gradients():
    given = inputs()
    loss = linear_divergence(*given).loss * 3
    first = torch.autograd.grad(loss, [given[0], given[1].weight], retain_graph=True)
    second = torch.autograd.grad(loss, [given[0], given[1].weight])
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_what_cannot_be_compared_is_refused():
    hidden, head, teacher_hidden, teacher_head, labels = inputs()
    shorter = OutputHead(teacher_head.weight[:20])
    with pytest.raises(ValueError, match="24 rows, the teacher's 20"):
        linear_divergence(hidden, head, teacher_hidden, shorter, labels)
    with pytest.raises(ValueError, match=r"beta is 1\.5"):
        linear_divergence(hidden, head, teacher_hidden, teacher_head, labels, beta=1.5)


def cut_vocabulary(beta, bias, mix):
    """Loss and gradients of one rank's part of both vocabularies, in fp64."""
    hidden, head, teacher_hidden, teacher_head, labels = inputs(bias=bias)
    rank, rows = dist.get_rank(), len(head.weight) // dist.get_world_size()
    own = slice(rank * rows, (rank + 1) * rows)

    def part(whole):
        weight, offset = (
            None if each is None else each.detach()[own].clone().requires_grad_()
            for each in (whole.weight, whole.bias)
        )
        return OutputHead(weight, offset, whole.scale, whole.softcap, dist.group.WORLD)

    given = (hidden, part(head), teacher_hidden, part(teacher_head), labels)
    options = {"beta": beta, "temperature": 0.9, "mix": mix}
    values = loss_and_gradients(linear_divergence, given, chunk_rows=5, **options)
    return [value.numpy() for value in values]


@pytest.mark.parametrize("workers", [2, 4])
@pytest.mark.parametrize(
    ("beta", "bias", "mix"),
    [(0.0, False, 0.0), (0.1, True, 0.4), (0.5, False, 0.0), (1.0, True, 0.0)],
)
def test_a_cut_vocabulary_gives_what_the_whole_one_does(workers, beta, bias, mix):
    options = {"beta": beta, "temperature": 0.9, "mix": mix}
    wanted = loss_and_gradients(plainly, inputs(bias=bias), **options)
    parts = run_on(workers, cut_vocabulary, beta, bias, mix)
    per_rank = [[torch.from_numpy(value) for value in part] for part in parts]
    losses, for_hidden, *for_rows = zip(*per_rank, strict=True)
    for loss in losses:  # equal on all
        torch.testing.assert_close(loss, wanted[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(sum(for_hidden), wanted[1], rtol=1e-10, atol=1e-12)
    for cut, whole in zip(for_rows, wanted[2:], strict=True):
        torch.testing.assert_close(torch.cat(cut), whole, rtol=1e-10, atol=1e-12)
