"""What `auto` is: steps, codec and density with which a round's exchange hides behind computing.

A round is h steps of s seconds. Its exchange takes E seconds: a contribution goes up, those of the
others come down, and calls wait for the link's delay. The `delay` τ steps that go on meanwhile hide
τ s of it: a peer computes h s of every h s + max(0, E − τ s) seconds. That share is to be 95 %: E
is what the link takes at least, and where it turns out twice as long, 90 % are left.

The finest contribution (most bytes) with which it is, at the method's number of steps, is taken.
Where there is none: the smallest, with as many more steps as that needs, if steps are `auto`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product

import torch

from trainwright.errors import UserError
from trainwright.recipe.schema import Optimizer
from trainwright.recipe.swarm import CodecName, Swarm
from trainwright.swarm.layout import Layout
from trainwright.swarm.link import Link
from trainwright.swarm.methods.build import build_method
from trainwright.swarm.methods.method import Agreed
from trainwright.swarm.settings import SPARSE, Settings, resolve_settings

SHARE = 0.95  # of the time that is to be spent computing
MOST_STEPS = 500  # between exchanges: the most that has been published (DiLoCo)
MESSAGE_BYTES = 400  # of header, key and signature, about
CODECS: tuple[CodecName, ...] = ("fp32", "bf16", "int8", "e3m0", "2bit", "1bit", "top-k")
DENSITIES = tuple(2.0**-power for power in range(2, 11))
_SAMPLE = 1 << 20  # values that are encoded to find a contribution's bytes


@dataclass(frozen=True)
class Exchange:
    """One way to exchange: its bytes, seconds, and the share of time that is left for computing."""

    settings: Settings
    size: int  # bytes of a contribution
    seconds: float
    share: float


@dataclass(frozen=True)
class Adapted:
    """The settings that were chosen, and a table of what they were chosen from."""

    settings: Settings
    lines: tuple[str, ...]


def adapt(
    swarm: Swarm,
    optimizer: Optimizer,
    layout: Layout,
    *,
    link: Link | None,
    step_seconds: float,
    peers: int,
    measure: Callable[[Settings, Layout], int] | None = None,
) -> Adapted:
    """The recipe's settings, with what is `auto` in them chosen for this link and these steps.

    `step_seconds` is what a step takes here, `peers` how many are expected, `measure` tells the
    bytes of a contribution (default: one is encoded). Without a link the method's own values stay.
    Raises UserError for settings that do not go together.
    """
    if link is None:
        line = "the link is not known before the run: what is `auto` is the method's own"
        return Adapted(resolve_settings(swarm, optimizer), (line,))
    measure = measure or contribution_bytes
    found = []
    for settings in candidates(swarm, optimizer):
        size = measure(settings, layout)
        seconds = exchange_seconds(settings.method, size, link, peers)
        found.append(Exchange(settings, size, seconds, _share(settings, seconds, step_seconds)))
    found.sort(key=lambda exchange: -exchange.size)
    hidden = [exchange for exchange in found if exchange.share >= SHARE]
    chosen = hidden[0] if hidden else found[-1]
    tried = list(found)
    if not hidden and swarm.inner_steps == "auto":
        chosen = _with_more_steps(chosen, swarm, optimizer, step_seconds)
        tried += [chosen] if chosen not in tried else []
    lines = _table(tried, chosen, link, step_seconds, peers)
    return Adapted(chosen.settings, tuple(lines))


def candidates(swarm: Swarm, optimizer: Optimizer) -> list[Settings]:
    """All settings that the recipe leaves open, with the method's own number of steps where that
    is `auto`. Raises UserError if there are none.
    """
    codecs = CODECS if swarm.codec == "auto" else (None,)
    densities = DENSITIES if swarm.density == "auto" else (None,)
    dct = swarm.method in ("demo", "distro")
    found, refused = list[Settings](), list[UserError]()
    for codec, density in product(codecs, densities):
        asked = swarm
        if swarm.density == "auto" and codec is not None and codec not in SPARSE and not dct:
            asked = swarm.model_copy(update={"density": None})  # nothing to choose in a dense one
        try:
            settings = resolve_settings(asked, optimizer, codec=codec, density=density)
        except UserError as error:
            refused.append(error)
            continue
        if settings not in found:
            found.append(settings)
    if not found:
        raise refused[0]
    return found


def contribution_bytes(settings: Settings, layout: Layout) -> int:
    """Bytes of a round's contribution, by writing one: of random values, which is about the worst
    for codes of varying length, and of a part of a large model.
    """
    sample = _beginning(layout)
    # Fragments only say how much of a vector a round has: their codec is the whole one's.
    method = build_method(replace(settings, fragments=1), sample)
    agreed = Agreed(0, torch.zeros(sample.count))
    local = torch.randn(sample.count, generator=torch.Generator().manual_seed(0)).mul(1e-3)
    planes, _ = method.outgoing(agreed, method.begin(agreed), 0, local, 1e-3)
    written = sum(len(plane) for plane in planes)
    return MESSAGE_BYTES + math.ceil(written / sample.count * layout.count / settings.fragments)


def _beginning(layout: Layout) -> Layout:
    """The first tensors, the last of them cut to fewer rows: about a million values."""
    shapes, left = [], _SAMPLE
    for name, shape in layout.shapes:
        rows, *row = shape or (1,)
        rows = min(rows, max(1, left // math.prod(row)))
        shapes.append((name, (rows, *row)))
        left -= rows * math.prod(row)
        if left <= 0:
            break
    return Layout(tuple(shapes))


def exchange_seconds(method: str, size: int, link: Link, peers: int) -> float:
    """How long a round's exchange takes at least, at this link: a contribution up and the others'
    down, and about four calls for the round and three for each peer, one after the other.
    """
    others = 1 if method == "noloco" else peers - 1
    return size / link.up + others * size / link.down + (4 + 3 * others) * link.call


def _share(settings: Settings, seconds: float, step_seconds: float) -> float:
    """Of a peer's time, what it computes in."""
    computing = settings.inner_steps / settings.fragments * step_seconds
    return computing / (computing + _waiting(settings, seconds, step_seconds))


def _waiting(settings: Settings, seconds: float, step_seconds: float) -> float:
    return max(0.0, seconds - settings.delay * step_seconds)


def _with_more_steps(
    exchange: Exchange, swarm: Swarm, optimizer: Optimizer, step_seconds: float
) -> Exchange:
    """The same with the least number of steps that hides it, or the most that are allowed."""
    settings = exchange.settings
    if settings.method in ("demo", "distro"):
        return exchange  # whose peers have nothing of their own to train on
    waiting = _waiting(settings, exchange.seconds, step_seconds)
    a_round = math.ceil(SHARE / (1 - SHARE) * waiting / step_seconds - 1e-9)
    steps = min(a_round * settings.fragments, MOST_STEPS)
    settings = replace(settings, inner_steps=max(steps, settings.inner_steps))
    share = _share(settings, exchange.seconds, step_seconds)
    return Exchange(settings, exchange.size, exchange.seconds, share)


def _table(
    tried: list[Exchange], chosen: Exchange, link: Link, step_seconds: float, peers: int
) -> Iterator[str]:
    yield f"link: {link}; a step takes {step_seconds:.3g} s; {peers} peers"
    yield f"  {'codec':<12}{'density':>9}{'steps':>7}{'bytes':>11}{'exchange':>11}{'computing':>11}"
    for exchange in tried:
        settings = exchange.settings
        sparse = settings.codec in SPARSE or settings.method in ("demo", "distro")
        row = (
            f"{settings.codec:<12}",
            f"{settings.density if sparse else 1:>9.3g}",
            f"{settings.inner_steps:>7}",
            f"{_bytes(exchange.size):>11}",
            f"{exchange.seconds:>9.3g} s",
            f"{exchange.share:>11.0%}",
        )
        yield ("* " if exchange is chosen else "  ") + "".join(row)
    if chosen.share < SHARE:
        yield f"no choice leaves {SHARE:.0%} of the time for computing: the link is what limits"


def _bytes(size: int) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000  # type: ignore[assignment]
    return f"{size:.3g} {unit}"
