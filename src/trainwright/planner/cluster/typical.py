"""Devices of a kind as they are commonly put together, where nobody has said how. No torch."""

from __future__ import annotations

from trainwright.planner.cluster.catalogue import link
from trainwright.planner.cluster.describe import Cluster, DeviceKind, Link, Pool, Rates
from trainwright.planner.cluster.device_table import DOLLARS_PER_HOUR

_NODE = 8
# What joins the devices of a node; PCIe joins the others.
_INSIDE = {
    **dict.fromkeys(("A100-40G-SXM", "A100-80G-SXM"), "NVLink-3"),
    **dict.fromkeys(("H100-SXM", "H200-SXM", "GH200"), "NVLink-4"),
    **dict.fromkeys(("B200", "GB200", "B300", "GB300"), "NVLink-5"),
    "H100-NVL": "NVLink-bridge-4",
    "H200-NVL": "NVLink-bridge-4",
    "MI300X": "Infinity-Fabric",
    "TPU-v5p": "TPU-ICI",
}


def inside_link(kind: DeviceKind) -> Link:
    """What commonly joins such devices in one machine."""
    return link(_INSIDE.get(kind.name, "PCIe-4"))


def typical_cluster(kind: DeviceKind, devices: int, rates: Rates | None = None) -> Cluster:
    """So many devices, eight a node, joined as common machines join them, at the catalogue's price.

    CPUs are a node each.
    """
    each = 1 if kind.kind == "cpu" else min(_NODE, devices)
    fast = kind.name in _INSIDE
    between = "InfiniBand-NDR" if fast else "Ethernet-10" if kind.kind == "cpu" else "Ethernet-100"
    pool = Pool(
        name=kind.name,
        device=kind,
        nodes=-(-devices // each),
        devices_per_node=each,
        inside=inside_link(kind),
        between=link(between),
        rates=rates or Rates(),
        dollars_per_hour=DOLLARS_PER_HOUR.get(kind.name, 0.0),
        host_link=link("PCIe-5" if fast else "PCIe-4"),
    )
    return Cluster(f"{devices} × {kind.name}", (pool,))
