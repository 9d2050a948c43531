"""The fused head and loss against plain logits and torch's own cross entropy."""

from __future__ import annotations

import pytest
import torch

from trainwright.kernels.cross_entropy import cross_entropy_reference, linear_cross_entropy


def inputs(tokens: int = 37, hidden: int = 12, vocabulary: int = 29, bias: bool = False):
    generator = torch.Generator().manual_seed(5)
    h = torch.randn(tokens, hidden, generator=generator, requires_grad=True)
    w = torch.randn(vocabulary, hidden, generator=generator, requires_grad=True)
    b = torch.randn(vocabulary, generator=generator, requires_grad=True) if bias else None
    labels = torch.randint(0, vocabulary, (tokens,), generator=generator)
    labels[::5] = -100
    return h, w, b, labels


def gradients(function, tensors, labels, **options):
    h, w, b = tensors
    loss = function(h, w, labels, bias=b, **options)
    wanted = [t for t in (h, w, b) if t is not None]
    return loss.detach(), torch.autograd.grad(loss / 7, wanted)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("chunk_rows", [None, 8, 37])
def test_loss_and_gradients_equal_the_reference(bias, scale, softcap, chunk_rows):
    h, w, b, labels = inputs(bias=bias)
    options = {"scale": scale, "softcap": softcap}
    wanted_loss, wanted = gradients(cross_entropy_reference, (h, w, b), labels, **options)
    loss, got = gradients(linear_cross_entropy, (h, w, b), labels, chunk_rows=chunk_rows, **options)
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-6, atol=1e-5)
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_the_reference_is_torch_cross_entropy_in_float64():
    h, w, _, labels = inputs()
    logits = h.double() @ w.double().T
    wanted = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    torch.testing.assert_close(
        cross_entropy_reference(h, w, labels).double(), wanted, rtol=1e-6, atol=0
    )


def test_a_target_of_vanishing_probability_has_a_finite_loss():
    h = torch.tensor([[1.0]], requires_grad=True)
    w = torch.tensor([[0.0], [300.0]], requires_grad=True)
    loss = linear_cross_entropy(h, w, torch.tensor([0]))
    assert loss.item() == pytest.approx(300.0)
    loss.backward()
    assert h.grad.item() == pytest.approx(300.0)


def test_without_any_target_loss_and_gradients_are_zero():
    h, w, _, labels = inputs()
    labels[:] = -100
    loss, got = gradients(linear_cross_entropy, (h, w, None), labels)
    assert loss.item() == 0
    assert all(g.abs().max() == 0 for g in got)


def test_a_frozen_head_gets_no_gradient_and_the_hidden_states_still_do():
    h, w, _, labels = inputs()
    _, (wanted, _) = gradients(cross_entropy_reference, (h, w, None), labels)
    loss = linear_cross_entropy(h, w.detach(), labels)
    (got,) = torch.autograd.grad(loss / 7, [h])
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_autocast_narrows_the_products_and_keeps_the_loss_close():
    h, w, _, labels = inputs(tokens=64, hidden=32)
    exact, (exact_h, exact_w) = gradients(cross_entropy_reference, (h, w, None), labels)
    with torch.autocast("cpu", torch.bfloat16):
        loss, (got_h, got_w) = gradients(linear_cross_entropy, (h, w, None), labels)
    assert loss.dtype == torch.float32
    assert 0 < abs(loss - exact) < 0.02 * exact
    assert (got_h - exact_h).norm() < 0.02 * exact_h.norm()
    assert (got_w - exact_w).norm() < 0.02 * exact_w.norm()


def test_a_second_backward_through_a_kept_graph_gives_the_same_gradients():
    h, w, _, labels = inputs()
    loss = linear_cross_entropy(h, w, labels) * 3
    first = torch.autograd.grad(loss, [h, w], retain_graph=True)
    second = torch.autograd.grad(loss, [h, w])
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
