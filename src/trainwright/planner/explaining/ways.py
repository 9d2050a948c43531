"""How an impossible recipe becomes possible, and what each way costs. No torch.

Another recipe on the same devices, more of the same devices, other devices, or an adapter in place
of the whole model: of each kind the cheapest is found by the same search that plans everything.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from trainwright.errors import UserError
from trainwright.planner.advice import Change, drastic_changes, gentle_changes
from trainwright.planner.cluster.catalogue import device
from trainwright.planner.cluster.describe import Cluster, DeviceKind
from trainwright.planner.cluster.load import NOWHERE
from trainwright.planner.cluster.typical import typical_cluster
from trainwright.planner.explaining.question import Question
from trainwright.planner.plan import Plan
from trainwright.planner.search.ranking import Ranked
from trainwright.planner.shapes import parameter_count
from trainwright.recipe.parallel import Parallel

MOST_SHOWN = 3
_OTHERS = ("RTX-4090", "A100-80G-SXM", "H100-SXM", "B200")
_PREDICTIONS = 16  # of plans on each machine that is tried
_FILLED = 0.92  # of a device's memory: what is advised should hold
_TRIES = 4  # doublings beyond the fewest devices that could hold it
_PACKED_BYTES = {"none": 2.0, "int8": 1.0, "nf4": 0.5}  # of a frozen parameter
_NO_CHANGE = Change({}, 0.0)
_MILLION = 1e6


@dataclass(frozen=True)
class Way:
    """A change of the recipe, empty where it stays, and a machine that can then train it.

    `seconds` and `dollars` are of the run, or of a million tokens where only the data tells how
    long that is; 0 dollars where no price is known.
    """

    change: Change
    cluster: Cluster
    ranked: Ranked
    seconds: float
    dollars: float

    @property
    def devices(self) -> str:
        """Them in words: "4 × H100-SXM"."""
        return f"{self.ranked.plan.world_size} × {self.cluster.pools[0].device.name}"


def ways_out(question: Question, nearest: Plan | None = None) -> list[Way]:
    """The three cheapest ways, each of another kind as far as there are kinds, the cheapest first.

    `nearest` is the plan that comes nearest to fitting, where there is one.
    """
    here = question.clusters[0].pools[0].device
    others = [device(name) for name in _OTHERS if name != here.name]
    drastic = list(drastic_changes(question.recipe))
    adapters = [change for change in drastic if "adapter" in change.values]
    kinds: list[Iterable[Way]] = [
        _same_machine(question, nearest),
        _enough(question, [_NO_CHANGE], [here], 2),
        _enough(question, [_NO_CHANGE], others, 2),
        _enough(question, adapters, [here, *others], 1),
    ]
    every = [sorted(kind, key=_price) for kind in kinds]
    cheapest = [found[0] for found in every if found]
    # Where few kinds help, the next best devices fill the list.
    for way in sorted((way for found in every for way in found[1:]), key=_price):
        if len(cheapest) < MOST_SHOWN and all(_differs(way, other) for other in cheapest):
            cheapest.append(way)
    return sorted(cheapest, key=_price)[:MOST_SHOWN]


def _differs(way: Way, other: Way) -> bool:
    """Whether two ways are of different devices or changes."""
    kinds = [each.cluster.pools[0].device.name for each in (way, other)]
    return kinds[0] != kinds[1] or way.change != other.change


def _price(way: Way) -> tuple[bool, float, float]:
    """Dollars where they are known, else devices' time."""
    return way.dollars == 0, way.dollars, way.seconds * way.ranked.plan.world_size


def _same_machine(question: Question, nearest: Plan | None) -> Iterator[Way]:
    """Changes that no search tries by itself, on the machine as it is, the gentlest that helps."""
    if nearest is None:
        return
    changes = [
        change
        for change in gentle_changes(question.recipe, nearest)
        if not any(key.startswith(("parallel.", "training.recompute")) for key in change.values)
    ]
    changes += drastic_changes(question.recipe)
    for change in sorted(changes, key=lambda change: change.cost):
        found = _tried(question, change, question.clusters)
        if found is not None:
            yield found
            return


def _enough(
    question: Question, changes: Sequence[Change], kinds: Sequence[DeviceKind], most: int
) -> Iterator[Way]:
    """The fewest of each kind of device that are enough, in powers of two, `most` such numbers.

    Where devices are full to the brim, twice as many can be cheaper.
    """
    for change in changes:
        for kind in kinds:
            fewest, enough = _fewest(question, change, kind), 0
            for doublings in range(_TRIES):
                cluster = _cluster(question, kind, fewest << doublings)
                # Others' memory is cheaper than the host's, which slows all of them down.
                found = _tried(question, change, [cluster], {"offload": "none"})
                if found is not None:
                    yield found
                    enough += 1
                if enough == most:
                    break


def _fewest(question: Question, change: Change, kind: DeviceKind) -> int:
    """Devices that weights and what belongs to them fill alone, as a power of two."""
    job, adapter = question.job, change.applied(question.recipe).adapter
    stack = job.stack
    each = stack.weight_bytes + stack.gradient_bytes + stack.optimizer_bytes
    if adapter is not None:
        each = _PACKED_BYTES[adapter.quantise]
    needed = each * parameter_count(job.config) / kind.memory_bytes
    return 1 << max(0, math.ceil(math.log2(needed)))


def _cluster(question: Question, kind: DeviceKind, devices: int) -> Cluster:
    """So many of a kind, joined as the question's own where they are of its kind."""
    typical = typical_cluster(kind, devices)
    own, pool = question.clusters[0].pools[0], typical.pools[0]
    if kind != own.device:
        return typical
    each = pool.devices_per_node if own.devices_per_node == 1 else own.devices_per_node
    each = min(each, devices)
    pool = replace(
        own,
        nodes=-(-devices // each),
        devices_per_node=each,
        inside=pool.inside if own.inside == NOWHERE else own.inside,
        between=pool.between if own.between == NOWHERE else own.between,
        dollars_per_hour=own.dollars_per_hour or pool.dollars_per_hour,
    )
    return replace(typical, pools=(pool,))


def _tried(
    question: Question,
    change: Change,
    clusters: Sequence[Cluster],
    layout: Mapping[str, Any] | None = None,
) -> Way | None:
    """The best plan with a change on other machines; None where there is none."""
    recipe = change.applied(question.recipe).model_copy(update={"parallel": Parallel()})
    changed = replace(question, recipe=recipe, clusters=clusters)
    room = _FILLED * min(pool.device.memory_bytes for each in clusters for pool in each.pools)
    try:
        winner = changed.best(1, layout, _PREDICTIONS, room).winner
    except UserError:
        return None
    if winner is None:
        return None
    prediction, tokens = winner.prediction, question.tokens or _MILLION
    share = tokens / winner.plan.batch_tokens / winner.goodput
    seconds, dollars = share * prediction.step_seconds.value, share * prediction.dollars
    return Way(change, winner.cluster, winner, seconds, dollars)
