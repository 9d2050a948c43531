"""Rotary frequencies of every kind, as transformers computes them: in fp32, step by step.

A pretrained model has learnt one exact set of angles; far into a long document a difference in a
frequency's last bit is a visible angle, so the order of operations here follows transformers'.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from trainwright.kernels.rotary import rotary_tables
from trainwright.models.rope_spec import RopeSpec


class Rope:
    """One rotary embedding: `tables` gives the cos and sin that all layers of a pass share."""

    def __init__(self, spec: RopeSpec) -> None:
        self.spec = spec
        # On CPU even while a model is built on meta: they are constants, not parameters.
        with torch.device("cpu"):
            self._frequencies = FREQUENCIES[spec.kind](spec)
            self._steps = torch.arange(0, spec.dim, 2, dtype=torch.float32) / spec.dim

    def tables(
        self, positions: Tensor, lengths: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """cos and sin [batch or 1, sequence, dim/2] at `positions` of the same shape.

        `lengths` [batch or 1, sequence], the tokens in each token's document so far as it has been
        read, is needed where the spec `depends_on_length`.
        """
        frequencies = self._frequencies.to(positions.device)
        if self.spec.depends_on_length:
            assert lengths is not None
            frequencies = self._by_length(frequencies, lengths)
        return rotary_tables(positions, frequencies, scale=self.spec.cos_scale, dtype=dtype)

    def _by_length(self, frequencies: Tensor, lengths: Tensor) -> Tensor:
        """Frequencies [batch or 1, sequence, dim/2] for documents of `lengths`."""
        spec, lengths = self.spec, lengths[..., None]
        if spec.kind == "longrope":
            short, long = frequencies
            return torch.where(lengths > spec.original_max_positions, long, short)
        # Dynamic NTK: a longer document raises the base, so that its slowest turn spans it.
        stretch = spec.factor * lengths.clamp(min=spec.max_positions) / spec.max_positions
        power = spec.dim / (spec.dim - 2) if spec.dim > 2 else 1.0
        base = spec.theta * (stretch - (spec.factor - 1)) ** power
        return 1.0 / base ** self._steps.to(lengths.device)


def document_lengths(positions: Tensor, segments: Tensor | None) -> Tensor:
    """For each token, one more than the largest position in its document.

    positions [batch or 1, sequence]; segments [batch, sequence], documents lying in one piece, or
    None where every row is one document.
    """
    if segments is None:
        return (positions.amax(-1, keepdim=True) + 1).expand_as(positions)
    positions = positions.expand_as(segments)
    starts = segments[:, 1:] != segments[:, :-1]
    ordinals = torch.nn.functional.pad(starts.cumsum(-1), (1, 0))
    longest = torch.zeros_like(positions).scatter_reduce(1, ordinals, positions, "amax")
    return longest.gather(1, ordinals) + 1


def _default(spec: RopeSpec) -> Tensor:
    return 1.0 / spec.theta ** (torch.arange(0, spec.dim, 2, dtype=torch.float32) / spec.dim)


def _linear(spec: RopeSpec) -> Tensor:
    """Positions squeezed by `factor` (arXiv:2306.15595)."""
    return _default(spec) / spec.factor


def _llama3(spec: RopeSpec) -> Tensor:
    """Llama 3.1's: slow turns squeezed by `factor`, fast ones kept, a ramp between them."""
    frequencies = _default(spec)
    wavelengths = 2 * math.pi / frequencies
    slow = wavelengths > spec.original_max_positions / spec.low_freq_factor
    fast = wavelengths < spec.original_max_positions / spec.high_freq_factor
    ramp = (spec.original_max_positions / wavelengths - spec.low_freq_factor) / (
        spec.high_freq_factor - spec.low_freq_factor
    )
    blended = (1 - ramp) * frequencies / spec.factor + ramp * frequencies
    squeezed = torch.where(slow, frequencies / spec.factor, frequencies)
    return torch.where(~slow & ~fast, blended, squeezed)


def _yarn(spec: RopeSpec) -> Tensor:
    """YaRN (arXiv:2309.00071): a ramp over channel pairs by how often each turns in the context."""

    def pair_turning(times: float) -> float:
        context = spec.original_max_positions / (times * 2 * math.pi)
        return spec.dim * math.log(context) / (2 * math.log(spec.theta))

    low, high = pair_turning(spec.beta_fast), pair_turning(spec.beta_slow)
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.dim - 1)
    high = high + 0.001 if low == high else high
    ramp = ((torch.arange(spec.dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    periods = spec.theta ** (torch.arange(0, spec.dim, 2, dtype=torch.float32) / spec.dim)
    kept = 1 - ramp
    return 1.0 / (spec.factor * periods) * (1 - kept) + 1.0 / periods * kept


def _longrope(spec: RopeSpec) -> Tensor:
    """LongRoPE (arXiv:2402.13753): learnt factors, one set for short documents, one for long."""
    periods = spec.theta ** (torch.arange(0, spec.dim, 2, dtype=torch.float32) / spec.dim)
    return 1.0 / (torch.tensor([spec.short_factor, spec.long_factor]) * periods)


FREQUENCIES: dict[str, Callable[[RopeSpec], Tensor]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _default,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
}
