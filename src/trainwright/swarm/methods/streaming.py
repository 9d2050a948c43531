"""Streaming DiLoCo (Douillard et al. 2025, arXiv 2501.18512): parts of the model in turn.

    fragment p every H steps:   Δ_p = θ_p − θ_i,p, sent while training goes on
    τ steps later:              θ_i,p ← α θ_i,p + (1 − α) OuterOpt(θ_p, mean_i Δ_p)

Peers never wait for a whole model's exchange, and no moment has more than one part to send.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import Tensor

from trainwright.errors import Mistake, UserError
from trainwright.swarm.layout import Layout, take
from trainwright.swarm.methods.diloco import Combine, DiLoCo
from trainwright.swarm.methods.method import Agreed
from trainwright.swarm.settings import Settings


class Streaming(DiLoCo):
    """DiLoCo whose round r is of fragment r mod P."""

    def __init__(self, settings: Settings, layout: Layout, combine: Combine) -> None:
        super().__init__(settings, layout, combine)
        names = fragments(layout, settings.fragments)
        self.parts = [layout.part(each) for each in names]
        self.inner_steps = max(1, settings.inner_steps // settings.fragments)

    def fragment(self, round: int) -> tuple[slice, ...]:
        """One after the other."""
        return self.parts[round % len(self.parts)]

    def merge(
        self, before: Agreed, after: Agreed, round: int, local: Tensor, sent: Tensor | None
    ) -> Tensor:
        """A mixture with the agreed weights; a peer that was left out carries its change on."""
        if sent is None:
            return super().merge(before, after, round, local, sent)
        alpha = self.settings.mixing
        agreed = take(after.weights, self.fragment(round))
        return local.mul(alpha).add(agreed.mul(1 - alpha))


def fragments(layout: Layout, count: int) -> list[list[str]]:
    """The tensors' names in so many parts: layers in turn (the paper's strided pattern).

    What is in no layer, such as embeddings, goes to whichever part is smallest, largest first.
    Raises UserError where a part would stay empty.
    """
    sizes = {name: place.stop - place.start for name, place in layout.slices.items()}
    found: list[list[str]] = [[] for _ in range(count)]
    layers = {name: int(number[1]) for name in sizes if (number := re.search(r"\.(\d+)\.", name))}
    order = {layer: turn for turn, layer in enumerate(sorted(set(layers.values())))}
    for name, layer in layers.items():
        found[order[layer] % count].append(name)
    rest = sorted(sizes.keys() - layers.keys(), key=lambda name: (-sizes[name], name))
    for name in rest:
        min(found, key=lambda part: _size(part, sizes)).append(name)
    if not all(found):
        what = f"the model cannot be cut into {count} fragments"
        raise UserError(Mistake(what, "write fewer", "swarm.fragments"))
    return found


def _size(names: Iterable[str], sizes: dict[str, int]) -> int:
    return sum(sizes[name] for name in names)
