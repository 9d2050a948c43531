"""docs/cluster.md: the keys of `cluster.yaml` and the catalogue, from schema and tables.

`python -m trainwright.planner.cluster.page docs/cluster.md` writes them between the page's marks.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from trainwright.planner.cluster.describe import DeviceKind, Link
from trainwright.planner.cluster.device_table import DEVICES, DOLLARS_PER_HOUR, PRICES_FROM
from trainwright.planner.cluster.link_table import GRAMS_PER_KWH, LINKS, ZONES_FROM
from trainwright.planner.cluster.schema import (
    ClusterSection,
    DeviceSection,
    JoinSection,
    LinkSection,
    PoolSection,
    RatesSection,
)
from trainwright.recipe.section import Section

_PRECISIONS = ("fp32", "bf16", "float8", "float4")


def filled(page: str) -> str:
    """The page with what stands between its marks made anew."""
    parts = {
        "keys": "\n".join(_keys()),
        "devices": "\n".join(_devices()),
        "links": "\n".join(_links()),
        "zones": _zones(),
    }
    for name, text in parts.items():
        before, mark, rest = page.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        page = f"{before}{mark}\n{text}\n\n{end}{after}"
    return page


def _keys() -> Iterator[str]:
    sections: tuple[tuple[str, type[Section], type[Section] | None], ...] = (
        ("The file", ClusterSection, None),
        ("A pool", PoolSection, None),
        ("A device", DeviceSection, None),
        ("A link", LinkSection, None),
        ("An entry of `links`: a link's keys, and", JoinSection, LinkSection),
        ("`rates`", RatesSection, None),
    )
    for title, section, inherited in sections:
        yield from (f"**{title}**", "", "| key | what it says |", "|---|---|")
        for key, field in section.model_fields.items():
            if inherited is None or key not in inherited.model_fields:
                yield f"| `{key}` | {field.description} |"
        yield ""


def _devices() -> Iterator[str]:
    yield "| name | GiB | GB/s | fp32 | bf16 | float8 | float4 | W | $/h | source |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    yield from map(_device, DEVICES)
    yield f"\nRates in TFLOP/s; prices: {PRICES_FROM}."


def _device(entry: DeviceKind) -> str:
    rates = (entry.peak_flops.get(kind) for kind in _PRECISIONS)
    cells = [
        entry.name,
        f"{entry.memory_bytes / (1 << 30):g}",
        f"{entry.memory_bandwidth / 1e9:,g}",
        *("" if rate is None else f"{rate / 1e12:,g}" for rate in rates),
        f"{entry.watts:g}",
        f"{DOLLARS_PER_HOUR[entry.name]:.2f}" if entry.name in DOLLARS_PER_HOUR else "",
        entry.source,
    ]
    return f"| {' | '.join(cells)} |"


def _links() -> Iterator[str]:
    yield "| name | delay | each way | of | source |"
    yield "|---|---|---|---|---|"
    yield from map(_link, LINKS)


def _link(entry: Link) -> str:
    ways = f"{entry.up / 1e9:g} GB/s"
    if entry.up != entry.down:
        ways = f"{entry.up / 1e9:g} GB/s up, {entry.down / 1e9:g} GB/s down"
    whose = "a node" if entry.shared else "a device"
    return f"| {entry.name} | {entry.latency * 1e6:g} µs | {ways} | {whose} | {entry.source} |"


def _zones() -> str:
    each = ", ".join(f"`{zone}` {grams:g}" for zone, grams in GRAMS_PER_KWH.items())
    return f"{each}. Source: {ZONES_FROM}."


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(filled(path.read_text()))
