"""Rows of key-value caches put together anew, for generations that rows join and leave."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from trainwright.models.cache import KeyValueCache, LayerCache

_PADDING = -1  # the segment of slots that hold no token


def put_rows(
    empty: KeyValueCache,
    parts: Sequence[tuple[KeyValueCache, Sequence[int]]],
    lengths: Sequence[int],
) -> None:
    """Fill a new cache of the same model with rows of others, which stay as they are.

    parts: caches, and the numbers of their rows that are wanted. lengths: how many tokens each of
    these rows has, padding left out; they stand at a row's end. The new cache is as long as its
    longest row, and has segments: padding before a row is -1, the row itself 0.
    """
    longest = max(lengths)
    for number, layer in enumerate(empty.layers):
        held = [(cache.layers[number], rows) for cache, rows in parts if rows]
        # A layer with a window may have let go of tokens that no later one sees.
        slots = min(longest, max(source.held for source, _ in held))
        sides = zip(*(_last_slots(source, rows, slots) for source, rows in held), strict=True)
        layer.update(*(torch.cat(side) for side in sides))
    device = layer._keys.device
    slot = torch.arange(longest, device=device)
    first = longest - torch.tensor(lengths, device=device)
    empty.extend(longest, torch.where(slot < first[:, None], _PADDING, 0))


def _last_slots(layer: LayerCache, rows: Sequence[int], slots: int) -> tuple[Tensor, Tensor]:
    """Keys and values in the newest slots of these rows, with zeros before them if need be."""
    chosen = torch.tensor(list(rows), device=layer._keys.device)
    room = (0, 0, slots - layer.held, 0)  # where it is negative, the oldest are left out
    keys, values = (each[:, :, : layer.held][chosen] for each in (layer._keys, layer._values))
    return F.pad(keys, room), F.pad(values, room)
