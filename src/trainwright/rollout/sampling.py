"""From logits to the next token: temperature, top-k, top-p, min-p, and a seed for every row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainwright.errors import Mistake, UserError


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a text. The defaults sample from the model's own distribution.

    `temperature` 0 is greedy. `top_k` keeps the k likeliest tokens (0: all), `top_p` the fewest
    whose probabilities reach p (Holtzman et al. 2020), `min_p` those at least that share as likely
    as the likeliest (Nguyen et al. 2024); they apply in this order, after the temperature. A text
    ends before any of the `stop` strings. Raises UserError for values out of range.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        rules = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (self.temperature >= 0, "at least 0 (greedy)"),
            "top_p": (0 <= self.top_p <= 1, "between 0 and 1"),
            "top_k": (self.top_k >= 0, "at least 0 (all tokens)"),
            "min_p": (0 <= self.min_p <= 1, "between 0 and 1"),
            "stop": (all(stop), "no empty string"),
        }
        mistakes = [
            Mistake(f"{name} is {getattr(self, name)!r}", rule)
            for name, (holds, rule) in rules.items()
            if not holds
        ]
        if mistakes:
            raise UserError(mistakes)


def distribution(logits: Tensor, params: SamplingParams) -> Tensor:
    """Probabilities [rows, vocabulary] to draw from, for a temperature above 0."""
    logits = logits.float() / params.temperature
    vocabulary = logits.shape[-1]
    if 0 < params.top_k < vocabulary:
        least = logits.topk(params.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if params.top_p < 1:
        ordered, order = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1).roll(1, -1)
        before[:, 0] = -1.0  # the likeliest always stays
        dropped = torch.zeros_like(before, dtype=torch.bool).scatter(
            1, order, before >= params.top_p
        )
        logits = logits.masked_fill(dropped, -torch.inf)
    probabilities = logits.softmax(-1)
    if params.min_p > 0:
        least = params.min_p * probabilities.amax(-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < least, 0.0)
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    return probabilities


def choose(
    logits: Tensor, params: SamplingParams, generators: Sequence[torch.Generator]
) -> list[int]:
    """The next token of each row of logits [rows, vocabulary].

    Each row draws one number from its own generator (on CPU, whatever the logits' device), so what
    a row becomes does not depend on the rows beside it.
    """
    if params.temperature == 0:
        return logits.argmax(-1).tolist()
    numbers = torch.stack([torch.rand((), generator=generator) for generator in generators])
    cumulative = distribution(logits, params).double().cumsum(-1)
    places = numbers.double().to(logits.device)[:, None] * cumulative[:, -1:]
    # The first token at which the sum passes the number; it has a probability above 0.
    return (
        torch.searchsorted(cumulative, places, right=True)
        .clamp(max=logits.shape[-1] - 1)[:, 0]
        .tolist()
    )
