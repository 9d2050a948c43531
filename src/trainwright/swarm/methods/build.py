"""From settings to a method."""

from __future__ import annotations

from functools import partial

from trainwright.swarm import aggregation
from trainwright.swarm.layout import Layout
from trainwright.swarm.methods.demo import DeMo
from trainwright.swarm.methods.diloco import Combine, DiLoCo
from trainwright.swarm.methods.distro import DisTrO
from trainwright.swarm.methods.method import Method
from trainwright.swarm.methods.muloco import MuLoCo
from trainwright.swarm.methods.noloco import NoLoCo
from trainwright.swarm.methods.sparseloco import SparseLoCo
from trainwright.swarm.methods.streaming import Streaming
from trainwright.swarm.settings import Settings

METHODS: dict[str, type[DiLoCo] | type[DeMo]] = {
    "diloco": DiLoCo,
    "streaming": Streaming,
    "sparseloco": SparseLoCo,
    "muloco": MuLoCo,
    "noloco": NoLoCo,
    "demo": DeMo,
    "distro": DisTrO,
}


def build_method(settings: Settings, layout: Layout, combine: Combine | None = None) -> Method:
    """The settings' method over a model's weights.

    `combine` makes one of all contributions of a round; default their `settings.average`.
    """
    if combine is None:
        combine = partial(aggregation.combine, average=settings.average)
    return METHODS[settings.method](settings, layout, combine)
