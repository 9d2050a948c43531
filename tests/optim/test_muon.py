"""Muon against its definition by singular values, and against an independent update in float64."""

from __future__ import annotations

import math

import pytest
import torch

from trainwright.optim.muon import COEFFICIENTS, Muon, orthogonalise


@pytest.mark.parametrize("shape", [(16, 16), (40, 12), (12, 40)])
def test_orthogonalise_keeps_the_singular_vectors_and_levels_the_values(shape):
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    result = orthogonalise(matrix, torch.float32)
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.3
    assert values.max() < 1.25
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    rotated = u.T @ result @ vh.T
    off_diagonal = rotated - torch.diag(rotated.diagonal())
    assert off_diagonal.abs().max() < 1e-4


def test_orthogonalise_applies_the_quintic_to_each_singular_value():
    matrix = torch.randn(10, 10, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    u, s, vh = torch.linalg.svd(matrix)
    s = s / matrix.norm()
    a, b, c = COEFFICIENTS
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    torch.testing.assert_close(
        orthogonalise(matrix, torch.float64), u @ torch.diag(s) @ vh, rtol=1e-4, atol=1e-4
    )


def test_two_steps_equal_the_update_written_out():
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(6, 9, generator=generator)
    gradients = [torch.randn(6, 9, generator=generator) for _ in range(2)]
    parameter = torch.nn.Parameter(start.clone())
    optimizer = Muon([parameter], lr=0.1, momentum=0.9, weight_decay=0.5, dtype=torch.float64)
    weight, momentum = start.double(), torch.zeros(6, 9, dtype=torch.float64)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
        momentum = 0.9 * momentum + 0.1 * gradient.double()
        update = orthogonalise(0.1 * gradient.double() + 0.9 * momentum, torch.float64)
        weight = weight * (1 - 0.1 * 0.5) - 0.1 * 0.2 * math.sqrt(9) * update
    torch.testing.assert_close(parameter.detach().double(), weight, rtol=1e-5, atol=1e-6)


def test_only_matrices_are_taken():
    with pytest.raises(ValueError, match="matrices"):
        Muon([torch.nn.Parameter(torch.zeros(3))])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1.0, 1e-8])
def test_small_gradients_are_leveled_like_large_ones(dtype, size):
    matrix = torch.randn(64, 64, generator=torch.Generator().manual_seed(4))
    exact = orthogonalise(matrix, torch.float32)
    error = (orthogonalise(matrix * size, dtype) - exact).norm() / exact.norm()
    assert error < 0.06
