"""Arithmetic of layouts: divisors, and a model's layers over pipeline stages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

from trainwright.models.families import DecoderConfig
from trainwright.planner.shapes import flops_per_token

_LARGEST_TRIED = 4096


@lru_cache(maxsize=1024)
def divisors(number: int) -> tuple[int, ...]:
    """Divisors of `number`, ascending: all of them below 16 million.

    Of a larger number those up to 4,096, and what remains when they are divided out.
    """
    most = min(math.isqrt(number), _LARGEST_TRIED)
    small = [n for n in range(1, most + 1) if number % n == 0]
    return tuple(sorted({*small, *(number // n for n in small)}))


def split_rows(rows: int, speeds: Sequence[float], unit: int = 1) -> tuple[int, ...]:
    """`rows` shared out so that the slowest of workers of these speeds is done as soon as can be.

    Each gets a multiple of `unit`, and one at least. A unit at a time goes to whoever would then
    be done first: the best there is, since all of them are equally large. Raises ValueError where
    `unit` does not divide `rows`, or there is not one for each.
    """
    units, rest = divmod(rows, unit)
    if rest or units < len(speeds):
        raise ValueError(f"{rows} rows are no {unit} or more for each of {len(speeds)} workers")
    own = [1] * len(speeds)
    for _ in range(units - len(speeds)):
        first = min(range(len(speeds)), key=lambda i: ((own[i] + 1) / speeds[i], i))
        own[first] += 1
    return tuple(unit * count for count in own)


def split_layers(config: DecoderConfig, stages: int) -> tuple[int, ...]:
    """Layers of each pipeline stage, in the model's order: as even as can be, one at least.

    The head counts as the layers whose matrix products it equals, the embedding, which is mostly
    memory, as half a layer; what is left over goes where the least work is.
    """
    head = 2 * config.hidden_size * config.vocab_size
    layer = (flops_per_token(config, 1) - head) / config.num_layers
    work = [1.0] * stages
    work[0] += 0.5
    work[-1] += head / layer
    layers = [1] * stages
    for _ in range(config.num_layers - stages):
        least = min(range(stages), key=lambda stage: (work[stage], stage))
        layers[least] += 1
        work[least] += 1
    return tuple(layers)
