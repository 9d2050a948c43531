"""Log-probabilities of tokens from hidden states, against plain logits and torch's log_softmax."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from tests.workers import run_on
from trainwright.kernels.linear_log_probs import linear_log_probs, log_probs_reference


def inputs(tokens=37, hidden=12, vocabulary=32, bias=False, dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    options = {"generator": generator, "dtype": dtype}
    h = torch.randn(tokens, hidden, **options).requires_grad_()
    w = torch.randn(vocabulary, hidden, **options).requires_grad_()
    b = torch.randn(vocabulary, **options).requires_grad_() if bias else None
    labels = torch.randint(0, vocabulary, (tokens,), generator=generator)
    labels[::5] = -100
    incoming = torch.randn(tokens, **options)  # what the tokens weigh in a loss
    return h, w, b, labels, incoming


def value_and_gradients(function, given, **options):
    h, w, b, labels, incoming = given
    log_probs = function(h, w, labels, bias=b, **options)
    wanted = [t for t in (h, w, b) if t is not None]
    return [log_probs.detach(), *torch.autograd.grad(log_probs, wanted, incoming.to(log_probs))]


def test_the_reference_is_the_log_softmax_at_the_label():
    h, w, b, labels, _ = inputs(bias=True)
    logits = 4.0 * torch.tanh((h @ w.T + b) * 0.5 / 4.0)
    for place, label in enumerate(labels.tolist()):
        wanted = 0.0 if label == -100 else logits[place, label] - logits[place].logsumexp(0)
        got = log_probs_reference(h, w, labels, bias=b, scale=0.5, softcap=4.0)[place]
        assert got.item() == pytest.approx(torch.as_tensor(wanted).item(), abs=1e-12)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("chunk_rows", [None, 8, 29])
def test_values_and_gradients_equal_the_reference(bias, scale, softcap, chunk_rows):
    given = inputs(bias=bias)
    options = {"scale": scale, "softcap": softcap}
    wanted = value_and_gradients(log_probs_reference, given, **options)
    got = value_and_gradients(linear_log_probs, given, chunk_rows=chunk_rows, **options)
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_the_gradients_are_those_of_finite_differences():
    h, w, b, labels, _ = inputs(tokens=7, hidden=3, vocabulary=5, bias=True)

    def call(h, w, b):
        return linear_log_probs(h, w, labels, bias=b, scale=0.7, softcap=3.0, chunk_rows=2)

    assert torch.autograd.gradcheck(call, (h, w, b))


def test_single_precision_keeps_its_digits():
    exact = value_and_gradients(linear_log_probs, inputs())
    h, w, _, labels, incoming = inputs()
    single = (h.detach().float().requires_grad_(), w.detach().float().requires_grad_(), None)
    got = value_and_gradients(linear_log_probs, (*single, labels, incoming), chunk_rows=8)
    assert got[0].dtype == torch.float32
    for mine, theirs in zip(got, exact, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-5)


def test_autocast_narrows_the_products_and_keeps_results_close():
    given = inputs(tokens=64, hidden=32, dtype=torch.float32)
    exact = value_and_gradients(log_probs_reference, given)
    with torch.autocast("cpu", torch.bfloat16):
        got = value_and_gradients(linear_log_probs, given, chunk_rows=24)
    assert got[0].dtype == torch.float32
    for mine, theirs in zip(got, exact, strict=True):
        assert 0 < (mine - theirs).norm() < 0.02 * theirs.norm()


def test_the_backward_pass_stays_narrow_outside_autocast():
    h, w, _, labels, incoming = inputs(tokens=64, hidden=32, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = linear_log_probs(h, w, labels)
        narrow_h, narrow_w = h.bfloat16().float(), w.bfloat16().float()
    (got,) = torch.autograd.grad(inside, h, incoming)
    # The logits of the second pass are those of the first: products of rounded numbers.
    logits = (narrow_h @ narrow_w.T).bfloat16().float()
    trained = labels != -100
    onehot = torch.nn.functional.one_hot(labels.where(trained, 0), len(w))
    gradient = (onehot - torch.softmax(logits, -1)) * (incoming * trained)[:, None]
    wanted = gradient.bfloat16().float() @ narrow_w
    torch.testing.assert_close(got, wanted.detach(), rtol=1e-2, atol=1e-3)


def test_without_any_target_all_is_zero_and_still_on_the_graph():
    h, w, b, labels, incoming = inputs(bias=True)
    labels[:] = -100
    values = value_and_gradients(linear_log_probs, (h, w, b, labels, incoming))
    assert len(values) == 4
    assert all(value.abs().max() == 0 for value in values)


def test_a_target_of_vanishing_probability_stays_finite():
    h = torch.tensor([[1.0]], requires_grad=True)
    w = torch.tensor([[0.0], [300.0]], requires_grad=True)
    log_prob = linear_log_probs(h, w, torch.tensor([0]))
    assert log_prob.item() == pytest.approx(-300.0)
    log_prob.sum().backward()
    assert h.grad.item() == pytest.approx(-300.0)


def test_a_frozen_head_gets_no_gradient_and_the_hidden_states_still_do():
    given = inputs()
    _, wanted, _ = value_and_gradients(log_probs_reference, given)
    h, w, _, labels, incoming = given
    log_probs = linear_log_probs(h, w.detach(), labels)
    (got,) = torch.autograd.grad(log_probs, [h], incoming)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_a_second_derivative_is_refused():
    h, w, _, labels, _ = inputs()
    loss = (linear_log_probs(h, w, labels) ** 2).sum()
    (first,) = torch.autograd.grad(loss, h, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def cut_vocabulary(bias, scale, softcap, trained):
    """Values and gradients of one rank's part of the vocabulary, in fp64."""
    h, w, b, labels, incoming = inputs(bias=bias)
    if not trained:
        labels[:] = -100
    rank, rows = dist.get_rank(), len(w) // dist.get_world_size()
    own = slice(rank * rows, (rank + 1) * rows)
    part = w.detach()[own].clone().requires_grad_()
    offset = b.detach()[own].clone().requires_grad_() if bias else None
    options = {"scale": scale, "softcap": softcap, "group": dist.group.WORLD, "chunk_rows": 8}
    values = value_and_gradients(linear_log_probs, (h, part, offset, labels, incoming), **options)
    return [value.numpy() for value in values]


@pytest.mark.parametrize("workers", [2, 4])
@pytest.mark.parametrize(
    ("bias", "scale", "softcap", "trained"),
    [(False, 1.0, None, True), (True, 0.3, 5.0, True), (False, 1.0, None, False)],
)
def test_a_cut_vocabulary_gives_what_the_whole_one_does(workers, bias, scale, softcap, trained):
    given = inputs(bias=bias)
    if not trained:
        given[3][:] = -100
    options = {"scale": scale, "softcap": softcap}
    wanted = value_and_gradients(log_probs_reference, given, **options)
    parts = run_on(workers, cut_vocabulary, bias, scale, softcap, trained)
    per_rank = [[torch.from_numpy(value) for value in part] for part in parts]
    values, for_hidden, *for_rows = zip(*per_rank, strict=True)
    for value in values:  # equal on all
        torch.testing.assert_close(value, wanted[0], rtol=1e-12, atol=1e-12)
    # the hidden states' gradient is a sum over workers, the head's is cut like the head
    torch.testing.assert_close(sum(for_hidden), wanted[1], rtol=1e-12, atol=1e-12)
    for cut, whole in zip(for_rows, wanted[2:], strict=True):
        torch.testing.assert_close(torch.cat(cut), whole, rtol=1e-12, atol=1e-12)


class Scorer(nn.Module):
    def __init__(self, h, w):
        super().__init__()
        self.inner = nn.Linear(h.shape[1], h.shape[1], bias=False, dtype=h.dtype)
        self.head = nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=w.dtype)
        with torch.no_grad():
            self.inner.weight.copy_(torch.eye(h.shape[1]) * 1.5)
            self.head.weight.copy_(w)

    def forward(self, h, labels, function):
        return function(self.inner(h), self.head.weight, labels)


def sharded_head():
    """Gradients of a model whose weights FSDP takes away between its forward and its backward."""
    h, w, _, labels, incoming = inputs()
    model = Scorer(h, w)
    fully_shard(model, reshard_after_forward=True)
    log_probs = model(h, labels, linear_log_probs)
    assert model.head.weight.shape == w.shape  # but this is a shard now:
    assert len(model.head.weight.to_local()) == len(w) // dist.get_world_size()
    (log_probs**2 @ incoming).backward()  # needs the results before the gradients are known
    parameters = [model.inner.weight, model.head.weight]
    return [parameter.grad.full_tensor().numpy() for parameter in parameters]


def test_a_head_that_is_sharded_meanwhile_is_whole_again_in_the_backward_pass():
    h, w, _, labels, incoming = inputs()
    model = Scorer(h, w)
    (model(h, labels, log_probs_reference) ** 2 @ incoming).backward()
    for part in run_on(2, sharded_head):
        for mine, parameter in zip(part, [model.inner.weight, model.head.weight], strict=True):
            torch.testing.assert_close(torch.from_numpy(mine), parameter.grad)
