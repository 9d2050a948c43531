"""Machines' files: what they become, and how mistakes in them are told."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainwright.errors import UserError
from trainwright.planner.cluster import catalogue
from trainwright.planner.cluster.describe import Rates
from trainwright.planner.cluster.device_table import DEVICES, DOLLARS_PER_HOUR, DRIVER_NAMES
from trainwright.planner.cluster.link_table import LINKS
from trainwright.planner.cluster.load import load_cluster, read_cluster
from trainwright.planner.cluster.page import filled
from trainwright.planner.cluster.quantities import quantity

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "clusters"
WHOLE = """
name: both
pools:
  a:
    device:
      kind: cuda
      memory: 80 GiB
      peak: {bf16: 0.312 PFLOP/s, fp32: 19.5 TFLOP/s}
      memory_bandwidth: 2 TB/s
      power: 0.4 kW
      units: 108
    nodes: 4
    devices_per_node: 8
    inside: {latency: 700 ns, bandwidth: 300 GB/s}
    between: {like: InfiniBand-HDR, bandwidth: 100 Gbit/s}
    nodes_per_rack: 2
    between_racks: Ethernet-100
    rates: {products: 0.7, links: 0.9, kernel_time: 5 us, memory_overhead: 2 GB}
    price: 1.5
    carbon: FR
    host_memory: 1 TiB
    host_link: PCIe-4
  b:
    device: a100 80g pcie
    carbon: 300
links:
  - join: [a, b]
    latency: 80 ms
    up: 40 Mbit/s
    down: 1 Gbit/s
    shared: true
"""


def test_every_key_arrives_in_the_units_of_the_planner():
    cluster = read_cluster(WHOLE, "x", "x.yaml")
    a, b = cluster.pools
    assert (cluster.name, cluster.devices) == ("both", 33)
    assert (a.device.kind, a.device.memory_bytes, a.device.units) == ("cuda", 80 * 2**30, 108)
    assert a.device.peak_flops == {"bf16": 312e12, "fp32": 19.5e12}
    assert (a.device.memory_bandwidth, a.device.watts) == (2e12, 400)
    assert a.device.idle_watts == 50
    assert (a.inside.latency, a.inside.up) == (pytest.approx(700e-9), 300e9)
    assert (a.between.latency, a.between.bandwidth, a.between.shared) == (2e-6, 12.5e9, False)
    assert a.between_racks is not None and a.between_racks.shared
    assert (a.rates.products, a.rates.links, a.rates.attention) == (0.7, 0.9, Rates().attention)
    assert (a.rates.kernel_seconds, a.rates.memory_bytes) == (pytest.approx(5e-6), 2e9)
    assert (a.dollars_per_hour, a.grams_per_kwh, b.grams_per_kwh) == (1.5, 56, 300)
    assert a.host_memory_bytes == 2**40 and a.host_link == catalogue.link("PCIe-4")
    assert b.device == catalogue.device("A100-80G-PCIe")
    wide = cluster.link("b", "a")
    assert (wide.latency, wide.up, wide.down, wide.bandwidth) == (0.08, 5e6, 125e6, 5e6)


@pytest.mark.parametrize(
    ("name", "devices", "kinds"),
    [
        ("laptop", 2, 1),
        ("h100-64", 64, 1),
        ("h100-16384", 16384, 1),
        ("three-regions", 200, 3),
        ("two-speeds", 16, 1),
    ],
)
def test_the_examples(name, devices, kinds):
    cluster = load_cluster(EXAMPLES / f"{name}.yaml")
    assert cluster.devices == devices
    assert len({pool.device.name for pool in cluster.pools}) == kinds


def test_two_speeds_differ_three_times():
    fast, slow = (pool.device for pool in load_cluster(EXAMPLES / "two-speeds.yaml").pools)
    assert fast.peak_flops["bf16"] / slow.peak_flops["bf16"] == pytest.approx(3, rel=1e-3)
    assert fast.memory_bandwidth / slow.memory_bandwidth == pytest.approx(3, rel=1e-3)


def test_changes_of_single_keys():
    cluster = load_cluster(
        EXAMPLES / "h100-64.yaml",
        ["pools.h100.between.bandwidth=200 Gbit/s", "pools.h100.nodes=16", "name=more"],
    )
    (pool,) = cluster.pools
    assert (pool.between.bandwidth, pool.between.latency) == (25e9, 2e-6)
    assert (pool.nodes, cluster.name) == (16, "more")


BAD = """
pools:
  a:
    device: H10
    nodse: 4
    nodes: 0
    devices_per_node: 4
    price: cheap
  b:
    device: {like: A100-80G-SXM, memory: 80}
    between: {bandwidth: 5 Gbits/s}
    carbon: XX
links:
  - join: [a]
    speed: 3
"""


def test_all_mistakes_at_once_with_line_and_fix():
    with pytest.raises(UserError) as caught:
        read_cluster(BAD, "x", "x.yaml", ["pools.a.inside.bandwidth=3 GB", "pools.q"])
    told = {mistake.key: mistake for mistake in caught.value.mistakes}
    lines = {key: mistake.where for key, mistake in told.items()}
    assert lines == {
        "pools.a.device.like": "x.yaml:4",
        "pools.a.nodse": "x.yaml:5",
        "pools.a.nodes": "x.yaml:6",
        "pools.a.price": "x.yaml:8",
        "pools.b.device.memory": "x.yaml:10",
        "pools.b.between.bandwidth": "x.yaml:11",
        "pools.b.carbon": "x.yaml:12",
        "links.0.join": "x.yaml:14",
        "links.0.speed": "x.yaml:15",
        "pools.a.inside.bandwidth": "command line",
        "pools.q": "command line",
    }
    assert "`H100-SXM`" in told["pools.a.device.like"].fix
    assert told["pools.a.nodse"].fix == "did you mean `nodes`?"
    assert told["pools.b.device.memory"].what == "`80` has no unit"
    assert told["pools.b.between.bandwidth"].fix == "write `5 Gbit/s`"


@pytest.mark.parametrize(
    ("text", "key", "what"),
    [
        ("pools: {}", "pools", "expected keys with values"),
        ("pools: {a: {}}", "pools.a.device", "`device` is missing"),
        ("pools: {a: {device: L4, nodes: 2}}", "pools.a.between", "nothing says what joins"),
        ("pools: {a: {device: L4, devices_per_node: 2}}", "pools.a.inside", "nothing says"),
        ("pools: {a: {device: L4}, b: {device: L4}}", "pools", "nothing joins the pools"),
        ("pools: {a: {device: {kind: cuda}}}", "pools.a.device", "`memory` is missing"),
        (
            "pools: {a: {device: L4, inside: {bandwidth: 3 GB/s}}}",
            "pools.a.inside",
            "`latency` is missing",
        ),
        (
            "pools: {a: {device: L4}, b: {device: L4}}\n"
            "links: [{join: [a, bb], like: Ethernet-10}]\nwide: Ethernet-1",
            "links.0.join",
            "no pool is called `bb`",
        ),
        ("pools: {a: {device: L4, rates: {products: 1.5}}}", "pools.a.rates.products", "0 to 1"),
    ],
)
def test_what_is_missing_or_contrary(text, key, what):
    with pytest.raises(UserError) as caught:
        read_cluster(text, "x", "x.yaml")
    assert any(m.key == key and what in m.what for m in caught.value.mistakes), caught.value


def test_files_that_are_none(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        load_cluster(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="a machine is a section of keys"):
        read_cluster("- a", "x", "x.yaml")


@pytest.mark.parametrize(
    ("text", "measure", "value"),
    [
        ("400 Gbit/s", "bytes/s", 50e9),
        ("450GB/s", "bytes/s", 450e9),
        ("80 ms", "seconds", 0.08),
        ("2 us", "seconds", 2e-6),
        ("80 GB", "bytes", 80e9),
        ("80 GiB", "bytes", 80 * 2**30),
        ("1.979 PFLOP/s", "FLOP/s", 1.979e15),
        ("1e3 W", "watts", 1000),
    ],
)
def test_numbers_with_units(text, measure, value):
    assert quantity(text, measure) == pytest.approx(value)


def test_the_catalogue_can_be_searched_and_says_its_sources():
    names = [entry.name for entry in (*DEVICES, *LINKS)]
    assert len(set(names)) == len(names)
    assert all(entry.source for entry in (*DEVICES, *LINKS))
    assert {name for _, name in DRIVER_NAMES} | DOLLARS_PER_HOUR.keys() <= set(names)
    assert catalogue.device("h100 sxm") is catalogue.device("H100-SXM")
    with pytest.raises(KeyError, match="NVLink-4"):
        catalogue.link("nvlink")


def test_rates_of_the_catalogue_are_dense_and_ordered():
    """Half the bits are never slower; of sparse figures there would be twice as much a watt."""
    for entry in DEVICES:
        rates = [
            entry.peak_flops[kind]
            for kind in ("fp32", "bf16", "float8", "float4")
            if kind in entry.peak_flops
        ]
        assert rates == sorted(rates), entry.name
        assert entry.peak_flops["bf16"] / entry.watts < 2.6e12, entry.name
        # Memory is read in between a hundredth and a tenth of a second.
        assert 0.005 < entry.memory_bytes / entry.memory_bandwidth < 0.4, entry.name


def test_the_examples_of_the_page_are_machines():
    page = (ROOT / "docs" / "cluster.md").read_text()
    blocks = [block.split("```")[0] for block in page.split("```yaml\n")[1:]]
    assert blocks
    for block in blocks:
        assert read_cluster(block, "page", "page.yaml").devices > 0


def test_the_page_is_the_schema_s_and_the_catalogue_s():
    page = (ROOT / "docs" / "cluster.md").read_text()
    assert page == filled(page), "python -m trainwright.planner.cluster.page docs/cluster.md"
