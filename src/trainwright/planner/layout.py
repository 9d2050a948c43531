"""What is legal: how many workers, how the weights lie on them, how the batch divides.

Every check returns mistakes, each with the nearest values that work, and decides nothing else.
"""

from __future__ import annotations

from trainwright.errors import Mistake
from trainwright.recipe.schema import DataSection, Parallel, Training


def infer_layout(parallel: Parallel, world: int, *, shard: bool) -> tuple[int, int]:
    """(dp_replicate, dp_shard) over `world` workers; `shard` decides where neither is given.

    Where one is given the other is the rest. Only legal where `layout_mistakes` finds nothing.
    """
    replicate, sharded = parallel.dp_replicate, parallel.dp_shard
    if replicate is None and sharded is None:
        return (1, world) if shard else (world, 1)
    if sharded is None:
        assert replicate is not None
        return replicate, world // replicate
    return (replicate if replicate is not None else world // sharded), sharded


def layout_mistakes(parallel: Parallel, world: int) -> list[Mistake]:
    """Degrees that do not multiply to `world` workers."""
    replicate, sharded = parallel.dp_replicate, parallel.dp_shard
    workers = "1 worker" if world == 1 else f"{world} workers"
    if replicate is not None and sharded is not None:
        if replicate * sharded == world:
            return []
        what = f"dp_replicate {replicate} × dp_shard {sharded} make {replicate * sharded} workers"
        if world % sharded == 0:
            fix = f"write `dp_replicate: {world // sharded}`"
        else:
            fix = f"write `dp_shard: {nearest(divisors(world), sharded)}` and leave the other out"
        return [Mistake(f"{what}, but there are {world}", fix, key="parallel.dp_replicate")]
    for key, degree in (("dp_replicate", replicate), ("dp_shard", sharded)):
        if degree is not None and world % degree:
            near = nearest(divisors(world), degree)
            what = f"{degree} does not divide {workers}"
            return [Mistake(what, f"write `{key}: {near}`", key=f"parallel.{key}")]
    return []


def batch_mistakes(
    training: Training, data: DataSection | None, parallel: Parallel | None, world: int | None
) -> list[Mistake]:
    """A batch that is no whole number of rows, or does not divide over `world` and micro-batch."""
    tokens = training.batch_tokens
    rows = training.batch_sequences or 8
    key, unit = "training.batch_sequences", 1
    if tokens is not None:
        if data is None:
            return []
        key, unit = "training.batch_tokens", data.sequence_length
        if tokens % unit:
            below, above = tokens // unit * unit, (tokens // unit + 1) * unit
            near = " or ".join(f"`batch_tokens: {n}`" for n in (below, above) if n)
            what = f"{tokens:,} tokens are no whole number of rows of {unit:,} tokens"
            return [Mistake(what, f"write {near}", key=key)]
        rows = tokens // unit
    if world is None or parallel is None:
        return []
    name = key.rpartition(".")[2]
    if rows % world:
        below, above = rows // world * world, (rows // world + 1) * world
        near = " or ".join(f"`{name}: {n * unit}`" for n in (below, above) if n)
        what = f"{rows} rows do not share out evenly over {world} workers"
        return [Mistake(what, f"write {near}, or another `parallel.workers`", key=key)]
    micro = parallel.micro_batch
    own = rows // world
    if isinstance(micro, int) and own % micro:
        near = f"write `micro_batch: {nearest(divisors(own), micro)}`"
        what = f"{micro} does not divide the {own} rows of a worker ({rows} rows, {world} workers)"
        return [Mistake(what, near, key="parallel.micro_batch")]
    return []


def divisors(number: int) -> list[int]:
    """All divisors of `number`, ascending."""
    return [n for n in range(1, number + 1) if number % n == 0]


def nearest(candidates: list[int], wanted: int) -> int:
    """The candidate closest to `wanted`; of two equally close ones the larger."""
    return min(candidates, key=lambda n: (abs(n - wanted), -n))
