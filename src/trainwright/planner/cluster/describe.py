"""A machine, from one laptop to pools in several regions, as plain data.

Ranks are numbered pool by pool, node by node, device by device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from trainwright.planner.cluster.calibration import Calibration

Kind = Literal["cpu", "cuda", "rocm", "tpu"]


@dataclass(frozen=True)
class Rates:
    """What a device and its links reach of their data sheets, under some software.

    Measured on the machine, fitted to runs, or assumed; `source` says which. Shares are of the data
    sheet's figure, `spread` is the relative half width that holds four predictions of five.
    """

    products: float = 0.75  # of the peak, by large matrix products of a good shape
    float8_share: float = 0.75  # of that, in float8
    float4_share: float = 0.60  # of that, in float4
    attention: float = 0.50  # of the peak, within attention's kernel, forward
    memory: float = 0.80  # of the memory's bandwidth, by elementwise kernels
    links: float = 0.80  # of a link's bandwidth within a node, by collectives
    networks: float = 0.70  # of one's between nodes
    kernel_seconds: float = 4e-6  # of every kernel, that nothing hides
    score_passes: float = 7.0  # over attention's scores, where they are stored
    odd_share: float = 0.15  # of a product with a size that is no multiple of 8
    uneven_share: float = 0.93  # of one with a size that is no multiple of 64
    overlap_slowdown: float = 1.15  # of computing while a collective runs beside it
    pass_seconds: float = 5e-4  # of a micro-batch's way through a stage, there or back
    step_seconds: float = 0.0  # of a step, whatever its size
    steps: float = 1.0  # what a whole step takes over the sum of its parts
    memory_bytes: float = 0.0  # of a device's, that no formula knows: context, buffers
    holes: float = 0.0  # what an allocator holds besides, as a share of what is counted
    spread: float = 0.20
    source: str = "assumed"


@dataclass(frozen=True)
class DeviceKind:
    """A kind of device by its data sheet; rates in FLOP/s and bytes/s, power in watts.

    `peak_flops` is dense, by type of products: fp32, bf16, fp16, float8, float4 where there is one.
    `units` run tiles of a product side by side: SMs, compute units, cores.
    """

    name: str
    kind: Kind
    memory_bytes: float
    peak_flops: Mapping[str, float]
    memory_bandwidth: float
    watts: float
    idle_watts: float
    units: int
    tile: tuple[int, int] = (128, 256)
    source: str = ""

    def __hash__(self) -> int:
        # Peaks cannot be hashed, and a kind goes by its name.
        return hash(self.name)


@dataclass(frozen=True)
class Link:
    """What joins two places: seconds of delay and bytes/s each way, as one device sees it.

    `shared`: all devices of a node go through one such link, instead of one each; between pools,
    all devices of a pool.
    """

    name: str
    latency: float
    up: float
    down: float
    shared: bool = False
    source: str = ""

    @property
    def bandwidth(self) -> float:
        """Bytes/s of the slower way."""
        return min(self.up, self.down)


@dataclass(frozen=True)
class Pool:
    """Equal nodes in one place, their devices joined `inside`, and the nodes `between` them.

    `dollars_per_hour` is a device's, `failures_per_hour` a node's, `grams_per_kwh` the region's.
    """

    name: str
    device: DeviceKind
    nodes: int
    devices_per_node: int
    inside: Link
    between: Link
    rates: Rates = field(default_factory=Rates)
    region: str = ""
    dollars_per_hour: float = 0.0
    failures_per_hour: float = 0.0
    grams_per_kwh: float = 0.0
    nodes_per_rack: int = 0  # 0: racks do not matter
    between_racks: Link | None = None
    host_memory_bytes: float = 0.0  # of a node; 0 where it is not known
    host_link: Link | None = None  # from a device to its host's memory
    calibration: Calibration | None = field(default=None, repr=False, hash=False)  # measured here

    @property
    def devices(self) -> int:
        """All of them."""
        return self.nodes * self.devices_per_node


@dataclass(frozen=True)
class Observation:
    """A step that was measured: its plan's features, and the logarithm of measured / predicted."""

    features: tuple[float, ...]
    log_ratio: float


@dataclass(frozen=True)
class Cluster:
    """Pools, and the links between them; `wide` joins pools that no entry of `links` does.

    `observed` are steps that were measured here; predictions lean on them.
    """

    name: str
    pools: tuple[Pool, ...]
    links: Mapping[frozenset[str], Link] = field(default_factory=dict)
    wide: Link | None = None
    observed: tuple[Observation, ...] = ()

    def __hash__(self) -> int:
        # Of enough to tell machines apart, so that what is found out about one can be kept.
        return hash((self.name, *((pool.name, pool.nodes) for pool in self.pools)))

    def link(self, first: str, second: str) -> Link:
        """What joins two pools. Raises KeyError where nothing does."""
        link = self.links.get(frozenset((first, second)), self.wide)
        if link is None:
            raise KeyError(f"nothing joins the pools {first} and {second}")
        return link

    @property
    def devices(self) -> int:
        """Of all pools."""
        return sum(pool.devices for pool in self.pools)

    def pool_of(self, rank: int) -> Pool:
        """The pool that has a rank's device. Raises IndexError beyond the last."""
        for pool in self.pools:
            if rank < pool.devices:
                return pool
            rank -= pool.devices
        raise IndexError(rank)
