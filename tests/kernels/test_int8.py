"""8-bit weights against their formula and bitsandbytes, and products with them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from trainwright.kernels import int8

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_follow_the_formula(dtype: torch.dtype) -> None:
    weight = torch.randn(300, 70, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[7] = 0.0
    packed = int8.quantise(weight)
    for row, values, scale in zip(weight.double(), packed.values, packed.scales, strict=True):
        assert scale == row.abs().max()
        if scale == 0:
            assert not values.any()
            continue
        # Half a step at most, and the nearest whole number, whichever it is between two.
        assert ((row / scale * 127 - values).abs() <= 0.5 + 1e-5).all()
        assert values.abs().max() == 127
    exact = packed.values.double() * packed.scales.double().unsqueeze(1) / 127
    torch.testing.assert_close(int8.dequantise(packed).double(), exact, atol=0, rtol=3e-7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_are_those_of_bitsandbytes(dtype: torch.dtype) -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    weight = torch.randn(300, 70, generator=torch.Generator().manual_seed(1)).to(dtype)
    weight[0, :3] = torch.tensor([127.0, 0.5, 1.5])  # halves go to the even number
    values, scales, _ = functional.int8_vectorwise_quant(weight)
    packed = int8.quantise(weight)
    assert torch.equal(packed.values, values)
    assert packed.values[0, 1:3].tolist() == [0, 2]
    assert torch.equal(packed.scales, scales)
    unpacked = torch.ops.bitsandbytes.int8_vectorwise_dequant(values, scales)
    assert torch.equal(int8.dequantise(packed), unpacked)


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_the_product_and_its_gradients_are_the_unpacked_weights(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    packed = int8.quantise(0.1 * torch.randn(72, 48))
    x, bias = torch.randn(2, 5, 48, dtype=dtype), torch.randn(72, dtype=dtype)
    upstream = torch.randn(2, 5, 72, dtype=dtype)

    results = []
    for exact in (False, True):
        kind = torch.float64 if exact else dtype
        own_x, own_bias = (t.to(kind).requires_grad_() for t in (x, bias))
        if exact:
            weight = packed.values.double() * packed.scales.double().unsqueeze(1) / 127
            y = F.linear(own_x, weight, own_bias)
        else:
            y = int8.linear(own_x, packed, own_bias)
        results.append([y, *torch.autograd.grad(y, (own_x, own_bias), upstream.to(kind))])
    tolerance = {torch.float64: 1e-7, torch.float32: 2e-6, torch.float16: 5e-3}.get(dtype, 4e-2)
    for got, want in zip(*results, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, atol=tolerance, rtol=tolerance)


def test_fp16_does_not_overflow() -> None:
    """Whole numbers times activations would: 512 · 127 · 8 is past 65,504."""
    packed = int8.quantise(torch.full((4, 512), 0.01))
    x = torch.full((1, 512), 8.0, dtype=torch.float16, requires_grad=True)
    y = int8.linear(x, packed)
    assert y[0].tolist() == pytest.approx([40.96] * 4, rel=1e-3)
    y.sum().backward()
    assert x.grad is not None and x.grad[0].tolist() == pytest.approx([0.04] * 512, rel=1e-3)


def test_only_the_packed_weight_waits_for_the_backward_pass() -> None:
    packed = int8.quantise(torch.randn(256, 128))
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        int8.linear(torch.randn(2, 128, requires_grad=True), packed)
    assert sum(tensor.nbytes for tensor in kept) == 256 * 128 + 4 * 256


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    weight = torch.randn(4, 8)
    weight[2, 5] = bad
    with pytest.raises(ValueError, match="not finite"):
        int8.quantise(weight)
