"""Joules, dollars and grams of CO2 of a step, from what devices do in it. No torch.

A device draws what it draws at rest, and of what is left up to its data sheet's greatest power a
share that depends on what it does. Joules are the devices' own, as their counters measure them;
grams are of all that the building draws for them; dollars are what the devices cost to rent.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from trainwright.planner.cluster.describe import Cluster, DeviceKind, Pool
from trainwright.planner.cost.stage import Work
from trainwright.planner.plan import Plan

# Of the power above that at rest. Products reach the greatest there is (Patel et al. 2024, ASPLOS,
# doi 10.1145/3620666.3651329: peaks of training are at or beyond it); the others are assumed,
# ordered as there: generating, which is bound by memory, draws less than reading a prompt, and
# power falls while GPUs talk or wait. A step with a tenth each of talking and waiting and a fifth
# of elementwise kernels then draws four fifths of the greatest: H100 nodes in training were
# measured at 76 % of theirs (arXiv:2506.14551).
PRODUCTS, ELEMENTS, COMMUNICATION, WAITING = 1.0, 0.6, 0.4, 0.15
# What a building draws for each watt of its machines: between Google's 1.09 (2023) and the 1.58
# that Uptime Institute's survey finds on average (2023).
PUE = 1.2
_JOULES_PER_KWH = 3.6e6


@dataclass(frozen=True)
class Energy:
    """What a step takes, on all devices together: joules, dollars, and grams of CO2."""

    joules: float
    dollars: float
    grams: float


@dataclass(frozen=True)
class Load:
    """Devices of a pool that do the same in a step: seconds of each kind of work on one of them.

    What is left of the step they wait.
    """

    pool: Pool
    devices: int
    products: float = 0.0  # matrix products and attention
    elements: float = 0.0  # bound by memory: norms, activations, the optimizer
    communication: float = 0.0  # that nothing hides


def power(device: DeviceKind, utilisation: float) -> float:
    """Watts of a device at a share, 0 to 1, of the power that it can draw above that at rest."""
    return device.idle_watts + utilisation * (device.watts - device.idle_watts)


def load_energy(loads: Iterable[Load], seconds: float) -> Energy:
    """What a step of `seconds` takes; a pool without a price or a carbon zone adds nothing to them.

    grams = PUE × kWh × the region's grams a kWh.
    """
    joules = dollars = grams = 0.0
    for load in loads:
        busy = load.products + load.elements + load.communication
        one = (
            power(load.pool.device, PRODUCTS) * load.products
            + power(load.pool.device, ELEMENTS) * load.elements
            + power(load.pool.device, COMMUNICATION) * load.communication
            + power(load.pool.device, WAITING) * max(0.0, seconds - busy)
        )
        joules += load.devices * one
        dollars += load.devices * seconds / 3600 * load.pool.dollars_per_hour
        grams += PUE * load.devices * one / _JOULES_PER_KWH * load.pool.grams_per_kwh
    return Energy(joules, dollars, grams)


def energy_of(
    plan: Plan, cluster: Cluster, seconds: float, work: Work, optimizer: float = 0.0
) -> Energy:
    """The same where all of the plan's devices do `work`, and `optimizer` seconds of updating."""
    loads, left = [], plan.world_size
    for pool in cluster.pools:
        devices = min(left, pool.devices)
        left -= devices
        loads.append(
            Load(
                pool,
                devices,
                products=work.products + work.attention,
                elements=work.elements + optimizer,
                communication=sum(work.exposed.values()),
            )
        )
    return load_energy(loads, seconds)
