"""The RMS norm against its formula, forward and backward, in the stream's types."""

from __future__ import annotations

import pytest
import torch

from trainwright.kernels.rms_norm import rms_norm, rms_norm_reference


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(2, 5, 48), (3, 2, 4, 6), (7, 1)])
def test_values_and_gradients_follow_the_formula(shape: tuple[int, ...], offset: float) -> None:
    torch.manual_seed(0)
    x = (3 * torch.randn(shape, dtype=torch.float64)).requires_grad_()
    weight = torch.randn(shape[-1], dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(shape)

    expected = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * (weight + offset)
    for function in (rms_norm, rms_norm_reference):
        x32, weight32 = (t.detach().float().requires_grad_() for t in (x, weight))
        result = function(x32, weight32, 1e-3, offset)
        torch.testing.assert_close(result, expected.float(), atol=2e-6, rtol=2e-6)
        gradients = torch.autograd.grad(result, (x32, weight32), upstream)
        wanted = torch.autograd.grad(expected, (x, weight), upstream.double(), retain_graph=True)
        for gradient, want in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(gradient, want.float(), atol=1e-5, rtol=1e-5)


def test_bf16_streams_are_normalised_in_fp32() -> None:
    # 300² overflows nothing in fp32 but 1 + 2⁻⁹ is lost in bf16: only the result is rounded.
    x = torch.randn(64, 512).mul(300).bfloat16()
    weight = torch.rand(512)
    result = rms_norm(x, weight, 1e-6)
    assert result.dtype == torch.bfloat16
    exact = rms_norm_reference(x.float(), weight, 1e-6)
    assert ((result.float() - exact).abs() <= exact.abs() * 2**-8).all()


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_a_frozen_side_gets_no_gradient(frozen: str) -> None:
    x, weight = torch.randn(4, 8), torch.randn(8)
    (weight if frozen == "x" else x).requires_grad_()
    rms_norm(x, weight, 1e-6).sum().backward()
    assert (x.grad is None) == (frozen == "x")
    assert (weight.grad is None) == (frozen == "weight")
