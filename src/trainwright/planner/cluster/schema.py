"""`cluster.yaml`: what a user says of a machine, as closed sections. No torch.

A device or a link is a name of the catalogue, or a section whose keys say all of it; beside `like:`
in a section, the other keys change the catalogue's.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from trainwright.planner.cluster import catalogue
from trainwright.planner.cluster.quantities import Bandwidth, Bytes, Flops, Seconds, Watts
from trainwright.recipe.section import Count, NotNegative, Positive, Section, Share, refusal


def _known(kind: str) -> BeforeValidator:
    """A name of the catalogue, `device` or `link`, as the catalogue spells it."""

    def check(value: Any) -> Any:
        try:
            return getattr(catalogue, kind)(str(value)).name
        except KeyError as error:
            what = f"the catalogue has no {kind} `{value}`"
            near = error.args[0]
            raise refusal(what, f"choose {near}, or describe it with keys of its own") from None

    return BeforeValidator(check)


def _carbon(value: Any) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool) and value >= 0:
        return float(value)
    try:
        return catalogue.carbon(str(value))
    except KeyError as error:
        what = f"no carbon zone is called `{value}`"
        fix = f"choose {error.args[0]}, or write grams a kWh as a number"
        raise refusal(what, fix) from None


class LinkSection(Section):
    """What joins two places: delay, and bandwidth each way as one device has it."""

    shorthand: ClassVar[str] = "like"

    like: Annotated[str, _known("link")] | None = Field(
        None, description="A link of the catalogue, of which the other keys change something."
    )
    latency: Seconds | None = Field(None, description="Delay of a message, such as `2 us`.")
    bandwidth: Bandwidth | None = Field(
        None, description="Each way, of one device, such as `400 Gbit/s` or `450 GB/s`."
    )
    up: Bandwidth | None = Field(None, description="`bandwidth` away, where the ways differ.")
    down: Bandwidth | None = Field(None, description="`bandwidth` back, where the ways differ.")
    shared: bool | None = Field(
        None,
        description="Whether all devices of a node (between pools: of a pool) go through one such "
        "link, instead of one each.",
    )


class JoinSection(LinkSection):
    """A link between two pools."""

    join: list[str] = Field(description="The two pools.", min_length=2, max_length=2)


class DeviceSection(Section):
    """A kind of device."""

    shorthand: ClassVar[str] = "like"

    like: Annotated[str, _known("device")] | None = Field(
        None, description="A device of the catalogue, of which the other keys change something."
    )
    kind: Literal["cpu", "cuda", "rocm", "tpu"] | None = Field(None, description="Its software.")
    memory: Bytes | None = Field(None, description="Its memory, such as `80 GB`.")
    peak: dict[Literal["fp32", "bf16", "fp16", "float8", "float4"], Flops] | None = Field(
        None, description="Dense rates by precision, such as `{bf16: 312 TFLOP/s}`."
    )
    memory_bandwidth: Bandwidth | None = Field(None, description="Such as `2 TB/s`.")
    power: Watts | None = Field(None, description="At full load, such as `400 W`.")
    idle_power: Watts | None = Field(None, description="At rest; default an eighth of `power`.")
    units: Count | None = Field(
        None, description="What runs tiles side by side: SMs, compute units, cores; default 1."
    )


class RatesSection(Section):
    """What is reached of the data sheets; what is left out is assumed, or measured here."""

    products: Share | None = Field(None, description="Of the peak, by large matrix products.")
    attention: Share | None = Field(None, description="Of the peak, within attention's kernel.")
    memory: Share | None = Field(None, description="Of the memory's bandwidth.")
    links: Share | None = Field(
        None, description="Of the bandwidth of links within a node, by collectives."
    )
    networks: Share | None = Field(None, description="Of that of links between nodes.")
    kernel_time: Seconds | None = Field(None, description="Of each kernel, such as `4 us`.")
    step_time: Seconds | None = Field(None, description="Of each step, whatever its size.")
    overlap_slowdown: Annotated[float, Field(ge=1)] | None = Field(
        None, description="Of computing while a collective runs beside it, such as 1.15."
    )
    memory_overhead: Bytes | None = Field(
        None, description="Of a device's, that no formula knows, such as `3 GB`."
    )
    spread: Positive | None = Field(
        None, description="Relative half width that holds four predictions of five; default 0.2."
    )


class PoolSection(Section):
    """Equal nodes in one place."""

    device: DeviceSection = Field(description="The kind of its devices.")
    nodes: Count = Field(1, description="How many nodes.")
    devices_per_node: Count = Field(1, description="How many devices a node.")
    inside: LinkSection | None = Field(None, description="What joins the devices of a node.")
    between: LinkSection | None = Field(None, description="What joins the nodes.")
    nodes_per_rack: Count | None = Field(
        None, description="Nodes a rack, where `between_racks` is slower than `between`."
    )
    between_racks: LinkSection | None = Field(None, description="What joins the racks.")
    rates: RatesSection = Field(
        default_factory=RatesSection, description="What is reached of the data sheets."
    )
    region: str = Field("", description="Where it stands; for people.")
    price: NotNegative = Field(0.0, description="Dollars an hour of one device.")
    failures_per_hour: NotNegative = Field(
        0.0, description="Of one node: 0.0001 is one in 14 months."
    )
    carbon: Annotated[Any, BeforeValidator(_carbon)] = Field(
        0.0, description="Grams of CO2 a kWh, or a zone of the catalogue such as `FR`."
    )
    host_memory: Bytes | None = Field(None, description="Of a node, such as `2 TB`.")
    host_link: LinkSection | None = Field(
        None, description="From a device to its host's memory, such as `PCIe-5`."
    )


class ClusterSection(Section):
    """A machine: pools of devices, and what joins them."""

    name: str = Field("", description="What reports call it; default the file's name.")
    pools: dict[str, PoolSection] = Field(description="Pools by name.", min_length=1)
    links: list[JoinSection] = Field(default_factory=list, description="Between two pools each.")
    wide: LinkSection | None = Field(None, description="Between pools that no `links` names.")
