"""Rotary embeddings against complex multiplication, and what makes them useful."""

from __future__ import annotations

import pytest
import torch

from trainwright.kernels.rotary import rotary_tables, rotate, rotate_reference


def tables(batch: int, sequence: int, half: int) -> tuple[torch.Tensor, torch.Tensor]:
    positions = torch.randint(0, 500, (batch, sequence))
    return rotary_tables(positions, torch.rand(half), scale=1.3, dtype=torch.float32)


@pytest.mark.parametrize(("batch", "half"), [(1, 4), (3, 4), (3, 3), (3, 1)])
def test_matches_complex_multiplication_forward_and_backward(batch: int, half: int) -> None:
    torch.manual_seed(0)
    cos, sin = tables(batch, 7, half)
    x = torch.randn(3, 7, 2, 8, requires_grad=True)  # with half < 4 some channels pass through
    upstream = torch.randn_like(x)
    result, expected = rotate(x, cos, sin), rotate_reference(x, cos, sin)
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(
        torch.autograd.grad(result, x, upstream), torch.autograd.grad(expected, x, upstream)
    )
    assert torch.equal(result[..., 2 * half :], x[..., 2 * half :])


def test_scores_depend_on_the_distance_alone() -> None:
    q, k = torch.randn(1, 1, 1, 8, dtype=torch.float64), torch.randn(1, 1, 1, 8).double()
    frequencies = torch.tensor([1.0, 0.1, 0.01, 0.001])

    def score(at: int, other: int) -> float:
        turned = [
            rotate(x, *rotary_tables(torch.tensor([[place]]), frequencies, dtype=torch.float64))
            for x, place in ((q, at), (k, other))
        ]
        return float((turned[0] * turned[1]).sum())

    assert score(9, 4) == pytest.approx(score(105, 100), abs=1e-5)
    assert score(9, 4) != pytest.approx(score(9, 5), abs=1e-3)


def test_angles_are_fp32_in_a_bf16_stream() -> None:
    cos, _ = rotary_tables(torch.tensor([[4097]]), torch.ones(1), dtype=torch.bfloat16)
    assert cos.item() == pytest.approx(torch.tensor(4097.0).cos().item(), rel=2**-8)
