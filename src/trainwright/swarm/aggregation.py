"""Many contributions into one: weighted means, and rules that a minority of liars cannot move far.

All are functions of the contributions alone, equal bit for bit on every machine (see the head of
`methods.method`). Under the mean a contribution counts by its weight, the tokens behind it. Under
the trimmed mean and the median each peer has one voice, whatever it claims. Contributions of weight
zero are left out of everything.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from trainwright.swarm.methods.method import Received
from trainwright.swarm.sums import norm

_CLIPPED_STEPS = 3  # of centred clipping
_CHUNK = 1 << 20  # coordinates that are sorted at a time


def combine(
    received: Sequence[Received], average: str = "plain", aggregation: str = "mean"
) -> Tensor:
    """One vector fp32 [count] from those of a round, which are left as they are.

    `average` is "plain", or "radial": lengths and directions are combined apart, so that
    contributions that point apart do not shorten each other (radial-directional averaging of
    Decoupled DiLoCo, arXiv 2604.21428: mean of lengths times the direction of the mean direction).
    `aggregation` is a key of RULES. Zeros if no contribution has any weight. Raises ValueError
    where there is none, lengths differ, or a name is unknown.
    """
    if not received or len({len(each.values) for each in received}) > 1:
        raise ValueError("contributions of one length are wanted, at least one")
    if average not in ("plain", "radial"):
        raise ValueError(f"no average {average!r}")
    if aggregation not in RULES:
        raise ValueError(f"no aggregation {aggregation!r}")
    rule = RULES[aggregation]
    counted = sorted((each for each in received if each.weight > 0), key=lambda each: each.peer)
    if not counted:
        return torch.zeros_like(received[0].values)
    vectors = [each.values for each in counted]
    weight = math.fsum(each.weight for each in counted)
    shares = [each.weight / weight for each in counted]
    if average == "plain":
        return rule(vectors, shares)
    lengths = [norm(values) for values in vectors]
    directions = [_scaled(values, 1.0, size) for values, size in zip(vectors, lengths, strict=True)]
    length = rule([torch.tensor([size]) for size in lengths], shares)
    direction = rule(directions, shares)
    return _scaled(direction, float(length), norm(direction))


def clip_to_median(received: Sequence[Received]) -> list[Received]:
    """Contributions in their order, those longer than the median length scaled down to it.

    As SparseLoCo's release does (arXiv 2508.15706). Of two middle lengths the median is their mean.
    """
    lengths = [norm(each.values) for each in received]
    counted = [size for size, each in zip(lengths, received, strict=True) if each.weight > 0]
    limit = statistics.median(counted or [0.0])
    return [
        dataclasses.replace(each, values=_scaled(each.values, limit, size))
        if size > limit
        else each
        for size, each in zip(lengths, received, strict=True)
    ]


def weighted_mean(vectors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """The mean by shares, which sum to one."""
    mean = torch.zeros_like(vectors[0])
    for values, share in zip(vectors, shares, strict=True):
        mean.add_(values.mul(share))
    return mean


def trimmed_mean(vectors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """At each coordinate the mean without the quarter (from three on: at least one) of the lowest
    and as many of the highest values (Yin et al. 2018, arXiv 1803.01498).
    """
    trimmed = max(1, len(vectors) // 4) if len(vectors) > 2 else 0
    return _between(vectors, trimmed, len(vectors) - trimmed)


def median(vectors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """At each coordinate the median, of two middle values their mean (Yin et al. 2018)."""
    return _between(vectors, (len(vectors) - 1) // 2, len(vectors) // 2 + 1)


def centred_clip(vectors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """The mean, with each contribution's distance to it clipped to the median distance.

    Centred clipping (Karimireddy, He, Jaggi 2021, arXiv 2012.10333), from zero and in three steps,
    so that a vector of any length moves the outcome by no more than a common one does.
    """
    centre = torch.zeros_like(vectors[0])
    for _ in range(_CLIPPED_STEPS):
        apart = [values - centre for values in vectors]
        distances = [norm(each) for each in apart]
        limit = statistics.median(distances)
        clipped = [
            _scaled(each, limit, distance) if distance > limit else each
            for each, distance in zip(apart, distances, strict=True)
        ]
        centre = centre + weighted_mean(clipped, shares)
    return centre


Rule = Callable[[Sequence[Tensor], Sequence[float]], Tensor]
RULES: dict[str, Rule] = {
    "mean": weighted_mean,
    "trimmed-mean": trimmed_mean,
    "median": median,
    "centred-clip": centred_clip,
}


def _between(vectors: Sequence[Tensor], start: int, stop: int) -> Tensor:
    """At each coordinate the mean of the sorted values from `start` to before `stop`."""
    found = torch.empty_like(vectors[0])
    for at in range(0, len(found), _CHUNK):
        # Adding zero makes -0 into 0: which of the two a sort puts first is nowhere written.
        rows = torch.stack([each[at : at + _CHUNK] for each in vectors]).add_(0.0).sort(0).values
        part = rows[start].clone()
        for row in rows[start + 1 : stop]:
            part.add_(row)
        found[at : at + _CHUNK] = part.div_(stop - start)
    return found


def _scaled(values: Tensor, to: float, length: float) -> Tensor:
    """The vector of that length, scaled to another; a vector of length zero as it is."""
    return values.mul(to / length) if length > 0 else values
