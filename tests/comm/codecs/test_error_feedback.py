"""What is sent and what is left over are all there was: no bit is lost."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from tests.comm.codecs.vectors import every_codec, vectors
from trainwright.comm.codecs.codec import Codec
from trainwright.comm.codecs.error_feedback import encode_with_feedback, total_of

SIZE = 6000


@pytest.mark.parametrize("codec", every_codec(), ids=lambda codec: codec.name)
def test_sent_and_left_over_sum_up_exactly(codec: Codec) -> None:
    for kind, first in vectors(SIZE):
        if kind == "largest":
            continue  # β · error + change is beyond fp32
        error = torch.zeros(SIZE)
        for round in range(3):
            change = dict(vectors(SIZE, round))[kind] if round else first
            total = total_of(change, error, 0.95)
            planes, after = encode_with_feedback(codec, change, error, 0.95)
            sent = codec.decode(planes, SIZE)
            # Two fp32s as wide apart as these add up exactly in fp64 if at all; then fractions.
            apart = after.double() + sent.double() != total.double()
            for place in torch.nonzero(apart).reshape(-1).tolist():
                parts = [Fraction(float(each[place])) for each in (after, sent, total)]
                assert parts[0] + parts[1] == parts[2], (kind, round, place)
            error = after


def test_the_total_is_what_the_formula_says_up_to_one_step() -> None:
    for kind, change in vectors(SIZE):
        if kind == "largest":
            continue
        error = dict(vectors(SIZE, 1))[kind]
        exact = error.double() * 0.95 + change.double()
        step = 2.0**-24 * 2 * float(exact.abs().max())
        assert float((total_of(change, error, 0.95) - exact).abs().max()) <= step + 1e-45


def test_without_feedback_the_change_is_sent_as_it_is() -> None:
    change = torch.from_numpy(np.random.default_rng(0).standard_normal(99).astype(np.float32))
    assert torch.equal(total_of(change, torch.ones(99), 0.0), change)


def test_what_is_never_among_the_largest_is_sent_in_the_end() -> None:
    """A change that top-k passes over each time grows in the error until its turn comes."""
    codec = next(codec for codec in every_codec() if codec.name == "top-k")
    change = torch.ones(4096)
    change[:64] = 10
    error, sent = torch.zeros(4096), torch.zeros(4096)
    for _ in range(150):
        planes, error = encode_with_feedback(codec, change, error, 1.0)
        sent += codec.decode(planes, 4096)
    assert (sent > 0).all()


def test_a_total_beyond_fp32_is_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        encode_with_feedback(every_codec()[0], torch.full((9,), 3e38), torch.full((9,), 3e38), 0.9)
