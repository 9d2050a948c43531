"""What was not sent is added to what comes next (Seide et al. 2014; EF21 and SparseLoCo likewise).

total = β · error + change        error after = total − what the others read
"""

from __future__ import annotations

import math

from torch import Tensor

from trainwright.comm.codecs.codec import Codec, Planes


def encode_with_feedback(
    codec: Codec, change: Tensor, error: Tensor, decay: float
) -> tuple[Planes, Tensor]:
    """The planes to send for `change`, and the error that is left after them.

    `change` and `error` are fp32 [count], `decay` is β. Error after and what the planes decode to
    sum up to `total_of(change, error, decay)` exactly, without rounding.
    """
    total = total_of(change, error, decay)
    planes = codec.encode(total)
    return planes, total.sub(codec.decode(planes, total.numel()))


def total_of(change: Tensor, error: Tensor, decay: float) -> Tensor:
    """β · error + change, in steps of 2⁻²⁴ of the power of two above its largest value.

    Then an fp32 can hold every difference to a value that one of our codecs has for it. The steps
    are hardly coarser than those that changes are made of, as differences of fp32 weights. Without
    feedback (β = 0) it is the change itself.
    """
    if decay == 0:
        return change
    total = error.mul(decay).add(change)
    largest = float(total.abs().max()) if total.numel() else 0.0
    if not 0 < largest < math.inf:
        return total
    steps = 2.0 ** (24 - math.frexp(largest)[1])  # in 1; scaling by it in fp64 is exact
    return total.double().mul_(steps).round_().div_(steps).float()
