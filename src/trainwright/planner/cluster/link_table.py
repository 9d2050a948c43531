"""Common links by their data sheets: what one device has of them, each way. No torch.

Makers give NVLink and PCIe for both ways together; here it is one way. Delays of networks are a
message's between two machines over a switch; those within a machine what a copy takes to begin.
"""

from __future__ import annotations

from trainwright.planner.cluster.describe import Link


def _link(
    name: str, gigabytes: float, microseconds: float, source: str, *, shared: bool = False
) -> Link:
    rate = gigabytes * 1e9
    return Link(name, microseconds * 1e-6, rate, rate, shared, source)


def _network(
    name: str, gigabits: float, microseconds: float, source: str, *, shared: bool = True
) -> Link:
    return _link(name, gigabits / 8, microseconds, source, shared=shared)


_IB = "NVIDIA ConnectX data sheet; a card for each device"
_ETHERNET = "IEEE 802.3; one card a machine, TCP"
_ROCE = "NVIDIA ConnectX data sheet; a card for each device, RDMA over Ethernet"
_INTERNET = "assumed: what a machine gets of a line, and light's way there and back, halved"

LINKS: tuple[Link, ...] = (
    _link("NVLink-3", 300, 1, "NVIDIA A100 data sheet, 2021: 600 GB/s both ways"),
    _link("NVLink-4", 450, 1, "NVIDIA H100 data sheet, 2024: 900 GB/s both ways"),
    _link("NVLink-5", 900, 1, "NVIDIA GB200 NVL72 data sheet, 2024: 1.8 TB/s both ways"),
    _link("NVLink-bridge-3", 300, 1, "NVIDIA A100 PCIe product brief, 2021: pairs, 600 GB/s"),
    _link("NVLink-bridge-4", 300, 1, "NVIDIA H100 NVL data sheet, 2024: pairs, 600 GB/s"),
    _link("Infinity-Fabric", 448, 1, "AMD Instinct MI300X data sheet, 2023: 7 links of 128 GB/s"),
    _link("TPU-ICI", 600, 1, "Google Cloud, TPU v5p, 2024: 1,200 GB/s both ways"),
    _link("PCIe-4", 31.5, 5, "PCI-SIG 4.0, 2017: 16 lanes of 16 GT/s"),
    _link("PCIe-5", 63, 5, "PCI-SIG 5.0, 2019: 16 lanes of 32 GT/s"),
    _link("shared-memory", 10, 20, "assumed: processes of one machine", shared=True),
    _network("InfiniBand-HDR", 200, 2, _IB, shared=False),
    _network("InfiniBand-NDR", 400, 2, _IB, shared=False),
    _network("InfiniBand-XDR", 800, 2, _IB, shared=False),
    _network("RoCE-100", 100, 3, _ROCE, shared=False),
    _network("RoCE-200", 200, 3, _ROCE, shared=False),
    _network("RoCE-400", 400, 3, _ROCE, shared=False),
    _network("Ethernet-1", 1, 50, _ETHERNET),
    _network("Ethernet-10", 10, 30, _ETHERNET),
    _network("Ethernet-25", 25, 30, _ETHERNET),
    _network("Ethernet-100", 100, 20, _ETHERNET),
    _network("Ethernet-400", 400, 20, _ETHERNET),
    _network("internet-region", 10, 1_000, _INTERNET),
    _network("internet-continent", 1, 20_000, _INTERNET),
    _network("internet-world", 0.5, 80_000, _INTERNET),
    Link("internet-home", 15e-3, 5e6, 31.25e6, True, "assumed: 40 Mbit/s up, 250 Mbit/s down"),
)

# Grams of CO2 a kWh of a zone's electricity, with what was made to build and fuel its plants.
ZONES_FROM = "Ember, 2023, through Our World in Data"
GRAMS_PER_KWH: dict[str, float] = {
    "AT": 111,
    "AU": 549,
    "BE": 138,
    "BR": 98,
    "CA": 170,
    "CL": 291,
    "CN": 582,
    "CZ": 450,
    "DE": 381,
    "DK": 152,
    "ES": 174,
    "FI": 79,
    "FR": 56,
    "GB": 238,
    "IE": 291,
    "IN": 713,
    "JP": 485,
    "NL": 268,
    "NO": 30,
    "PL": 662,
    "SE": 41,
    "US": 369,
    "world": 481,
}
