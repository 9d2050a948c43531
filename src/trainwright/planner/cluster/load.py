"""`cluster.yaml` to a `Cluster`, with every mistake in one report. No torch.

The way: YAML → plain values with lines → changes → sections → checks → plain data.
"""

from __future__ import annotations

import difflib
import itertools
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from trainwright.errors import Mistake, UserError
from trainwright.planner.cluster import catalogue
from trainwright.planner.cluster.describe import Cluster, DeviceKind, Link, Pool, Rates
from trainwright.planner.cluster.schema import (
    ClusterSection,
    DeviceSection,
    LinkSection,
    PoolSection,
    RatesSection,
)
from trainwright.recipe.describe import dotted, expects, item_of, section_in, value_of
from trainwright.recipe.mistakes import show
from trainwright.recipe.overrides import COMMAND_LINE
from trainwright.recipe.section import Section
from trainwright.recipe.yaml_text import Document, parse, parse_value

# Of a device that is alone in its node, or a node that is alone: nothing goes through it.
NOWHERE = Link("none", 0.0, math.inf, math.inf)
_IDLE_SHARE = 1 / 8


def load_cluster(path: str | os.PathLike[str], changes: Sequence[str] = ()) -> Cluster:
    """The machine that the file at `path` describes; docs/cluster.md says how it is written.

    `changes` are `key.path=value`, such as `pools.a100.between.bandwidth=200 Gbit/s`. Raises
    `UserError` with every mistake found, each with its line.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        what = f"cannot be read: {reason.lower()}"
        fix = "docs/cluster.md tells how to write one; examples/clusters has some"
        raise UserError(Mistake(what, fix, where=str(path))) from None
    return read_cluster(text, path.stem, str(path), changes)


def read_cluster(text: str, name: str, where: str, changes: Sequence[str] = ()) -> Cluster:
    """The machine that `text` describes. `where` stands before the line numbers of mistakes."""
    document = parse(text, where)
    if not isinstance(document.value, dict):
        what = f"a machine is a section of keys, found {show(document.value)}"
        raise UserError(Mistake(what, "begin with `pools:`", where=f"{where}:1"))
    mistakes = [*document.mistakes, *_apply(document, changes)]
    section = None
    try:
        section = ClusterSection.model_validate(document.value)
        mistakes += _incomplete(section)
    except ValidationError as error:
        mistakes += _mistakes(error.errors(include_url=False))
    if mistakes or section is None:
        placed = (replace(m, where=m.where or document.place(m.key) or where) for m in mistakes)
        raise UserError(sorted(dict.fromkeys(placed), key=lambda m: _line(m.where)))
    return _cluster(section, name)


def _line(where: str) -> tuple[int, str]:
    _, _, line = where.rpartition(":")
    return (int(line), "") if line.isdecimal() else (1 << 30, where)


def _apply(document: Document, changes: Iterable[str]) -> Iterator[Mistake]:
    """Lay `key.path=value` over the values; yields what is wrong with them."""
    for change in changes:
        key, equals, text = change.partition("=")
        parts = key.strip().split(".")
        try:
            if not equals or not all(parts):
                what, fix = f"`{change}` is no change", "write `key.path=value`"
                raise UserError(Mistake(what, fix))
            _set(document.value, parts, parse_value(text, COMMAND_LINE))
            document.places[".".join(parts)] = COMMAND_LINE
        except UserError as error:
            yield from (replace(m, key=key.strip(), where=COMMAND_LINE) for m in error.mistakes)


def _set(tree: dict[str, Any], parts: Sequence[str], value: Any) -> None:
    here: Any = tree
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(here, list) and part.isdecimal() and int(part) < len(here):
            index: Any = int(part)
        elif isinstance(here, dict):
            index = part
            here.setdefault(part, {})
        else:
            raise UserError(Mistake(f"`{'.'.join(parts[:depth])}` has no `{part}`"))
        if last:
            here[index] = value
        elif isinstance(here[index], str):
            here[index] = {"like": here[index]}  # a name of the catalogue, of which a key changes
        here = here[index]


def _mistakes(errors: Iterable[Mapping[str, Any]]) -> Iterator[Mistake]:
    """Pydantic's errors in our words."""
    for error in errors:
        path = tuple(part for part in error["loc"] if part != "[key]")
        section, field = _schema_at(path)
        key, last = dotted(path), path[-1] if path else ""
        if error["type"] == "recipe":
            inner = error["ctx"].get("key")
            yield Mistake(
                error["ctx"]["what"], error["ctx"]["fix"], f"{key}.{inner}" if inner else key
            )
        elif error["type"] == "extra_forbidden":
            assert section is not None
            names = list(section.model_fields)
            close = difflib.get_close_matches(str(last), names, n=1, cutoff=0.6)
            among = ", ".join(f"`{name}`" for name in names)
            fix = f"did you mean `{close[0]}`?" if close else f"the keys here are {among}"
            yield Mistake(f"unknown key `{last}`", fix, key)
        elif error["type"] == "missing":
            yield Mistake(f"`{last}` is missing", _about(section, last), key)
        else:
            words = expects(*field) if field is not None else "something else"
            what = f"expected {words}, found {show(error['input'])}"
            yield Mistake(what, _about(section, last), key)


def _about(section: type[Section] | None, key: str | int) -> str:
    fields = section.model_fields if section is not None else {}
    described = fields[str(key)].description if str(key) in fields else None
    return f"`{key}` is: {described}" if described else ""


def _schema_at(path: Sequence[str | int]) -> tuple[type[Section] | None, tuple[Any, Any] | None]:
    """The section that holds a place, and the type and bounds of the place."""
    section: type[Section] | None = ClusterSection
    annotation: Any = ClusterSection
    holder, bounds = None, ()
    for part in path:
        section = section_in(annotation)
        if section is not None:
            holder, known = section, section.model_fields.get(str(part))
            annotation = known.annotation if known else None
            bounds = tuple(known.metadata) if known else ()
        else:
            annotation, bounds = item_of(annotation) or value_of(annotation), ()
    return holder, None if annotation is None else (annotation, bounds)


def _incomplete(section: ClusterSection) -> Iterator[Mistake]:
    """What each section alone cannot see."""
    for name, pool in section.pools.items():
        key = f"pools.{name}"
        yield from _device_mistakes(pool.device, f"{key}.device")
        for part, needed, why in (
            ("inside", pool.devices_per_node > 1, f"{pool.devices_per_node} devices a node"),
            ("between", pool.nodes > 1, f"{pool.nodes} nodes"),
            ("between_racks", pool.nodes_per_rack is not None, "racks"),
            ("host_link", False, ""),
        ):
            link = getattr(pool, part)
            if link is not None:
                yield from _link_mistakes(link, f"{key}.{part}")
            elif needed:
                what = f"there are {why}, and nothing says what joins them"
                yield Mistake(what, f"write `{part}:`, such as {_example(part)}", f"{key}.{part}")
    for index, join in enumerate(section.links):
        for pool_name in join.join:
            if pool_name not in section.pools:
                close = difflib.get_close_matches(pool_name, section.pools, n=1, cutoff=0.5)
                names = close or list(section.pools)
                fix = "did you mean " + " or ".join(f"`{each}`" for each in names) + "?"
                yield Mistake(f"no pool is called `{pool_name}`", fix, f"links.{index}.join")
        yield from _link_mistakes(join, f"links.{index}")
    if section.wide is not None:
        yield from _link_mistakes(section.wide, "wide")
        return
    joined = {frozenset(join.join) for join in section.links}
    for pair in itertools.combinations(section.pools, 2):
        if frozenset(pair) not in joined:
            what = f"nothing joins the pools `{pair[0]}` and `{pair[1]}`"
            yield Mistake(what, "write `wide: internet-continent`, or an entry of `links`", "pools")


def _example(part: str) -> str:
    return {"inside": "`NVLink-4`", "between": "`InfiniBand-NDR`"}.get(part, "`Ethernet-100`")


def _link_mistakes(link: LinkSection, key: str) -> Iterator[Mistake]:
    both = link.bandwidth is not None
    if both and (link.up is not None or link.down is not None):
        yield Mistake("`bandwidth` is both ways", "keep it, or `up` and `down`", f"{key}.bandwidth")
    if link.like is None:
        if link.latency is None:
            yield Mistake("`latency` is missing", "write it, such as `2 us`", key)
        if not both and (link.up is None or link.down is None):
            yield Mistake("`bandwidth` is missing", "write it, such as `400 Gbit/s`", key)
    if 0 in (link.bandwidth, link.up, link.down):
        yield Mistake("a link of no bandwidth joins nothing", "write more than 0", key)


def _device_mistakes(device: DeviceSection, key: str) -> Iterator[Mistake]:
    if device.like is not None:
        return
    for part, example in (
        ("kind", "cuda"),
        ("memory", "80 GB"),
        ("peak", "{bf16: 312 TFLOP/s}"),
        ("memory_bandwidth", "2 TB/s"),
        ("power", "400 W"),
    ):
        if not getattr(device, part):
            fix = f"write `{part}: {example}`, or `like:` and a device of the catalogue"
            yield Mistake(f"`{part}` is missing", fix, key)


def _cluster(section: ClusterSection, name: str) -> Cluster:
    links = {frozenset(join.join): _link(join, " - ".join(join.join)) for join in section.links}
    return Cluster(
        name=section.name or name,
        pools=tuple(_pool(name, pool) for name, pool in section.pools.items()),
        links=links,
        wide=None if section.wide is None else _link(section.wide, "wide"),
    )


def _pool(name: str, pool: PoolSection) -> Pool:
    def link(part: str) -> Link | None:
        given = getattr(pool, part)
        return None if given is None else _link(given, part)

    return Pool(
        name=name,
        device=_device(pool.device, name),
        nodes=pool.nodes,
        devices_per_node=pool.devices_per_node,
        inside=link("inside") or NOWHERE,
        between=link("between") or NOWHERE,
        rates=_rates(pool.rates),
        region=pool.region,
        dollars_per_hour=pool.price,
        failures_per_hour=pool.failures_per_hour,
        grams_per_kwh=pool.carbon,
        nodes_per_rack=pool.nodes_per_rack or 0,
        between_racks=link("between_racks"),
        host_memory_bytes=pool.host_memory or 0.0,
        host_link=link("host_link"),
    )


def _link(given: LinkSection, name: str) -> Link:
    known = NOWHERE if given.like is None else catalogue.link(given.like)
    up, down = (given.up, given.down) if given.bandwidth is None else (given.bandwidth,) * 2
    changes: dict[str, Any] = {
        "latency": given.latency,
        "up": up,
        "down": down,
        "shared": given.shared,
    }
    changes = {key: value for key, value in changes.items() if value is not None}
    if changes:
        changes["name"] = f"{known.name}, changed" if given.like else name
        changes["source"] = "the machine's file"
    return replace(known, **changes)


def _device(given: DeviceSection, pool: str) -> DeviceKind:
    changes: dict[str, Any] = {
        "kind": given.kind,
        "memory_bytes": given.memory,
        "memory_bandwidth": given.memory_bandwidth,
        "watts": given.power,
        "idle_watts": given.idle_power,
        "units": given.units,
    }
    changes = {key: value for key, value in changes.items() if value is not None}
    if given.like is not None:
        known = catalogue.device(given.like)
        if given.peak is not None:
            changes["peak_flops"] = {**known.peak_flops, **given.peak}
        if changes:
            changes["source"] = f"{known.source}; changed by the machine's file"
        return replace(known, **changes)
    changes.setdefault("idle_watts", changes["watts"] * _IDLE_SHARE)
    changes.setdefault("units", 1)
    return DeviceKind(
        name=pool,
        peak_flops={str(precision): rate for precision, rate in (given.peak or {}).items()},
        source="the machine's file",
        **changes,
    )


def _rates(given: RatesSection) -> Rates:
    names = {
        "kernel_time": "kernel_seconds",
        "step_time": "step_seconds",
        "memory_overhead": "memory_bytes",
    }
    changes = {names.get(key, key): value for key, value in given if value is not None}
    return Rates(**changes, source="the machine's file") if changes else Rates()
