"""The key-value cache of generation: what earlier tokens left behind, layer by layer.

It grows by doubling; a layer with a window holds little more than its window can still see.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainwright.models.families import DecoderConfig


class LayerCache:
    """Keys and values of one layer, [batch, kv_heads, tokens, head_dim] each."""

    def __init__(self, window: int | None, capacity: int) -> None:
        self.window = window
        self.capacity = capacity if window is None else min(capacity, 2 * window)
        self.held = 0  # tokens in the buffers
        self._keys = self._values = torch.empty(0)

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add the newest tokens' keys and values; returns those of all that they may attend to.

        The newest come last; `visible` says how many come back.
        """
        added = keys.shape[2]
        if self.held == 0 or self.held + added > self._keys.shape[2]:
            self._make_room(keys, values)
        stop = self.held + added
        self._keys[:, :, self.held : stop] = keys
        self._values[:, :, self.held : stop] = values
        self.held = stop
        first = stop - visible(stop, added, self.window)
        return self._keys[:, :, first:stop], self._values[:, :, first:stop]

    def _make_room(self, keys: Tensor, values: Tensor) -> None:
        """New buffers for twice what is needed, without what no window sees any more."""
        kept = self.held if self.window is None else min(self.held, self.window - 1)
        first, added = self.held - kept, keys.shape[2]
        capacity = 2 * (kept + added) if self.held else max(self.capacity, added)
        buffers = []
        for old, new in ((self._keys, keys), (self._values, values)):
            buffer = new.new_empty(*new.shape[:2], capacity, new.shape[3])
            if kept:
                buffer[:, :, :kept] = old[:, :, first : self.held]
            buffers.append(buffer)
        self._keys, self._values = buffers
        self.held = kept


class KeyValueCache:
    """A decoder's cache for one batch: give it to every forward pass of a generation.

    `capacity` is the number of tokens to reserve room for; more are taken as they come.
    """

    def __init__(self, config: DecoderConfig, capacity: int = 256) -> None:
        self.layers = [LayerCache(window, capacity) for window in config.layer_windows]
        self.length = 0  # tokens of each row so far, padding included
        self._segments: Tensor | None = None

    def extend(self, added: int, segments: Tensor | None) -> Tensor | None:
        """Count the newest tokens; returns the segments of all tokens so far, where any came.

        segments [batch, added] come with every pass of a generation or with none.
        """
        if self.length and (segments is None) != (self._segments is None):
            raise ValueError("give segment_ids to every pass of a generation, or to none")
        if self._segments is not None and segments is not None:
            segments = torch.cat([self._segments, segments], dim=1)
        self.length += added
        self._segments = segments
        return segments


def visible(total: int, added: int, window: int | None) -> int:
    """How many of a row's `total` tokens the newest `added` may attend to between them."""
    return total if window is None else min(total, window - 1 + added)
