"""Devices, links and carbon zones by name, spelt in whatever case, with or without dashes."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

from trainwright.planner.cluster.describe import DeviceKind, Link
from trainwright.planner.cluster.device_table import DEVICES, DRIVER_NAMES
from trainwright.planner.cluster.link_table import GRAMS_PER_KWH, LINKS

Entry = TypeVar("Entry")
_devices = {device.name: device for device in DEVICES}
_links = {link.name: link for link in LINKS}


def device(name: str) -> DeviceKind:
    """The device of that name. Raises KeyError, whose argument names the nearest ones."""
    return _found(name, _devices)


def link(name: str) -> Link:
    """The link of that name. Raises KeyError, whose argument names the nearest ones."""
    return _found(name, _links)


def carbon(zone: str) -> float:
    """Grams of CO2 a kWh in a zone. Raises KeyError, whose argument names the nearest ones."""
    return _found(zone, GRAMS_PER_KWH)


def device_by_driver(name: str) -> DeviceKind | None:
    """The device that a driver calls by this name, such as "NVIDIA H100 80GB HBM3"."""
    for pattern, known in DRIVER_NAMES:
        if re.search(pattern, name):
            return _devices[known]
    return None


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name).lower()


def _found(name: str, table: Mapping[str, Entry]) -> Entry:
    plain = {_plain(key): key for key in table}
    if _plain(name) in plain:
        return table[plain[_plain(name)]]
    raise KeyError(_nearest(name, plain))


def _nearest(name: str, plain: Mapping[str, str]) -> str:
    """What stands in the message: up to three names that look like it, or all of them."""
    wanted = _plain(name)
    near: Iterable[str] = [key for key in plain if wanted in key]
    near = near or difflib.get_close_matches(wanted, plain, n=3, cutoff=0.5) or plain
    return ", ".join(f"`{plain[key]}`" for key in near)
