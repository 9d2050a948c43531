"""Dynamic loss scaling against its rule."""

from __future__ import annotations

import torch

from trainwright.parallel.precision import LossScale, is_finite


def test_fp16_halves_on_overflow_and_doubles_after_two_thousand_good_steps():
    scale = LossScale("fp16")
    assert scale.value == 65536
    scale.update(finite=False)
    assert scale.value == 32768
    for _ in range(1999):
        scale.update(finite=True)
    assert scale.value == 32768
    scale.update(finite=True)
    assert scale.value == 65536


def test_an_overflow_starts_the_count_anew():
    scale = LossScale("fp16")
    for _ in range(1999):
        scale.update(finite=True)
    scale.update(finite=False)
    scale.update(finite=True)
    assert scale.value == 32768


def test_other_precisions_are_never_scaled():
    for precision in ("fp32", "bf16"):
        scale = LossScale(precision)
        scale.update(finite=False)
        assert scale.value == 1.0
        assert not scale.dynamic


def test_no_scale_helps_below_one():
    scale = LossScale("fp16")
    for _ in range(17):
        assert not scale.exhausted
        scale.update(finite=False)
    assert scale.exhausted


def test_a_saved_scale_goes_on_where_it_was():
    scale = LossScale("fp16")
    for _ in range(10):
        scale.update(finite=True)
    again = LossScale("fp16")
    again.restore(scale.state())
    for _ in range(1990):
        again.update(finite=True)
    assert again.value == 131072


def test_finiteness_is_seen_in_any_place():
    good = torch.tensor(1.0)
    assert is_finite(good, good)
    assert not is_finite(good, torch.tensor(float("nan")))
    assert not is_finite(torch.tensor(float("-inf")), good)
