"""Dropout by counters: equal to its reference, the same on any layout, and as good as chance."""

from __future__ import annotations

import math

import pytest
import torch

from trainwright.kernels.dropout import dropout, dropout_reference, layer_keys, token_keys

ROWS, SLOTS, CHANNELS = 16, 64, 256


def keys(seed: int = 7, step: int = 3, rows: int = ROWS, slots: int = SLOTS) -> torch.Tensor:
    return token_keys(seed, step, torch.arange(rows), torch.arange(slots))


def kept(token: torch.Tensor, place: int, probability: float = 0.5) -> torch.Tensor:
    return dropout(torch.ones(*token.shape, CHANNELS), token, place, probability) != 0


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("place", [0, 5])
def test_equals_the_reference_in_python_integers(probability, place):
    x = torch.randn(2, 5, 33, generator=torch.Generator().manual_seed(0))
    token = keys(rows=2, slots=5)
    token[0, 0], token[0, 1], token[1, 4] = -1, 2**63 - 1, -(2**63)
    got = dropout(x, token, place, probability)
    assert torch.equal(got, dropout_reference(x, token, place, probability))
    assert 0 < (got == 0).sum() < got.numel()


def test_a_part_of_the_tokens_gets_its_part_of_the_mask():
    """However rows and columns are shared out, and in whatever order."""
    whole = kept(keys(), 2)
    rows, slots = torch.tensor([9, 2, 13]), torch.tensor([63, 0, 17, 18])
    part = kept(token_keys(7, 3, rows, slots), 2)
    assert torch.equal(part, whole[rows][:, slots])
    assert torch.equal(kept(layer_keys(keys(), 4)[rows], 0), kept(layer_keys(keys(), 4), 0)[rows])


def test_the_gradient_passes_where_the_value_did():
    x = torch.randn(ROWS, SLOTS, CHANNELS).requires_grad_()
    result = dropout(x, keys(), 1, 0.3)
    result.backward(torch.full_like(x, 2.0))
    expected = torch.where(result == 0, 0.0, 2.0 / 0.7)
    torch.testing.assert_close(x.grad, expected)


def test_nothing_but_the_keys_is_held_for_the_backward_pass():
    held = []
    with torch.autograd.graph.saved_tensors_hooks(held.append, lambda _: None):
        dropout(torch.ones(ROWS, SLOTS, CHANNELS, requires_grad=True), keys(), 1, 0.3)
    assert [tensor.shape for tensor in held] == [(ROWS, SLOTS)]


def test_at_zero_nothing_happens():
    x = torch.ones(1, 2, 3)
    assert dropout(x, keys(rows=1, slots=2), 0, 0.0) is x


def test_values_keep_their_type_and_mean():
    x = torch.ones(ROWS, SLOTS, CHANNELS, dtype=torch.bfloat16)
    result = dropout(x, keys(), 0, 0.2)
    assert result.dtype == torch.bfloat16
    assert result.float().mean().item() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("probability", [0.02, 0.1, 0.5])
def test_the_share_dropped_is_the_probability_and_is_spread_evenly(probability):
    """No stripes: rows, positions and channels drop as evenly as independent draws would."""
    dropped = (~kept(keys(), 3, probability)).double()
    spread = math.sqrt(probability * (1 - probability))
    assert abs(dropped.mean() - probability) < 5 * spread / math.sqrt(dropped.numel())
    for dim in range(3):
        others = [d for d in range(3) if d != dim]
        means = dropped.mean(dim=others)
        deviations = (means - probability) / (spread / math.sqrt(dropped.numel() / means.numel()))
        assert deviations.abs().max() < 5
        # Their squares' mean is 1 ± sqrt(2/n): neither clumped nor suspiciously even.
        assert abs(deviations.square().mean() - 1) < 5 * math.sqrt(2 / means.numel())


def uncorrelated(a: torch.Tensor, b: torch.Tensor) -> None:
    a, b = a.double() * 2 - 1, b.double() * 2 - 1
    assert abs((a * b).mean()) < 5 / math.sqrt(a.numel())


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 8, 16, 32])
def test_neighbours_are_independent(lag):
    mask = kept(keys(), 3)
    uncorrelated(mask[:, :, lag:], mask[:, :, :-lag])
    uncorrelated(mask[:, lag:], mask[:, :-lag])
    uncorrelated(mask[:, lag:, lag:], mask[:, :-lag, :-lag])
    if lag < ROWS:
        uncorrelated(mask[lag:], mask[:-lag])
    uncorrelated(mask, kept(keys(), 3 + lag))
    uncorrelated(mask, kept(keys(step=3 + lag), 3))
    uncorrelated(mask, kept(keys(seed=7 + lag), 3))
    uncorrelated(kept(layer_keys(keys(), 0), 3), kept(layer_keys(keys(), lag), 3))
    uncorrelated(kept(layer_keys(keys(), lag), 3), mask)


def test_runs_of_eight_channels_take_every_pattern_equally_often():
    """A weak hash shows in patterns of several bits first: chi-squared over all 256."""
    for bits in (kept(keys(), 0), kept(keys(), 0).transpose(1, 2)):
        bytes_ = bits.reshape(-1, 8).long() @ (2 ** torch.arange(8))
        counts = torch.bincount(bytes_, minlength=256).double()
        expected = len(bytes_) / 256
        chi_squared = ((counts - expected) ** 2 / expected).sum().item()
        assert abs(chi_squared - 255) < 5 * math.sqrt(2 * 255)


def test_no_two_tokens_of_many_share_a_mask():
    token = keys(rows=64, slots=512)
    assert token.unique().numel() == token.numel()
    mask = dropout(torch.ones(64, 512, 96), token, 0, 0.5) != 0
    assert mask.flatten(0, 1).unique(dim=0).shape[0] == token.numel()
