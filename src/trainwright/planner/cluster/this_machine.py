"""The machine at hand as a cluster: what was measured of it, else what data sheets say."""

from __future__ import annotations

import math
from dataclasses import replace

from trainwright.planner.cluster.calibration import Calibration, Crowd
from trainwright.planner.cluster.catalogue import device, device_by_driver, link
from trainwright.planner.cluster.describe import Cluster, DeviceKind, Link, Observation, Pool, Rates
from trainwright.planner.cluster.typical import inside_link
from trainwright.planner.plan import Machine

_SPREAD = 0.15  # of what is predicted of a machine that has been measured
_MOST_UNKNOWN = 0.35  # of one that no table knows


def this_machine(
    machine: Machine, calibration: Calibration | None = None, *, workers: int | None = None
) -> Cluster:
    """`machine` as one pool, with a device for each of its workers.

    On a CPU these are as many as there are cores, or `workers`, and share what there is; of GPUs
    all that a launcher has started on machines like this one, or that are here.
    """
    if machine.device_kind == "cpu":
        return _processors(machine, calibration, workers or machine.launched or machine.cores)
    count = workers or machine.launched or machine.devices
    known = device_by_driver(machine.device_name)
    kind = known or replace(device("A100-40G-PCIe"), name=machine.device_name or "GPU")
    kind = replace(kind, memory_bytes=float(machine.memory_bytes) or kind.memory_bytes)
    rates = Rates() if known else Rates(spread=_MOST_UNKNOWN)
    inside = inside_link(kind)
    each = min(count, machine.devices)
    pool = Pool(
        name="here",
        device=kind,
        nodes=-(-count // each),
        devices_per_node=each,
        inside=inside,
        between=link("InfiniBand-NDR" if inside.name != "PCIe-4" else "Ethernet-25"),
        rates=_measured_rates(rates, calibration),
        host_link=link("PCIe-4"),
        calibration=calibration,
    )
    return Cluster("this machine", (pool,), observed=_observed(calibration))


def _processors(machine: Machine, calibration: Calibration | None, workers: int) -> Cluster:
    """Each worker a device with its share of the cores and of the memory."""
    common, share = device("CPU"), machine.cores / workers
    part = share / common.units
    crowd = calibration.crowd(workers) if calibration is not None else None
    kind = replace(
        common,
        name=machine.device_name or common.name,
        memory_bytes=(machine.free_bytes or machine.memory_bytes) / workers,
        peak_flops={name: rate * part for name, rate in common.peak_flops.items()},
        memory_bandwidth=common.memory_bandwidth * part,
        watts=common.watts * part,
        idle_watts=common.idle_watts * part,
        units=max(1, int(share)),
    )
    inside = link("shared-memory")
    if crowd is not None:
        assert calibration is not None
        part = 1 / calibration.scale(crowd, workers, max(1, machine.cores // workers))
        kind, inside = _measured_kind(kind, crowd, part), _measured_link(inside, crowd)
    pool = Pool(
        name="here",
        device=kind,
        nodes=1,
        devices_per_node=workers,
        inside=inside,
        between=inside,
        rates=_measured_rates(Rates(spread=_MOST_UNKNOWN), calibration, crowd),
        calibration=calibration,
    )
    return Cluster("this machine", (pool,), observed=_observed(calibration))


def _observed(calibration: Calibration | None) -> tuple[Observation, ...]:
    return () if calibration is None else calibration.lessons


def _measured_rates(
    rates: Rates, calibration: Calibration | None, crowd: Crowd | None = None
) -> Rates:
    if calibration is None or not calibration.crowds:
        return rates
    source = f"measured here, {calibration.time[:10]}"
    if calibration.facts.get("device") != "cpu":
        return replace(rates, spread=_SPREAD, source=source)
    # Peaks are what was reached.
    held = calibration.memory.process_bytes + calibration.memory.group_bytes
    full = {"products": 1.0, "memory": 1.0, "links": 1.0, "memory_bytes": held}
    full |= {"holes": calibration.holes, "steps": 1.0 if crowd is None else crowd.step_factor}
    return replace(rates, **full, spread=_SPREAD, source=source)


def _measured_kind(kind: DeviceKind, crowd: Crowd, part: float) -> DeviceKind:
    """With the best rates of the crowd, times `part`, as its peaks."""
    peaks: dict[str, float] = {}
    bandwidth = 0.0
    for sample in crowd.samples:
        if sample.kernel == "product":
            rate = 2 * math.prod(sample.shape) / sample.seconds
            peaks[sample.precision] = max(peaks.get(sample.precision, 0.0), part * rate)
        elif sample.kernel == "elements":
            bandwidth = max(bandwidth, part * sample.shape[0] / sample.seconds)
    peaks = {**kind.peak_flops, **peaks}
    return replace(kind, peak_flops=peaks, memory_bandwidth=bandwidth or kind.memory_bandwidth)


def _measured_link(link: Link, crowd: Crowd) -> Link:
    """Delay of the smallest message, and bandwidth of the largest."""
    sent = sorted((s.shape[1], s.seconds) for s in crowd.samples if s.kernel == "send")
    if not sent:
        return link
    (_, delay), (size, seconds) = sent[0], sent[-1]
    rate = size / seconds
    return replace(link, latency=delay, up=rate, down=rate, shared=False, source="measured here")
